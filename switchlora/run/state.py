"""The state of a run that is neither weights nor configuration.

``TrainState`` is what the run needs to go on. ``Ledger`` is what it tells at its end.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from switchlora.switching import Phase, SwitchState


@dataclass
class TrainState(SwitchState):
    """Where the run is, and what its next decisions depend on."""

    epoch: int = 0
    position: int = 0
    """batches of the current epoch used so far, including those of skipped updates"""
    undecided: bool = True
    """whether the criterion has not yet been asked about the last measurement (or the start)"""
    full_parameters: list[str] = field(default_factory=list)
    """names of the parameters that train in the full phase"""
    skipped_in_a_row: int = 0
    """updates skipped since the last one that was applied"""
    best_top1: float = 0.0
    """best top1 on the validation split, in %"""
    best_update: int | None = None
    """number of updates when ``best_top1`` was reached"""


@dataclass
class Ledger:
    """The record of what happened, for the summary. No decision depends on it."""

    switch_epoch: float | None = None
    transitions: list[dict[str, Any]] = field(default_factory=list)
    """every change of the trained tensors: 'kind', 'num_updates', 'epoch', 'reason', counts"""
    segments: list[dict[str, Any]] = field(default_factory=list)
    """speed, memory and parameter counts of each stretch between two transitions"""
    phases: dict[Phase, dict[str, Any]] = field(default_factory=dict)
    """speed, memory and parameter counts of each phase that has ended"""
    skipped_updates: int = 0
    """updates skipped because the loss or the gradient was not finite"""
    skipped_averages: int = 0
    """updates that the weight average left out because a weight was not finite"""
    unmeasured: int = 0
    """measurements with a number that was not finite"""
    last_eval: dict[str, float] | None = None
    """metrics of the last evaluation on the validation split"""
    recorded: bool = False
    """whether memory and FLOPs have been recorded since the trained tensors last changed"""
    memory: dict[Phase, dict[str, dict[str, int | None]]] = field(default_factory=dict)
    """by phase, the bytes of each memory part after its first update: 'measured', 'predicted'"""
    flops: dict[Phase, int | None] = field(default_factory=dict)
    """by phase, the FLOPs of one update over all ranks; None where they are unknown"""
    train_flops: int | None = 0
    """FLOPs of all updates so far; None when the FLOPs of any update are unknown"""
    reused: dict[str, Any] | None = None
    """'folder', 'reused_updates' and 'reused_seconds' of a full phase taken from a trunk"""
    branched_from: str | None = None
    """the checkpoint of another run from which this run branched off"""

    def end_segment(self, phase: Phase, num_updates: int, figures: Mapping[str, Any]) -> None:
        """Store the ``figures`` of the segment that ends now, and add them to those of its phase.

        A second call for the same segment does nothing.
        """
        place = {"phase": str(phase), "until": num_updates}
        if self.segments and place.items() <= self.segments[-1].items():
            return
        costs = {"flops_per_update": self.flops.get(phase), "memory": self.memory.get(phase)}
        self.segments.append({**place, **figures, **costs})
        self.phases[phase] = _together(self.phases.get(phase), figures)

    def note_eval(self, metrics: dict[str, float], num_updates: int, kept: bool) -> None:
        """Store the metrics of an evaluation after ``num_updates`` updates.

        A segment that ended there gets the top1 too, if the model ``kept`` its function when the
        trained tensors changed: no update of the next segment was made yet.
        """
        self.last_eval = metrics
        if not kept or not self.segments or self.segments[-1]["until"] != num_updates:
            return
        ended = self.segments[-1]
        ended["val_top1"] = self.phases[Phase(ended["phase"])]["val_top1"] = metrics["top1"]

    def state_dict(self) -> dict[str, Any]:
        """Return the record as plain types, for a checkpoint."""
        plain = asdict(self)
        for name in ("phases", "memory", "flops"):
            plain[name] = {str(phase): value for phase, value in plain[name].items()}
        return plain

    def load_state_dict(self, plain: Mapping[str, Any]) -> None:
        """Set every field from ``plain``, which came from ``state_dict``."""
        for item in fields(self):
            setattr(self, item.name, plain[item.name])
        for name in ("phases", "memory", "flops"):
            by_phase = {Phase(phase): value for phase, value in plain[name].items()}
            setattr(self, name, by_phase)


def _together(earlier: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the combined figures of a phase that occurred before.

    'num_updates' and 'train_seconds' are summed; every other figure is the latest.
    """
    if earlier is None:
        return dict(figures)
    sums = {key: earlier[key] + figures[key] for key in ("num_updates", "train_seconds")}
    return {**figures, **sums}
