"""The table of systems: one row per method, with accuracy and cost relative to full training."""

from collections.abc import Mapping, Sequence
from typing import Any

from switchlora.analysis.tables.baseline import Comparison, against, ratio, ungrouped_ratios
from switchlora.analysis.tables.columns import (
    IMAGES,
    MIB,
    Column,
    cost_flops,
    held,
    of_last_phase,
    test_top1,
    trainable,
    trainable_share,
    val_top1,
)
from switchlora.learner import WARMUP_UPDATES
from switchlora.storage import Record

SYSTEMS = (
    "Trained: parameters that train at the end of the run, and their share of the model before "
    "the switch. Weights held: bytes of all weights in the last phase, frozen ones and factors "
    "included, over the baseline's; below 1 where factors stand instead of weights. Optimizer "
    "state: what the optimizer holds, measured after an update of the last phase. Memory: bytes "
    "of all that training holds on its device, measured after an update of the last phase, over "
    "the baseline's. Switch: the first one. Changes of the trained tensors: switches, stages, "
    "restarts, what the guard did."
)
STEP = (
    "Step ratio: median time of an update in the last phase, over the baseline's, without "
    f"evaluation and the first {WARMUP_UPDATES} updates of a phase and after a resume "
    "(WARMUP_UPDATES in switchlora/learner/stopwatch.py); below 1 it is faster."
)
SWITCHES = ("switch", "stage")


def systems_columns(comparison: Comparison) -> list[Column]:
    """Return the columns of the table of systems, all in one part."""
    references = comparison.references
    ratios = ungrouped_ratios(comparison)
    images = of_last_phase(IMAGES)
    step = against(references, images, images, lambda mine, theirs: theirs / mine)
    weights = ratio(references, held("parameters"))
    memory = ratio(references, held("total"))
    state = held("optimizer_state", 1 / MIB)
    return [
        Column("val_top1", "val top1", "%", val_top1, 2),
        Column("test_top1", "test top1", "%", test_top1, 2),
        ratios["top1_difference"],
        *([ratios["over_full"]] if comparison.curves else []),
        Column("trainable", "trained", "parameters", trainable, 0),
        Column("trainable_share", "trained", "%", trainable_share, 1),
        Column("weights_ratio", "weights held", "", weights, 2),
        Column("optimizer_state", "optimizer state", "MiB", state, 2),
        Column("step_ratio", "step ratio", "", step, 2, timed=True),
        Column("held_ratio", "memory ratio", "", memory, 2),
        Column("cost_flops", "training cost", "FLOPs", cost_flops, "{:.4g}".format),
        ratios["cost_ratio"],
        Column("switch_epoch", "switch", "epoch", switch_epoch, 1),
        Column("changes", "changes", "", count_changes, 0),
    ]


def switch_epoch(record: Record) -> float | None:
    """Return the epoch of the first switch, even when it was taken back later."""
    for change in transitions(record):
        if change["kind"] in SWITCHES:
            return change["epoch"]
    return _switch(record).get("epoch")


def count_changes(record: Record) -> int | None:
    """Return how often the trained tensors changed, or None when the run has no record of it."""
    return len(transitions(record)) if "transitions" in record.result else None


def transitions(record: Record) -> Sequence[Mapping[str, Any]]:
    """Return the changes of the trained tensors, in order; none for a run without a summary."""
    return (record.summary or {}).get("transitions") or ()


def has_switched(record: Record) -> bool:
    """Return whether the run ever switched, even when the switch was taken back later."""
    made = any(change["kind"] in SWITCHES for change in transitions(record))
    return made or bool(_switch(record)["fired"])


def taken_back(record: Record) -> bool:
    """Return whether the guard took a switch back."""
    return any(change["kind"] == "take_back" for change in transitions(record))


def waits(record: Record) -> bool:
    """Return whether some targets train in full to the end of a run that switched."""
    return bool(_switch(record).get("waiting"))


def _switch(record: Record) -> Mapping[str, Any]:
    return record.result["switch"]
