"""When a model changes, and what is measured until then: for a run, and for any other loop."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, TypeVar

from torch import Tensor

from switchlora.adapters import Adapter, Target, adapted_modules, applied_ranks
from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed
from switchlora.monitor import Measurement, UpdateMonitor
from switchlora.policy import Decision, Loss, Refresh, Standing, SwitchPolicy
from switchlora.process import from_primary
from switchlora.switching import changes
from switchlora.switching.changes import Growth, SwitchReport
from switchlora.switching.plan import with_frozen_front
from switchlora.switching.transaction import L, Outcome, Scene

T = TypeVar("T", bound=Outcome)
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
    losses: list[Loss] = field(default_factory=list)
    """losses of windows ('train') and on the validation split ('val'); the guard compares them"""
    guarded_since: int = 0
    """number of updates at the last switch, or when the guard last found the adapter behind"""

    @property
    def fresh_history(self) -> list[Measurement]:
        """The measurements since the last return to full training; the criterion sees these."""
        return self.history[self.forgotten :]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each target that has switched."""
        return dict(self.switch_report.ranks) if self.switch_report is not None else {}

    @property
    def given_up(self) -> bool:
        """Whether the last ``TRIES`` failed changes failed for one reason, but for its numbers."""
        last = [re.sub(r"\d[\d.e+-]*", "", why) for why in self.failed_switches[-TRIES:]]
        return len(last) == TRIES and len(set(last)) == 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        losses = [list(loss) for loss in self.losses]
        return {**asdict(self), "phase": str(self.phase), "losses": losses}

    def load_state_dict(self, plain: Mapping[str, Any]) -> None:
        """Set every field from ``plain``, which came from ``state_dict``."""
        for item in fields(self):
            setattr(self, item.name, plain[item.name])
        self.phase = Phase(plain["phase"])
        self.losses = [Loss(*loss) for loss in plain["losses"]]
        self.history = [Measurement.from_plain(measured) for measured in plain["history"]]
        self.verdict = Verdict(**plain["verdict"]) if plain["verdict"] else None
        report = plain["switch_report"]
        self.switch_report = SwitchReport(**report) if report else None


class ChangeFailed(SwitchFailed):
    """A change failed and was undone; ``for_good`` when it is not tried again."""

    def __init__(self, what: str, reason: str, for_good: bool) -> None:
        super().__init__(reason)
        self.what, self.for_good = what, for_good


