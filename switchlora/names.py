"""Names of modules: families, patterns, names that resemble each other; numbers with nouns."""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches


def family(name: str) -> str:
    """Return the part of a target's name that its siblings share.

    Siblings of other blocks differ in a number.

    >>> family("blocks.3.attn.qkv"), family("layers.0.blocks.1.mlp.fc1"), family("head")
    ('attn.qkv', 'mlp.fc1', 'head')
    """
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def matching(
    patterns: Sequence[str],
    names: Iterable[str],
    what: str,
    kind: str,
    match: Callable[[str, str], re.Match | None],
) -> list[str]:
    """Return those of ``names`` that ``match`` one of ``patterns``, in their order.

    ValueError for a pattern without a match. Its message calls a pattern ``what`` and a name
    ``kind``.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if match(pattern, name)]
        if not found:
            hint = near(pattern, [*names, *map(family, names)])
            raise ValueError(f"{what} '{pattern}' matches no {kind}; {hint}")
        matched.update(found)
    return [name for name in names if name in matched]


def near(name: str, candidates: Iterable[str]) -> str:
    """Return a hint with up to five of ``candidates`` that resemble ``name``.

    Five or fewer candidates are all listed.

    >>> near("qvk", ["attn.qkv", "attn.proj"])
    'near names: attn.proj, attn.qkv'
    >>> near("epoch", ["epochs", "seed", "ema", "name", "resume", "objectives"])
    'near names: epochs'
    """
    names = sorted(set(candidates))
    if len(names) > 5:
        names = get_close_matches(name, names, n=5, cutoff=0.4)
    return f"near names: {', '.join(names)}" if names else "no near name"


def some(names: Sequence[str], most: int = 1, between: str = ", ") -> str:
    """Return the first ``most`` names, and how many more there are.

    >>> some(["head", "fc1", "fc2"]), some(["head"])
    ('head and 2 more', 'head')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def counted(count: int, what: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "image"), counted(1200, "class")
    ('1 image', '1,200 classes')
    """
    ending = "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{ending * (count != 1)}"
