"""What is public: its names, signatures and types do not change by accident."""

import ast
import inspect
import os
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import switchlora

HERE = Path(__file__).parent
SNAPSHOT = HERE / "public_names.txt"
RENEW = "SWITCHLORA_PUBLIC=record pytest tests/test_public.py"
CALLBACK = "switchlora.integrations.transformers"
PLAIN = (bool, int, float, str, tuple, type(None))


def own_names(module):
    """The public names that a module makes itself."""
    found = []
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_"):
            found.append(name)
    return sorted(found)


def public():
    """(dotted name, object) of everything public."""
    for name in sorted(set(switchlora.__all__) - {"__version__"}):
        yield f"switchlora.{name}", getattr(switchlora, name)
    module = import_module(CALLBACK)
    for name in own_names(module):
        yield f"{CALLBACK}.{name}", getattr(module, name)


def members(thing):
    """The public methods, properties and attributes of a class that are no options of it."""
    if not inspect.isclass(thing):
        return []
    options = set(inspect.signature(thing).parameters)
    found = [name for name, value in vars(thing).items() if inspect.isroutine(value)]
    found += [name for name, value in vars(thing).items() if isinstance(value, property)]
    if "__init__" in vars(thing) and not is_dataclass(thing):
        found += re.findall(r"self\.(\w+)[^\n=(]* = ", inspect.getsource(thing.__init__))
    return sorted({name for name in found if not name.startswith("_")} - options)


def written(parameter):
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    default = parameter.default
    if default is parameter.empty:
        return text
    shown = default if isinstance(default, PLAIN) else getattr(default, "__name__", "...")
    return f"{text}={shown!r}" if isinstance(default, PLAIN) else f"{text}={shown}"


def signature(thing):
    parts = []
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in "".join(parts):
            parts.append("*")
        parts.append(written(parameter))
    return f"({', '.join(parts)})"


def lines():
    for name, thing in public():
        yield f"{name}{signature(thing)}"
        for member in members(thing):
            method = getattr(thing, member, None)
            yield f"    .{member}{signature(method) if inspect.isroutine(method) else ''}"


def test_public_names_and_signatures_are_those_of_the_snapshot():
    pytest.importorskip("transformers")
    found = "\n".join(lines()) + "\n"
    if os.environ.get("SWITCHLORA_PUBLIC") == "record":
        SNAPSHOT.write_text(found)
    assert found == SNAPSHOT.read_text(), f"a public name changed; if it is meant to: {RENEW}"


def test_public_signatures_say_their_types():
    pytest.importorskip("transformers")
    bare = []
    for name, thing in public():
        methods = [getattr(thing, member, None) for member in members(thing)]
        for function in (thing, *filter(inspect.isroutine, methods)):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name != "self" and parameter.annotation is parameter.empty:
                    bare.append(f"{name}: {function.__name__}: {parameter.name}")
    assert not bare


def test_public_names_are_known_to_type_checkers_and_listed_in_the_docs():
    tree = ast.parse(Path(switchlora.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body for alias in node.names}
    assert typed | {"__version__"} == set(switchlora.__all__)
    page = (HERE.parent / "docs/api.md").read_text().partition("\n## ")[0]
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed == typed
