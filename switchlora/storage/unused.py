"""Leave no run folder behind in which nothing was computed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from switchlora.process import CheckFirst, is_primary

BEFORE_A_RUN = {".lock", ".hydra"}
"""what stands in the folder of a run before the run itself writes anything"""


@contextmanager
def unused_removed(folder: Path) -> Iterator[None]:
    """Remove ``folder`` when an error ends what is inside and nothing was written.

    A folder stays that was there before this process, or in which anything else lies.
    """
    is_new = CheckFirst.new_folder == folder.absolute() or not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and is_primary():
            with suppress(OSError):
                _remove_unused(folder)
        raise


def _remove_unused(folder: Path) -> None:
    if {path.name for path in folder.iterdir()} <= BEFORE_A_RUN:
        shutil.rmtree(folder)
