"""Leave no run folder behind in which nothing was computed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from switchlora.process import CheckFirst, is_primary, missing

BEFORE_A_RUN = {".lock", ".hydra"}
"""what stands in the folder of a run before the run itself writes anything"""


@contextmanager
def unused_removed(folder: Path) -> Iterator[None]:
    """Remove ``folder`` when an error ends what is inside and nothing was written.

    Folders above it go with it. One stays that was there before this process, or in which anything
    else lies.
    """
    folder = folder.absolute()
    known = CheckFirst.new_folders
    new = known if known[:1] == [folder] else missing(folder)
    try:
        yield
    except BaseException:
        if new and is_primary():
            with suppress(OSError):
                _remove_unused(*new)
        raise


def _remove_unused(folder: Path, *above: Path) -> None:
    if {path.name for path in folder.iterdir()} <= BEFORE_A_RUN:
        shutil.rmtree(folder)
        for parent in above:
            parent.rmdir()
