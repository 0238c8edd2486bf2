"""Look at the data before the first update: a hash of each split, test images that are in train.

One line says how much data there is, and what test and validation share with training. Where test
shares something, ``data.leakage`` says whether that is a warning, or no start; or nobody looks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from switchlora.data import Contents, Data, Shared, comparable, contents_of, shared_items
from switchlora.process import distributed
from switchlora.storage import write_whole

FILE = "data.json"
WARN, REFUSE, OFF = "warn", "refuse", "off"
SHOWN = 3
"""shared items that are named"""
COMMAND = "switchlora-runs data"


@dataclass(frozen=True)
class DataFacts:
    """What ``summary.json`` says of the data, and what was said at the start."""

    sha256: dict[str, str]
    """by split"""
    sha256_of: dict[str, str]
    """by split, what the hash is made of: pixels, files, text, or a sample"""
    leakage: dict[str, int] | None
    """such as 'test_in_train', how many; None where it was not looked for"""
    digest: str
    """of the data, as checkpoints keep it"""
    lines: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    """a line on each split that test shares something with"""

    def summary(self) -> dict[str, Any]:
        """Return the part of ``summary.json``."""
        return {"sha256": self.sha256, "sha256_of": self.sha256_of, "leakage": self.leakage}


def look_at_data(data: Data, leakage: str, before: Path | None) -> DataFacts:
    """Return the facts of the data on all ranks; the primary rank reads them.

    ``before`` is the folder of a run that goes on: what was found there is not searched for again.
    ValueError, with 'refuse', for test images that are in train or val.
    """

    def look() -> DataFacts:
        found = known_facts(before, data.digest(), leakage) if before is not None else None
        if found is None:
            found = facts_of(data, leakage)
        refuse_leaks(found, leakage)
        return found

    return distributed.from_primary(look)


def refuse_leaks(facts: DataFacts, leakage: str) -> None:
    """Raise ValueError for a leak, or for data that were not compared, where both are refused."""
    if leakage != REFUSE:
        return
    if facts.leakage is None:
        raise ValueError(
            "data.leakage=refuse, but the splits cannot be compared: they are read in different "
            "ways; give data.leakage=warn"
        )
    if facts.leaks:
        more = f"; and {len(facts.leaks) - 1} more such line" if len(facts.leaks) > 1 else ""
        raise ValueError(
            f"data.leakage=refuse: {facts.leaks[0]}{more}; take them out of one of both "
            f"({COMMAND} shows all), or give data.leakage=warn"
        )


def known_facts(folder: Path, digest: str, leakage: str) -> DataFacts | None:
    """Return what an earlier start found in the same data; None where it did not look for it."""
    try:
        facts = DataFacts(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    looked = facts.leakage is not None or leakage == OFF
    return facts if facts.digest == digest and looked else None


def keep_facts(facts: DataFacts, folder: Path) -> None:
    """Write the facts where a run that goes on finds them. Only the primary rank does."""
    if distributed.is_primary():
        write_whole(folder / FILE, json.dumps(asdict(facts), indent=2) + "\n")


def facts_of(data: Data, leakage: str) -> DataFacts:
    """Return hashes and leaks of the data, and the lines that tell them."""
    contents = contents_of(data, thorough=leakage == REFUSE)
    counts: dict[str, int] | None = None
    leaks: list[str] = []
    others: list[str] = []
    if leakage != OFF and comparable(contents):
        counts = {}
        named = {each.split: each for each in contents}
        for shared in shared_items(contents):
            counts[f"{shared.split}_in_{shared.inside}"] = len(shared.pairs)
            if shared.pairs:
                lines = leaks if shared.split == "test" else others
                lines.append(leak_line(named, shared))
    line = f"data: {sizes_line(data, contents)}; {leakage_line(contents, counts, leakage)}"
    return DataFacts(
        sha256={each.split: each.sha256 for each in contents},
        sha256_of={each.split: each.of for each in contents},
        leakage=counts,
        digest=data.digest(),
        lines=[line, *(f"warning: {each}" for each in (*leaks, *others))],
        leaks=leaks,
    )


def sizes_line(data: Data, contents: Sequence[Contents]) -> str:
    """Return how many items each split has, such as '5,000 train, 500 val, 1,000 test images'."""
    unit = "windows" if contents[0].unit == "passages" else contents[0].unit
    sizes = [
        f"{len(view):,} {each.split}" for each, view in zip(contents, data.views, strict=True)
    ]
    return f"{', '.join(sizes)} {unit}"


def leakage_line(
    contents: Sequence[Contents], counts: Mapping[str, int] | None, leakage: str
) -> str:
    """Return what test and val share with train; or that nobody has looked."""
    if leakage == OFF:
        return "nobody looks for test images in train (data.leakage=off)"
    if counts is None:
        return f"too many to look for test images in train at each start: {COMMAND} does"
    unit = contents[0].unit
    in_test = counts["test_in_train"]
    in_val = counts["val_in_train"]
    return f"{in_test:,} test {unit} and {in_val:,} val {unit} are in train"


def leak_line(contents: Mapping[str, Contents], shared: Shared) -> str:
    """Return a line that names some of the items which two splits share."""
    one, other = contents[shared.split], contents[shared.inside]
    count, total = len(shared.pairs), len(one.digests)
    named = [f"{one.name(a)} = {other.name(b)}" for a, b in shared.pairs[:SHOWN]]
    more = f" and {count - SHOWN:,} more" if count > SHOWN else ""
    verb = "is" if count == 1 else "are"
    why = ""
    if shared.split == "val" and one.unit == "images":
        why = " (val is cut from the training set, which has them more than once)"
    return (
        f"{count:,} of {total:,} {one.split} {one.unit} {verb} in {other.split} too{why}: "
        f"{'; '.join(named)}{more}"
    )
