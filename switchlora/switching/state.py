"""Where a training stands between full weights and adapters."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from switchlora.criteria import Verdict
from switchlora.monitor import Measurement
from switchlora.switching.changes import SwitchReport

TRIES = 3
"""after this many failures in a row for the same reason, no further change is tried"""


class Phase(StrEnum):
    """The phase of a run: which parameters train."""

    FULL = "full"
    JOINT = "joint"
    """the targets' weights and their factors train together"""
    STAGED = "staged"
    """some targets train their factors, the others still their weights"""
    ADAPTER = "adapter"


@dataclass
class SwitchState:
    """What the next change of the model depends on."""

    num_updates: int = 0
    """optimizer updates made so far"""
    phase: Phase = Phase.FULL
    history: list[Measurement] = field(default_factory=list)
    verdict: Verdict | None = None
    """the criterion's last answer"""
    switch_report: SwitchReport | None = None
    """the report of the switch; of all its stages so far, with the ranks of now"""
    switch_update: int | None = None
    """number of updates at the switch, or at its first stage"""
    joint_until: int | None = None
    """number of updates at which the joint phase ends; None outside a joint phase"""
    failed_switches: list[str] = field(default_factory=list)
    """reasons of the changes that failed and were undone, one string each"""
    last_stage: int | None = None
    """number of updates at the last switch of any target"""
    taken_back: int = 0
    """number of times the guard returned the run to full training"""
    forgotten: int = 0
    """number of leading ``history`` entries that the criterion no longer sees; a return to full
    training sets it"""

    @property
    def fresh_history(self) -> list[Measurement]:
        """The measurements that the criterion sees: those since the last return to full training.

        Without such a return it sees all of ``history``.
        """
        return self.history[self.forgotten :]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each target that has switched."""
        return dict(self.switch_report.ranks) if self.switch_report is not None else {}

    @property
    def given_up(self) -> bool:
        """Whether the last ``TRIES`` failed changes all failed for the same reason."""
        last = self.failed_switches[-TRIES:]
        return len(last) == TRIES and len(set(last)) == 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {**asdict(self), "phase": str(self.phase)}

    def load_state_dict(self, plain: Mapping[str, Any]) -> None:
        """Set every field from ``plain``, which came from ``state_dict``."""
        for item in fields(self):
            setattr(self, item.name, plain[item.name])
        self.phase = Phase(plain["phase"])
        self.history = [Measurement.from_plain(measured) for measured in plain["history"]]
        self.verdict = Verdict(**plain["verdict"]) if plain["verdict"] else None
        report = plain["switch_report"]
        self.switch_report = SwitchReport(**report) if report else None
