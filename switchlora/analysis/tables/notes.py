"""The notes below a table: what its numbers mean, and what a reader must know about its rows."""

from collections.abc import Sequence

from switchlora.analysis.figures import run_labels
from switchlora.analysis.tables.systems import STEP, SYSTEMS
from switchlora.learner import WARMUP_UPDATES
from switchlora.storage import Record

SPREAD = (
    "Mean ± standard deviation over seeds (number of runs), also in the picture; of a single run "
    "its value, and quartiles over its updates in square brackets. Differences in points are "
    "paired by seed; the 95 % interval of their mean (Student's t) is in square brackets."
)
OVER_FULL = (
    "Over full training of the cost: val top1 minus that of full training with a schedule for the "
    "same FLOPs, by a line between its runs of different lengths; – where none is as short."
)
SWITCHING = (
    "At the switch: the last validation at or before its update; one at that very update is made "
    "by the switched model, whose function differs by switch.drift. Right after: the next one. "
    "Recovery: updates from the switch until a validation reaches the top1 at the switch again, 0 "
    "where the first one does; inf in CSV where none does."
)
TIMES = (
    "Images/s and seconds of an epoch are medians over updates, without evaluation and the first "
    f"{WARMUP_UPDATES} updates of a phase and after a resume (WARMUP_UPDATES in "
    "switchlora/learner/stopwatch.py)."
)
RATIOS = (
    "Peak memory: allocated on a GPU, resident on a CPU. Their ratios: "
    "the adapter phase over the last phase of the baseline."
)
SOURCE = (
    "PreLoRA, published: ViT-Large on ImageNet-1k. Trainable parameters, throughput (3x), time of "
    "an epoch (1.5x shorter) and memory (20 % less): abstract of arXiv 2509.21619. Top1: last "
    "epochs of five settings, one seed each, minus the baseline's 71.86 %, from the curves in "
    "github.com/Krishuthapa/PreLoRA; its spread is over settings, not seeds."
)
MEAN_EPOCH = "Epoch time ratio: the average over all epochs of a run, as published."
GENERAL = {"default": SWITCHING, "prelora": SOURCE, "systems": SYSTEMS}
OF_TIMES = {
    "default": (f"{TIMES} {RATIOS}",),
    "prelora": (f"{TIMES} {RATIOS}", MEAN_EPOCH),
    "systems": (STEP,),
}


def general_notes(preset: str, times: bool, has_curves: bool = False) -> list[str]:
    """Return notes on what the columns of a preset mean."""
    notes = [SPREAD, GENERAL[preset]]
    if has_curves and preset != "prelora":
        notes.append(OVER_FULL)
    if times:
        notes += OF_TIMES[preset]
    return notes


def unfinished_notes(records: Sequence[Record]) -> list[str]:
    """Return a note for each unfinished run, with its status. No row counts these runs."""
    names = run_labels([record.folder for record in records])
    notes = []
    for name, record in zip(names, records, strict=True):
        if not record.finished:
            notes.append(f"{name}: {status_of(record)}; not counted.")
    return sorted(notes)


def status_of(record: Record) -> str:
    """Return how far an unfinished run came."""
    if record.summary is None:
        return "no summary, since it goes on or was killed"
    status = record.summary["status"].split("; the last checkpoint")[0]
    return f"{status} at update {record.summary['num_updates']:,}"
