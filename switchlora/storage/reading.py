"""Read files of a run that may be damaged: JSON objects and YAML mappings."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError


class FileDamaged(ValueError):
    """A file of a run cannot be read; the message has the file, the line and what is wrong."""


def content_of(path: Path) -> bytes:
    """Return the bytes of a file; FileDamaged when the system cannot read it."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # it may have no end
            raise FileDamaged(f"{path} cannot be read: it is a pipe or a device")
        return path.read_bytes()
    except OSError as error:
        raise FileDamaged(f"{path} cannot be read: {error.strerror}") from error


def parse_json(content: bytes, path: Path, line: int = 1) -> dict[str, Any]:
    """Return the JSON object in ``content``, which begins on a ``line`` of the file ``path``.

    FileDamaged when it holds anything else.
    """
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise FileDamaged(f"{path} is damaged: {_reason(error, content, line)}") from error
    if not isinstance(found, dict):
        raise FileDamaged(f"{path} is damaged: line {line} holds no JSON object")
    return found


def parse_yaml(content: bytes, path: Path) -> dict[str, Any]:
    """Return the mapping in the ``content`` of a YAML file ``path`` that OmegaConf wrote.

    FileDamaged when it holds anything else, or when its last line has no end.
    """
    if content and not content.endswith(b"\n"):
        line = content.count(b"\n") + 1
        raise FileDamaged(f"{path} is damaged: line {line} has no end, the rest is missing")
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(StringIO(content.decode())))
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise FileDamaged(f"{path} is damaged: {_reason(error, content)}") from error
    if not isinstance(found, dict) or not found:
        raise FileDamaged(f"{path} is damaged: it holds no mapping")
    return found


def _reason(error: Exception, content: bytes, first_line: int = 1) -> str:
    """Return what is wrong with ``content``, with the number of the line where it is known."""
    if not content.strip():
        return f"line {first_line} is empty"
    if isinstance(error, UnicodeDecodeError):
        line = first_line + content.count(b"\n", 0, error.start)
        return f"line {line} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        return f"line {line} is no JSON: {error.msg} at column {error.colno}"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} is no YAML: {error.problem}"
    if isinstance(error, RecursionError):
        return f"line {first_line} is nested too deeply"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]
