"""When a model changes, and what is measured until then: for a run, and for any other loop."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from switchlora.adapters import Target, adapted_modules, applied_ranks
from switchlora.errors import SwitchFailed
from switchlora.monitor import UpdateMonitor
from switchlora.policy import Decision, Refresh, SwitchPolicy
from switchlora.process import from_primary
from switchlora.switching.changes import (
    Growth,
    SwitchReport,
    grow,
    larger_ranks,
    refresh,
    restart,
    settle,
    switch,
    take_back,
)
from switchlora.switching.plan import with_frozen_front
from switchlora.switching.state import Phase, SwitchState
from switchlora.switching.transaction import L, Outcome, Scene

T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class Failed:
    """A change that failed and was undone; ``for_good`` when it is not tried again."""

    what: str
    reason: str
    for_good: bool


@dataclass
class Controller:
    """Says what is due by its ``policy``, makes that change, and takes it down in ``state``.

    A window of the ``monitor`` has ``window`` updates, but as many as the policy says between two
    restarts, or two looks at the ranks. ``updates_per_epoch`` is for policies that count epochs.

    A change works on a ``Scene``: a model, an optimizer, a precision. It returns what trains from
    then on, and what happened; or Failed, after which all is as it was.
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
    def window_complete(self) -> bool:
        """Whether the monitor's window of updates is complete."""
        return self.monitor.due(self.state.num_updates)

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
    def may_change(self) -> bool:
        """Whether the policy has a further change of the model."""
        later = self.policy.restart or self.policy.growth or self.state.joint_until is not None
        return self.measures or bool(later)

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
        """Return the ranks that have to grow by the policy's rule (arXiv 2306.11250)."""
        rule, state, monitor = self.policy.growth, self.state, self.monitor
        if rule is None or state.phase is not Phase.ADAPTER or state.given_up:
            return {}
        if state.num_updates <= rule.earliest:
            return {}
        return from_primary(lambda: larger_ranks(monitor.model, monitor.known, rule))

    def phase_after(self, chosen: Collection[str]) -> Phase:
        """Return the phase that follows when the ``chosen`` targets switch."""
        if self.policy.joint_epochs:
            return Phase.JOINT
        return Phase.ADAPTER if len(chosen) == len(self.monitor.targets) else Phase.STAGED

    def switch(
        self, scene: Scene[L], decision: Decision, inputs: Tensor | None = None
    ) -> tuple[L, SwitchReport] | Failed:
        """Put adapters on the targets that ``decision`` chose; ``inputs`` are those of ``switch``.

        Then the monitor watches those that wait for a later stage.
        """
        state, chosen = self.state, decision.chosen
        phase = self.phase_after(chosen)
        policy = with_frozen_front(
            *(scene.learner.model, self.policy, self.monitor.known),
            *(decision.verdict.margins, chosen, lambda model: scene.forward(model, scene.probe)),
        )
        place = replace(scene, policy=policy)
        found = self._try("switch", lambda: switch(place, state.fresh_history, chosen, inputs))
        if isinstance(found, Failed):
            return found
        _, report = found
        now, earlier = state.num_updates, state.switch_report
        state.switch_report = report if earlier is None else report.after(earlier)
        state.switch_update = now if earlier is None else state.switch_update
        state.phase, state.last_stage = phase, now
        if phase is Phase.JOINT:
            state.joint_until = now + self._updates(self.policy.joint_epochs)
        self.watch(report.waiting)
        return found

    def end_joint_phase(self, scene: Scene[L]) -> tuple[L, Outcome] | Failed:
        """Freeze the targets' weights. If that fails, they go on training with their factors."""
        ranks = self.state.ranks
        found = self._try("end of the joint phase", lambda: settle(scene, ranks))
        self.state.joint_until = None
        if not isinstance(found, Failed):
            self.state.phase = Phase.ADAPTER
            self.watch()
        return found

    def restart(self, scene: Scene[L]) -> tuple[L, Outcome] | Failed:
        """Begin new adapters in place of those that are there, or refresh the bases of cores."""
        state = self.state
        if not isinstance(self.policy.restart, Refresh):
            return self._try("restart", lambda: restart(scene, state.num_updates))
        assert state.last_stage is not None
        number = max(1, round((state.num_updates - state.last_stage) / self.monitor.window))
        found = self._try("refresh", lambda: refresh(scene, number))
        if not isinstance(found, Failed):
            self._note_ranks(applied_ranks(self.monitor.model, self.monitor.known, state.ranks))
        return found

    def grow(
        self,
        scene: Scene[L],
        gradients: Callable[[], Mapping[str, Tensor]],
        ranks: Mapping[str, int] | None = None,
        growth: int = 1,
    ) -> tuple[L, Growth] | Failed:
        """Raise the ranks to ``ranks``, or multiply them by ``growth``, as ``grow`` does."""
        found = self._try("growth of the ranks", lambda: grow(scene, gradients, growth, ranks))
        if not isinstance(found, Failed):
            self._note_ranks(found[1].ranks)
        return found

    def take_back(self, scene: Scene[L], trained: Iterable[str]) -> tuple[L, Outcome] | Failed:
        """Merge the adapters and train the ``trained`` parameters of the full phase again.

        The criterion then sees only measurements made from now on.
        """
        state = self.state
        found = self._try("return to full training", lambda: take_back(scene, trained))
        if isinstance(found, Failed):
            return found
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

    def _try(self, what: str, change: Callable[[], tuple[L, T]]) -> tuple[L, T] | Failed:
        """Make a ``change`` and return what it returns; take it down when it failed."""
        state = self.state
        try:
            learner, outcome = change()
        except SwitchFailed as failure:
            state.failed_switches.append(f"{what}: {failure}")
            return Failed(what, str(failure), state.given_up)
        self.monitor.model = learner.model
        return learner, outcome
