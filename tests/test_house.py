"""The house: rooms in one order, imports that only go down, names of three words in every yaml."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "switchlora"
ROOMS = (
    *(
        "commands",
        "cli",
        "train",
        "bench",
        "run",
        "analysis",
        "sweep",
        "integrations",
        "loop",
        "switching",
        "registry",
        "storage",
    ),
    *("policy", "criteria", "ranks", "initializers", "cost", "learner", "monitor"),
    *("adapters", "data", "models", "process", "config", "names", "errors"),
)
"""from the top to the ground: a room imports what stands below it"""
OPEN = ("analysis", "bench", "integrations")
"""rooms without a face: each of their files is a command, and imports more than the others need"""


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files():
    named = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]
    single = [path for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("__")]
    return named + single


def imports(path):
    """(module, name) of everything that a file takes from this package, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "switchlora":
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            yield from ((node.module, name) for name in names)
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("switchlora") for alias in node.names), path


def test_every_file_lives_in_a_known_room():
    assert {room_of(path) for path in files()} == set(ROOMS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_and_enter_a_room_by_its_face(path):
    here = room_of(path)
    for module, name in imports(path):
        words = [*module.split("."), name][1:]
        there = words[0]
        inside = (PACKAGE / there).is_dir() and len(module.split(".")) > 2
        if there == here:
            is_module = (PACKAGE.joinpath(*words)).with_suffix(".py").is_file()
            assert inside or is_module or path.name == "__init__.py", f"{module} is its own face"
            continue
        assert ROOMS.index(there) > ROOMS.index(here), f"{here} imports {there}, which is above"
        private = name.startswith("_")
        assert not inside or there in OPEN or private, f"{module}.{name}: take it from the face"


def yamls():
    return [*(REPOSITORY / "conf").rglob("*.yaml"), *(REPOSITORY / "experiments").glob("*.yaml")]


def test_a_target_in_a_yaml_is_a_noun_and_a_name():
    found = {
        target
        for path in yamls()
        for target in re.findall(r"switchlora\.[\w.]+", path.read_text())
        if "_target_" in path.read_text()
    }
    assert found and all(len(target.split(".")) == 3 for target in found), found


@pytest.mark.parametrize("room", [r for r in ROOMS if (PACKAGE / r).is_dir() and r not in OPEN])
def test_a_face_says_in_a_sentence_what_the_room_is_for_and_gives_names_alone(room):
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    given = tree.body[1:]
    assert given and all(isinstance(node, ast.ImportFrom) for node in given)
    assert all(alias.asname == alias.name for node in given for alias in node.names)
