"""What ``pyproject.toml`` requires: all that is imported, each with a lower bound."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import test_versions

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {
    path.stem
    for folder in ("tests", "scripts", "examples")
    for path in (REPOSITORY / folder).glob("*.py")
}
KNOWN = {*sys.stdlib_module_names, "switchlora", "reference", "when_faster", "experiments", *OURS}
DISTRIBUTIONS = packages_distributions()


def all_lines():
    """Every requirement of the program, of its extras and of its build."""
    extras = [line for lines in EXTRAS.values() for line in lines]
    return [*PROJECT["dependencies"], *extras, *PYPROJECT["build-system"]["requires"]]


def names(lines):
    return {canonicalize_name(Requirement(line).name) for line in lines}


def modules(node):
    """The top-level names that an import takes from other packages."""
    if isinstance(node, ast.Import):
        found = {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
        found = {node.module.split(".")[0]}
    else:
        found = set()
    return found - KNOWN


def packages(nodes):
    """The packages that imports come from; a module that is not installed stands for its own."""
    found = set().union(*map(modules, nodes))
    return {canonicalize_name(DISTRIBUTIONS.get(name, [name])[0]) for name in found}


def sources(folder, without="-"):
    paths = sorted((REPOSITORY / folder).rglob("*.py"))
    return [ast.parse(path.read_text()) for path in paths if without not in path.parts]


def test_what_the_program_imports_when_it_starts_is_installed_with_it():
    """The files of ``integrations`` need the library that each is named after."""
    top = [node for tree in sources("switchlora", "integrations") for node in tree.body]
    assert packages(top) - names(PROJECT["dependencies"]) == set()
    assert "pillow" in packages(top)


@pytest.mark.parametrize("folder", ["switchlora", "tests", "scripts", "examples"])
def test_whatever_is_imported_is_required_somewhere(folder):
    everywhere = [node for tree in sources(folder) for node in ast.walk(tree)]
    assert packages(everywhere) - names(all_lines()) == set()


def test_every_requirement_has_a_lower_bound():
    without = [line for line in all_lines() if ">=" not in line]
    assert without == []


def test_a_package_has_the_same_bounds_wherever_it_is_required():
    bounds = {}
    for line in all_lines():
        requirement = Requirement(line)
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def told(pattern, folders):
    """What a pattern finds in the texts that users meet."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*"))]
    texts = [path.read_text() for path in paths if path.suffix in (".py", ".md", ".yaml")]
    return {found for text in texts for found in re.findall(pattern, text)}


def test_an_extra_that_a_text_names_exists():
    extras = told(r"\.\[([\w,-]+)\]'", ["switchlora", "conf", "docs"])
    assert "slurm" in extras and extras - set(EXTRAS) == set()


def test_a_package_that_a_message_tells_to_install_is_in_an_extra():
    told_to_install = told(r"pip install ([a-z][\w-]*)(?![\w{-])", ["switchlora"])
    assert "wandb-workspaces" in told_to_install
    assert told_to_install - names(all_lines()) == set()


def test_the_oldest_packages_are_those_of_the_lower_bounds():
    pins = test_versions.lower_bounds()
    assert set(pins) >= {"omegaconf==2.3", "pillow==12.3"}
    assert len(pins) == len(PROJECT["dependencies"]) + len(EXTRAS["dev"])


def test_a_lower_bound_stands_among_other_bounds():
    assert test_versions.lower_bound(Requirement("some<3,>=1.2,!=1.4")) == "1.2"
    with pytest.raises(ValueError, match="some<3 has no lower bound"):
        test_versions.lower_bound(Requirement("some<3"))
