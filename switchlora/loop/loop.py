"""``LowRankSwitch``: measure, decide and switch inside a training loop that is not ours."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlora.adapters import (
    DEFAULT_TARGETS,
    adapted_modules,
    adapter_layout,
    check_adapters_work,
    count_parameters,
    inject_empty,
    merge,
    train_only,
)
from switchlora.criteria import SwitchCriterion, Verdict, never
from switchlora.errors import NothingMeasured, SwitchFailed, check_range
from switchlora.initializers import AdapterInit, update_directions
from switchlora.learner import FactorRates
from switchlora.loop.arguments import (
    as_arguments,
    check_goes_with_a_loop,
    check_optional,
    check_parts,
    check_whole,
    named_as_arguments,
    policy_of,
)
from switchlora.loop.counter import UpdateCounter
from switchlora.loop.gradients import WeightGradients
from switchlora.loop.groups import (
    FactorGroup,
    Regrouped,
    follow,
    home_of_weights,
    names_of,
    regrouped,
)
from switchlora.loop.inputs import FirstInputs, Logits
from switchlora.loop.measure import History, WeightUpdateMonitor
from switchlora.loop.ramp import Ramp
from switchlora.loop.schedulers import Tell, is_timms, prepared
from switchlora.models import RESIDUAL
from switchlora.policy import InRank, SwitchPolicy
from switchlora.process import from_primary, together
from switchlora.ranks import RankPolicy
from switchlora.storage import save_adapter
from switchlora.switching import (
    Outcome,
    Scene,
    SwitchReport,
    grow,
    larger_ranks,
    rehearse,
    restart,
    settle,
    switch,
    with_frozen_front,
)

T = TypeVar("T", bound=Outcome)
TRIES = 3
"""after this many failed changes no further one is tried"""
LONGEST_RAMP = 20


@dataclass
class Held:
    """The model and the optimizer of a loop, as a change of the model wants them."""

    model: nn.Module
    optimizer: Optimizer
    precision: str = "fp32"

    def plain(self) -> nn.Module:
        """Return the model, which is plain."""
        return self.model

    def put_back(self) -> None:
        """Do nothing: what the loop set up, the switch has not touched."""


class LowRankSwitch:
    """Turns full training into the training of a low-rank adapter, when a criterion says so.

    Call ``step`` after each update of the optimizer, or after each micro-batch: what counts are
    the updates that the optimizer made, without those that a GradScaler skipped. ``step`` measures
    the targets every ``window`` updates and asks the criterion. When that fires, adapters are put
    on the targets, and the same optimizer trains them: what is frozen leaves its groups, factors
    come as new groups, and the schedulers are told. All of it happens, or nothing.

    The model changes again where the policy says so: at each of its ``stages``, at the end of its
    joint phase, at each ``restart``, and where ranks grow by its ``growth``. ``step`` tells of
    each, since a wrapper or an average of the model has to be made anew.

    With several processes each of them calls ``step``. The first one decides for all.

    - ``optimizer``: any of torch's, or one with its interface.
    - ``schedulers``: those that set its learning rates, torch's or timm's. A function in the place
      of one is called with the new groups, to tell a scheduler of another kind.
    - ``target_modules``: regular expressions for the ends of the names of linears, such as
      ['q_proj', 'fc1'], or 'all-linear': all but the model's last one.
    - ``rank``: a number; a share of all parameters, such as 0.2, that trains on; or a policy of
      ``switchlora.ranks``.
    - ``updates_per_epoch``: needed by criteria that count epochs, ``joint_epochs`` and
      ``restart``.
    - ``forward(model, batch)`` returns the logits for the check that the switch moves none. By
      default that is the first tensor that the model returns. The batch is the first that it got.
    - ``on_switch`` is called with the report, after the switch; with that of each stage.
    - ``factor_lr``: learning rate of factors, relative to that of the weights: 'matched' or a
      number. ``factor_weight_decay`` is theirs alone.
    - ``ramp_updates``: updates after a change over which all learning rates rise again. None: 20,
      but none as long as a target waits for its stage. A joint phase begins without.
    - further names are those of ``SwitchPolicy``: ``keep``, ``earliest``, ``stages`` ...

    ValueError for arguments that cannot work: criterion, ranks and start are tried once on an
    invented measurement. ValueError also for a model that is wrapped; for a scheduler of unknown
    kind; for a policy that needs the loss function or the recipe of a run; at the first ``step``,
    for targets on which an adapter would not do what its weight does.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedulers: Any = (),
        *,
        target_modules: str | Sequence[str] = DEFAULT_TARGETS,
        criterion: SwitchCriterion | None = None,
        rank: int | float | RankPolicy = 0.2,
        window: int = 100,
        init: AdapterInit = update_directions,
        updates_per_epoch: int | None = None,
        forward: Logits | None = None,
        on_switch: Callable[[SwitchReport], None] | None = None,
        factor_lr: float | str = "matched",
        factor_weight_decay: float = 0.0,
        ramp_updates: int | None = None,
        **policy: Any,
    ) -> None:
        check_parts(model, getattr(optimizer, "optimizer", optimizer))
        if ramp_updates is not None:
            check_whole("ramp_updates", ramp_updates, 0)
        check_range("factor_weight_decay", factor_weight_decay, 0)
        check_optional(forward=forward, on_switch=on_switch)
        self.watch = WeightUpdateMonitor(
            *(model, target_modules, window, updates_per_epoch), policy.get("split_qkv", False)
        )
        self.model = self.watch.model
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        listed = schedulers if isinstance(schedulers, Sequence) else [schedulers]
        self.schedulers = [scheduler for scheduler in listed if scheduler is not None]
        with named_as_arguments():
            made = policy_of(criterion, rank, init, policy)
            self.policy = replace(made, targets=self.watch.patterns)
            check_goes_with_a_loop(self.policy, updates_per_epoch)
        self.rates = FactorRates(factor_lr)
        self.factor_weight_decay = factor_weight_decay
        self.ramp_updates = ramp_updates
        self.on_switch = on_switch
        self.verdict: Verdict | None = None
        self.report: SwitchReport | None = None
        self.switched_at: int | None = None
        self.ranks: dict[str, int] = {}
        """the rank of each target that has switched"""
        self.failures: list[str] = []
        self._last_stage: int | None = None
        self._joint_until: float | None = None
        self._larger: dict[str, int] = {}
        """the ranks that grow after the next update"""
        self._gradients = WeightGradients(self.model, {})
        self._ramp: Ramp | None = None
        self._groups: list[FactorGroup] = []
        self._homes = home_of_weights(self.model, self.optimizer)
        self._made = UpdateCounter(self.optimizer)
        modules = [target.module for target in self.watch.monitor.targets.values()]
        self._inputs = FirstInputs(model, forward, modules)
        self._checked = False
        self._tells_of([])
        self._check_optimized()
        if self.policy.criterion is not never:
            self._rehearse()

    @property
    def num_updates(self) -> int:
        """The updates that were counted."""
        return self.watch.num_updates

    @property
    def history(self) -> History:
        """The measurements, as long as there are targets that have not switched."""
        return self.watch.history

    @property
    def switched(self) -> bool:
        """Whether adapters are in; in stages, the first ones."""
        return self.switched_at is not None

    def step(self, loss: Tensor | float = math.nan) -> bool:
        """Count what the optimizer has done, and return whether other tensors train from now on.

        That is so at the switch, or at each of its ``stages``, at the end of the joint phase, at
        each ``restart``, and where ranks have grown. ``loss`` is that of the update or
        micro-batch. It is read at the end of a window. ValueError when weights move that the
        optimizer does not move.
        """
        updates = self._made.since_last()
        if not self._waits:
            self.watch.num_updates += updates
            return self._change_again(updates)
        if not self._checked:
            self._check_targets()
        if self._made.idle == self.watch.monitor.window:
            self._check_counted()
        if not self.watch.measured(loss, updates):
            return False
        fired = self._consider()
        if not fired:
            self.watch.monitor.start_window(self.num_updates)
        return fired

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trained = count_parameters(self.model, trainable=True)
        total = count_parameters(self.model)
        print(
            f"trainable params: {trained:,} || all params: {total:,} || "
            f"trainable%: {100 * trained / total:.4f}"
        )

    def log_dict(self) -> dict[str, float]:
        """Return the numbers of the last measurement for any logger, by name."""
        found = {"switch/switched": float(self.switched), **self.watch.log_dict()}
        if self.verdict is not None:
            found |= {f"margin/{name}": margin for name, margin in self.verdict.margins.items()}
        return found

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the adapter as PEFT reads it, and its base model beside, as
        ``residual.safetensors``.

        Without an adapter that file holds the whole model, and a warning says so.
        """
        path = save_adapter(self.model, Path(folder))
        if not adapted_modules(self.model):
            warnings.warn(
                f"the model has no adapter now, so {path / RESIDUAL} holds all of its weights, "
                f"and PEFT finds nothing to load in {path}",
                stacklevel=2,
            )

    def merge_and_unload(self) -> nn.Module:
        """Merge the adapters into the weights. Return the model, which is plain again."""
        merge(self.model)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs, as plain types and tensors."""
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return {
            **self.watch.state_dict(),
            "switched_at": self.switched_at,
            "last_stage": self._last_stage,
            "joint_until": self._joint_until,
            "larger": self._larger,
            "ranks": self.ranks,
            "layout": adapter_layout(self.model),
            "trained": trained,
            "ramp": (self._ramp.updates, self._ramp.done) if self._ramp else (0, 0),
            "groups": [astuple(group) for group in self._groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Model, optimizer and schedulers load theirs next.

        If the model had switched, adapters of its shapes are put in, the optimizer gets their
        groups, and the schedulers are told.
        """
        self.switched_at, self._last_stage = state["switched_at"], state["last_stage"]
        self._joint_until = state["joint_until"]
        self.ranks = dict(state["ranks"])
        self.watch.load_state_dict(state)
        if not self.switched:
            return
        before = names_of(self.model)
        inject_empty(self.model, state["layout"])
        train_only(self.model, state["trained"], self.policy.train_factors)
        self._groups = [FactorGroup(*group) for group in state["groups"]]
        plan = self._regrouped(self.model, before)
        tells = self._tells_of(plan.new)
        plan.commit(self.optimizer, {})
        _finish(tells, self.model, self.optimizer)
        self._ramp = Ramp(self.optimizer, *state["ramp"])
        self._grow_next(state["larger"])
        self._checked = True
        self._forget_inputs()

    def _rehearse(self) -> None:
        """Try criterion, ranks and start once; what needs a measurement is tried without one."""
        epoch = 0.0 if self.watch.updates_per_epoch else math.nan
        with named_as_arguments(), suppress(NothingMeasured):
            rehearse(self.model, self.policy, self.watch.monitor, epoch)

    def _check_targets(self) -> None:
        """Refuse targets on which an adapter would do something else than its weight."""
        self._checked = True
        with named_as_arguments(), together():
            check_adapters_work(self.model, self.watch.monitor.targets.values(), self._inputs)

    @property
    def _waits(self) -> bool:
        """Whether a target is measured that has not switched."""
        return bool(set(self.watch.monitor.targets) - set(self.ranks))

    @property
    def _restarts(self) -> bool:
        """Whether adapters are watched that are merged at the end of the window."""
        watched = self.watch.monitor.targets
        return self.policy.restart is not None and bool(watched) and not self._waits

    def _consider(self) -> bool:
        """Ask the criterion, and return whether the targets have switched that it chose."""
        verdict = self.verdict = from_primary(lambda: self.policy.decide(self.history))
        now, waiting = self.num_updates, self.watch.monitor.targets
        chosen = self.policy.chosen(verdict, waiting, now, self._last_stage)
        if not chosen:
            return False
        policy = with_frozen_front(
            *(self.model, self.policy, self.watch.monitor.known),
            *(verdict.margins, chosen, self._inputs),
        )
        report = self._change("switch", lambda scene: switch(scene, self.history, chosen), policy)
        if report is not None:
            self._note(report)
        return report is not None

    def _note(self, report: SwitchReport) -> None:
        """Take down that targets have switched, and watch those that wait."""
        now = self._last_stage = self.num_updates
        self.switched_at = now if self.switched_at is None else self.switched_at
        self.ranks = {**self.ranks, **report.ranks}
        self.report = report if self.report is None else report.after(self.report)
        if self.policy.joint_epochs:
            self._joint_until = now + self._updates(self.policy.joint_epochs)
            self._rise(0)
        elif report.waiting:
            self._rise(self.ramp_updates, 0)
        else:
            self._rise(self.ramp_updates)
        self._watch(report.waiting)
        if self.on_switch is not None:
            self.on_switch(report)

    def _change_again(self, updates: int) -> bool:
        """Make the change that is due after these ``updates``, and return whether there was one.

        It ends the joint phase, restarts the adapters, or lets ranks grow.
        """
        now, monitor = self.num_updates, self.watch.monitor
        outcome: Outcome | None = None
        if self._joint_until is not None:
            if now >= self._joint_until:
                what = "end of the joint phase"
                outcome = self._change(what, lambda scene: settle(scene, self.ranks), self.policy)
                self._joint_until = math.inf if outcome is None else None
                self._watch()
        elif self._larger and updates:
            growing = partial(grow, gradients=self._gradients.found, ranks=self._larger)
            grown = self._change("growth of the ranks", growing, self.policy)
            self._grow_next({})
            self.ranks = {**self.ranks, **(grown.ranks if grown is not None else {})}
            outcome = grown
        elif self._restarts and monitor.due(now):
            outcome = self._change("restart", lambda scene: restart(scene, now), self.policy)
            monitor.start_window(now)
        elif self.policy.growth is not None and monitor.due(now):
            self._look_for_growth(self.policy.growth)
            monitor.start_window(now)
        if outcome is not None:
            self._rise(getattr(self.policy.restart, "rewarmup_updates", None), self.ramp_updates)
        return outcome is not None

    def _look_for_growth(self, rule: InRank) -> None:
        """Ask the rule which ranks are too small. These grow after the next update."""
        if self.num_updates > rule.earliest:
            known = self.watch.monitor.known
            self._grow_next(from_primary(lambda: larger_ranks(self.model, known, rule)))

    def _grow_next(self, larger: Mapping[str, int]) -> None:
        """Let these ranks grow after the next update, whose gradients say in which directions."""
        known = self.watch.monitor.known
        self._gradients.remove()
        self._larger = dict(larger)
        self._gradients = WeightGradients(self.model, {name: known[name] for name in larger})

    def _updates(self, epochs: float) -> int:
        return max(1, round(epochs * (self.watch.updates_per_epoch or 1)))

    def _watch(self, waiting: Collection[str] = ()) -> None:
        """Let the monitor watch what waits for its stage, or the adapters till a restart.

        The model's inputs go, if no further change is checked on them.
        """
        monitor, how, growth = self.watch.monitor, self.policy.restart, self.policy.growth
        if growth is not None and not waiting:
            monitor.window = growth.every_updates
        if how is not None and self._joint_until is None:
            adapted = adapted_modules(self.model)
            waiting = [name for name, each in monitor.known.items() if each.module in adapted]
            monitor.window = self._updates(how.every_epochs)
        monitor.watch(waiting, self.num_updates)
        self._forget_inputs()

    def _change(
        self,
        what: str,
        change: Callable[[Scene[Held]], tuple[Held, T]],
        policy: SwitchPolicy,
    ) -> T | None:
        """Make a change of the model, and let optimizer and schedulers follow.

        Return its outcome; None when it failed, after which all is as it was.
        """
        if len(self.failures) >= TRIES:
            return None
        before = names_of(self.model)
        plans: list[Regrouped] = []
        tells: list[Tell] = []

        def rebuild(model: nn.Module) -> Held:
            plan = self._regrouped(model, before)
            tells.extend(self._tells_of(plan.new))
            plans.append(plan)
            return Held(model, plan.shadow(self.optimizer))

        held = Held(self.model, self.optimizer)
        scene = Scene(held, policy, self.watch.monitor, None, rebuild, self._inputs)
        try:
            new, outcome = change(scene)
        except SwitchFailed as error:
            self.failures.append(as_arguments(str(error)))
            warnings.warn(f"the {what} failed and was undone: {self.failures[-1]}", stacklevel=4)
            return None
        plans[-1].commit(self.optimizer, new.optimizer.state)
        self._groups = plans[-1].of_factors
        _finish(tells, self.model, self.optimizer)
        return outcome

    def _rise(self, *asked: int | None) -> None:
        """Let the learning rates rise again, over the first number of updates that is given."""
        if self._ramp is not None:
            self._ramp.stop()
        updates = next(number for number in (*asked, LONGEST_RAMP) if number is not None)
        self._ramp = Ramp(self.optimizer, updates)

    def _forget_inputs(self) -> None:
        goes_on = self._waits or self._restarts or self._joint_until is not None
        if not goes_on and self.policy.growth is None:
            self._inputs.remove()

    def _regrouped(self, model: nn.Module, before: Mapping[nn.Parameter, str]) -> Regrouped:
        decay, timms = self.factor_weight_decay, any(map(is_timms, self.schedulers))
        groups = (before, self._homes, self._groups)
        return regrouped(model, self.optimizer, *groups, self.rates, decay, timms)

    def _tells_of(self, new: Sequence[FactorGroup]) -> list[Tell]:
        tells: list[Tell] = []
        for scheduler in self.schedulers:
            tells += prepared(scheduler, len(self.optimizer.param_groups), new)
        return tells

    def _check_counted(self) -> None:
        """Refuse an optimizer that is not the one that trains the targets."""
        if self.num_updates == 0 and self.watch.moved():
            raise ValueError(
                f"weights have moved in {self._made.idle} calls of step(), and the optimizer that "
                "LowRankSwitch got made no update: give it the one whose step() the loop calls"
            )

    def _check_optimized(self) -> None:
        """Refuse targets that the optimizer does not train."""
        modules = {target.module for target in self.watch.monitor.targets.values()}
        missing = sorted(modules - set(self._homes))
        if missing:
            raise ValueError(
                f"the optimizer does not train the weight of {missing[0]}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: leave it out of "
                "target_modules, or give the optimizer that trains it"
            )


def _finish(tells: Iterable[Tell], model: nn.Module, optimizer: Optimizer) -> None:
    for tell in tells:
        tell()
    follow(model, optimizer)
    torch.compiler.reset()