@dataclass
class Controller:
    """Says what is due by its ``policy``, makes that change, and takes it down in ``state``.

    A window of the ``monitor`` has ``window`` updates, but as many as the policy says between two
    restarts, or two looks at the ranks. ``updates_per_epoch`` is for policies that count epochs.

    A change works on a ``Scene``: a model, an optimizer, a precision. It returns what trains from
    then on, and what happened. ChangeFailed when all is as it was.
    """

    policy: SwitchPolicy
    monitor: UpdateMonitor
    state: SwitchState
    window: int
    updates_per_epoch: int | None = None

    @property
    def measures(self) -> bool:
        """Whether a target trains its whole weight until the criterion fires."""
        return self.state.phase in (Phase.FULL, Phase.STAGED)

    @property
    def joint_phase_over(self) -> bool:
        """Whether the joint phase has reached its last update."""
        until = self.state.joint_until
        return until is not None and self.state.num_updates >= until

    @property
    def restarts(self) -> bool:
        """Whether adapters are watched that restart at the end of the window."""
        cycles = self.state.phase is Phase.ADAPTER and self.policy.restart is not None
        return cycles and bool(self.monitor.targets) and not self.state.given_up

    @property
    def adapted_targets(self) -> dict[str, Target]:
        """The targets whose modules have an adapter now, by name."""
        adapted = adapted_modules(self.monitor.model)
        return {n: t for n, t in self.monitor.known.items() if t.module in adapted}

    def decide(self) -> Decision:
        """Ask the criterion. Return its verdict, and the targets that it or the stages choose."""
        state, policy = self.state, self.policy
        again = state.taken_back > 0
        state.verdict = from_primary(lambda: policy.decide(state.fresh_history, again))
        waiting, now = self.monitor.targets, state.num_updates
        chosen = policy.chosen(state.verdict, waiting, now, state.last_stage)
        return Decision(now, state.verdict, [] if state.given_up else chosen)

    def larger_ranks(self) -> dict[str, int]:
        """Return the ranks that have to grow by the policy's rule, as far as that saves."""
        rule, state = self.policy.growth, self.state
        if rule is None or state.phase is not Phase.ADAPTER or state.given_up:
            return {}
        if state.num_updates <= rule.earliest:
            return {}
        return from_primary(lambda: self._larger(rule.rank))

    def ranks_of_guard(self) -> dict[str, int]:
        """Return the ranks times the guard's ``growth``, as far as that saves."""
        guard = self.policy.guard
        assert guard is not None
        return self._larger(lambda adapter: guard.growth * len(adapter.A))

    def note_loss(self, split: str, value: float) -> None:
        """Store a loss for the guard: of a window ('train') or of validation ('val')."""
        state = self.state
        state.losses.append(Loss(state.num_updates, split, str(state.phase), value))

    def behind(self) -> Standing | None:
        """Return how far the adapter is behind full training, where the guard finds it so.

        The guard then looks at later losses only.
        """
        guard, state = self.policy.guard, self.state
        if guard is None or state.phase in (Phase.FULL, Phase.JOINT):
            return None
        standing = from_primary(lambda: guard(state.losses, state.guarded_since))
        if not standing.behind:
            return None
        state.guarded_since = state.num_updates
        return standing

    @property
    def guard_acts(self) -> bool:
        """Whether the guard may still do more than tell."""
        guard = self.policy.guard
        return guard is not None and self.state.taken_back < guard.most

    def phase_after(self, chosen: Collection[str]) -> Phase:
        """Return the phase that follows when the ``chosen`` targets switch."""
        if self.policy.joint_epochs:
            return Phase.JOINT
        return Phase.ADAPTER if len(chosen) == len(self.monitor.targets) else Phase.STAGED

    def switch(
        self, scene: Scene[L], decision: Decision, inputs: Tensor | None = None
    ) -> tuple[L, SwitchReport]:
        """Put adapters on the targets that were chosen; ``inputs`` are those of ``switch``.

        Then the monitor watches those that wait for a later stage.
        """
        state, now, chosen = self.state, self.state.num_updates, decision.chosen
        phase, earlier = self.phase_after(chosen), state.switch_report
        policy = with_frozen_front(
            *(scene.learner.model, self.policy, self.monitor.known),
            *(decision.verdict.margins, chosen, lambda model: scene.forward(model, scene.probe)),
        )
        place = replace(scene, policy=policy)
        learner, report = self._make(
            "switch", changes.switch, place, state.fresh_history, chosen, inputs
        )
        state.switch_report = report if earlier is None else report.after(earlier)
        state.switch_update = now if earlier is None else state.switch_update
        state.phase, state.last_stage, state.guarded_since = phase, now, now
        if phase is Phase.JOINT:
            state.joint_until = now + self._updates(self.policy.joint_epochs)
        self.watch(report.waiting)
        return learner, report

    def end_joint_phase(self, scene: Scene[L]) -> tuple[L, Outcome]:
        """Freeze the targets' weights. If that fails, they go on training with their factors."""
        state = self.state
        state.joint_until = None
        found = self._make("end of the joint phase", changes.settle, scene, state.ranks)
        state.phase = Phase.ADAPTER
        self.watch()
        return found

    def restart(self, scene: Scene[L]) -> tuple[L, Outcome]:
        """Begin new adapters in place of those that are there, or refresh the bases of cores."""
        state = self.state
        if not isinstance(self.policy.restart, Refresh):
            return self._make("restart", changes.restart, scene, state.num_updates)
        assert state.last_stage is not None
        number = max(1, round((state.num_updates - state.last_stage) / self.monitor.window))
        found = self._make("refresh", changes.refresh, scene, number)
        self._note_ranks(applied_ranks(self.monitor.model, self.monitor.known, state.ranks))
        return found

    def grow(
        self,
        scene: Scene[L],
        gradients: Callable[[], Mapping[str, Tensor]],
        ranks: Mapping[str, int],
    ) -> tuple[L, Growth]:
        """Raise the ranks to ``ranks``, by target."""
        found = self._make("growth of the ranks", changes.grow, scene, gradients, ranks)
        self._note_ranks(found[1].ranks)
        return found

    def take_back(self, scene: Scene[L], trained: Iterable[str]) -> tuple[L, Outcome]:
        """Merge the adapters and train the ``trained`` parameters of the full phase again.

        The criterion then sees only measurements made from now on.
        """
        state = self.state
        found = self._make("return to full training", changes.take_back, scene, trained)
        state.phase, state.taken_back = Phase.FULL, state.taken_back + 1
        state.switch_report = state.switch_update = state.joint_until = state.last_stage = None
        state.forgotten = len(state.history)
        self.watch(self.monitor.known)
        return found

    def watch(self, waiting: Collection[str] = ()) -> None:
        """Let the monitor watch, in a new window, only what is still to be measured.

        - In the adapter phase of a policy with restarts: the targets with an adapter.
        - Otherwise: the ``waiting`` targets, which may switch later.
        """
        cycles = self.state.phase is Phase.ADAPTER and self.policy.restart is not None
        watched = (cycles and self.adapted_targets) or waiting
        self.monitor.watch(watched, self.state.num_updates)
        self.monitor.window = self._length()

    def watch_as_configured(self) -> None:
        """Let the monitor watch what this policy wants, after a checkpoint made by another.

        That may have had another window, or restarts where this one has none.
        """
        self.monitor.window = self._length()
        cycles = self.policy.restart is not None
        if self.state.phase is Phase.ADAPTER and cycles != bool(self.monitor.targets):
            self.watch()

    def _larger(self, wanted: Callable[[Adapter], int]) -> dict[str, int]:
        """Return the ``wanted`` ranks that are above those of now, as far as factors save."""
        return changes.larger_ranks(self.monitor.model, self.monitor.known, wanted)

    def _length(self) -> int:
        """Return the updates of a window."""
        restarts, growth = self.policy.restart, self.policy.growth
        if self.state.phase is Phase.ADAPTER and growth is not None:
            return growth.every_updates
        if self.state.phase is Phase.ADAPTER and restarts is not None and self.monitor.targets:
            return self._updates(restarts.every_epochs)
        return self.window

    def _updates(self, epochs: float) -> int:
        return max(1, round(epochs * (self.updates_per_epoch or 1)))

    def _note_ranks(self, changed: Mapping[str, int]) -> None:
        """Take down the ranks of targets that now have others than at the switch."""
        state = self.state
        assert state.switch_report is not None
        state.switch_report = replace(state.switch_report, ranks={**state.ranks, **changed})

    def _make(self, what: str, change: Callable[..., tuple[L, T]], *given: Any) -> tuple[L, T]:
        """Return what ``change`` returns of what is ``given``; take it down when it fails."""
        state = self.state
        try:
            learner, outcome = change(*given)
        except SwitchFailed as failure:
            state.failed_switches.append(f"{what}: {failure}")
            raise ChangeFailed(what, str(failure), state.given_up) from failure
        self.monitor.model = learner.model
        return learner, outcome
