"""How Sphinx makes HTML of this folder; ``make docs`` calls it."""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

from switchlora import __version__

project = "switchlora"
author = "the switchlora authors"
project_copyright = f"{author}, MIT licence"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"switchlora {release}"
myst_heading_anchors = 3
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
toc_object_entries = False

DOCS = Path(__file__).resolve().parent
EXPERIMENTS = DOCS.parent / "experiments/README.md"
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)")
LITERAL = re.compile(r"(``.*?``)", re.DOTALL)


def setup(app: Sphinx) -> None:
    """Let links lead out of this folder, and docstrings be plain text."""
    app.connect("source-read", lead_outside)
    app.connect("autodoc-process-docstring", as_plain_text, priority=400)  # before napoleon


def lead_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files outside this folder into what HTML can hold.

    They are written as paths, so that they lead somewhere in a checkout too. The page
    'experiments' gets the text of experiments/README.md.
    """
    folder = (DOCS / docname).parent
    base = folder
    if docname == "experiments":
        base = EXPERIMENTS.parent
        source[0] = EXPERIMENTS.read_text()
    source[0] = LINK.sub(lambda found: relinked(found, base, folder), source[0])


def relinked(found: re.Match, base: Path, folder: Path) -> str:
    """A link from a text in ``base`` as its page in ``folder`` needs it.

    It leads to a page, a picture or a copy of its file. A link to a folder becomes its words.
    """
    mark, text, target = found.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return found[0]
    file = (base / path).resolve()
    if not file.exists():
        getLogger(__name__).warning("%s leads nowhere", found[0])
    if file == EXPERIMENTS:
        file = DOCS / "experiments.md"
    here = os.path.relpath(file, folder)
    if mark or DOCS in file.parents:
        return f"{mark}[{text}]({here}{anchor and f'#{anchor}'})"
    words = text.replace("`", "")
    return f"{{download}}`{words} <{here}>`" if file.is_file() else text


def as_plain_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Escape what reStructuredText would read as markup, outside of ``literals`` and examples."""
    parts = LITERAL.split("\n".join(lines))
    plain = [p if p.startswith("``") else re.sub(r"([\\*|`_])", r"\\\1", p) for p in parts]
    escaped = "".join(plain).split("\n")
    in_example = False
    for number, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        lines[number] = line if in_example else escaped[number]
