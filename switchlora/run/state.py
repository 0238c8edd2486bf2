"""What a run is in the middle of: counters, phase, history, what has been decided."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from switchlora.criteria import Verdict
from switchlora.monitor import LayerStats, Measurement
from switchlora.policy import Loss
from switchlora.switching import SwitchReport


class Phase(StrEnum):
    """Which parameters train."""

    FULL = "full"
    JOINT = "joint"
    """the weights of the targets and their factors together"""
    STAGED = "staged"
    """factors on some targets, the weights of the others"""
    ADAPTER = "adapter"


@dataclass
class TrainState:
    """The run's position and record; everything else is weights, moments or configuration."""

    num_updates: int = 0
    """optimizer updates made; the learning rate is a function of it"""
    epoch: int = 0
    position: int = 0
    """batches of the epoch that were taken, skipped ones included"""
    phase: Phase = Phase.FULL
    undecided: bool = True
    """whether the criterion has yet to be asked about the last measurement, or the start"""
    history: list[Measurement] = field(default_factory=list)
    verdict: Verdict | None = None
    """what the criterion said last"""
    switch_report: SwitchReport | None = None
    switch_update: int | None = None
    switch_epoch: float | None = None
    joint_until: int | None = None
    """updates made when the joint phase ends"""
    failed_switches: list[str] = field(default_factory=list)
    """reasons of the switches that were undone"""
    transitions: list[dict[str, Any]] = field(default_factory=list)
    """every change of the trained tensors: 'kind', 'num_updates', 'epoch', 'reason', counts"""
    segments: list[dict[str, Any]] = field(default_factory=list)
    """figures of what lay between the transitions"""
    last_stage: int | None = None
    """updates made at the last switch of any target"""
    taken_back: int = 0
    """switches that the guard took back"""
    forgotten: int = 0
    """measurements before the last switch that was taken back: the criterion does not see them"""
    full_parameters: list[str] = field(default_factory=list)
    """names of what trains in the full phase"""
    losses: list[Loss] = field(default_factory=list)
    """of windows and on the validation split, which the guard compares"""
    guarded_since: int = 0
    """updates made at the last switch, or act of the guard"""
    skipped_updates: int = 0
    """updates left out because loss or gradient was not finite"""
    skipped_in_a_row: int = 0
    last_eval: dict[str, float] | None = None
    best_top1: float = 0.0
    """on the validation split, in %"""
    best_update: int | None = None
    """updates made when ``best_top1`` was reached"""
    phases: dict[Phase, dict[str, Any]] = field(default_factory=dict)
    """figures of each phase that has ended"""
    recorded: bool = False
    """whether memory and FLOPs of the present trained tensors are known"""
    memory: dict[Phase, dict[str, dict[str, int | None]]] = field(default_factory=dict)
    """bytes after the first update of each phase by category, 'measured' and 'predicted'"""
    flops: dict[Phase, int | None] = field(default_factory=dict)
    """of one update of each phase over all ranks; None with torch.compile"""
    train_flops: int | None = 0
    """of all updates; None when those of any are unknown"""
    reused: dict[str, Any] | None = None
    """'folder', 'reused_updates' and 'reused_seconds' of the full phase that came from a trunk"""
    branched_from: str | None = None
    """checkpoint of another run that this one branched off from"""

    @property
    def fresh_history(self) -> list[Measurement]:
        """What the criterion may look at: all since the last switch that was taken back."""
        return self.history[self.forgotten :]

    def end_segment(self, figures: Mapping[str, Any]) -> None:
        """Note the ``figures`` of what ends here, once, and add them to those of its phase."""
        ended = self.segments[-1] if self.segments else {}
        if (ended.get("until"), ended.get("phase")) == (self.num_updates, str(self.phase)):
            return
        self.segments.append(
            {
                "phase": str(self.phase),
                "until": self.num_updates,
                **figures,
                "flops_per_update": self.flops.get(self.phase),
                "memory": self.memory.get(self.phase),
            }
        )
        self.phases[self.phase] = _together(self.phases.get(self.phase), figures)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        plain = asdict(self)
        plain["phase"] = str(self.phase)
        plain["phases"] = {str(phase): figures for phase, figures in self.phases.items()}
        plain["memory"] = {str(phase): found for phase, found in self.memory.items()}
        plain["flops"] = {str(phase): flops for phase, flops in self.flops.items()}
        plain["losses"] = [list(loss) for loss in self.losses]
        return plain

    def load_state_dict(self, plain: Mapping[str, Any]) -> None:
        """Become the state that ``state_dict`` came from."""
        for item in fields(self):
            setattr(self, item.name, plain[item.name])
        self.phase = Phase(plain["phase"])
        self.phases = {Phase(phase): figures for phase, figures in plain["phases"].items()}
        self.memory = {Phase(phase): found for phase, found in plain["memory"].items()}
        self.flops = {Phase(phase): flops for phase, flops in plain["flops"].items()}
        self.losses = [Loss(*loss) for loss in plain["losses"]]
        self.history = [_measurement(measured) for measured in plain["history"]]
        self.verdict = Verdict(**plain["verdict"]) if plain["verdict"] else None
        report = plain["switch_report"]
        self.switch_report = SwitchReport(**report) if report else None


def _together(earlier: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a phase that has come again: counts are summed, all else is the last."""
    if earlier is None:
        return dict(figures)
    sums = {key: earlier[key] + figures[key] for key in ("num_updates", "train_seconds")}
    return {**figures, **sums}


def _measurement(plain: Mapping[str, Any]) -> Measurement:
    layers = {name: LayerStats(**stats) for name, stats in plain["layers"].items()}
    return Measurement(**{**plain, "layers": layers})
