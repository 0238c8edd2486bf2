"""``LowRankSwitch``: measure, decide and switch inside a training loop that is not ours."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from switchlora.adapters import (
    DEFAULT_TARGETS,
    adapted_modules,
    check_adapters_work,
    count_parameters,
    merge,
)
from switchlora.criteria import SwitchCriterion, Verdict, never
from switchlora.errors import NothingMeasured, check_range
from switchlora.initializers import AdapterInit, update_directions
from switchlora.learner import FactorRates
from switchlora.loop.arguments import (
    DEFAULT_RANKS,
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
from switchlora.loop.groups import names_of
from switchlora.loop.inputs import FirstInputs, Logits
from switchlora.loop.measure import History, WeightUpdateMonitor, norms_of
from switchlora.loop.training import Held, LoopTraining
from switchlora.models import RESIDUAL
from switchlora.names import some
from switchlora.process import together
from switchlora.ranks import RankPolicy
from switchlora.storage import save_adapter
from switchlora.switching import (
    ChangeFailed,
    Controller,
    Outcome,
    Scene,
    SwitchReport,
    SwitchState,
    rehearse,
)

T = TypeVar("T", bound=Outcome)


class LowRankSwitch(LoopTraining):
    """Turns full training into the training of a low-rank adapter, when a criterion says so.

    Call ``step`` after each update of the optimizer, or after each micro-batch: what counts are
    the updates that the optimizer made, without those that a GradScaler skipped. ``step`` measures
    the targets every ``window`` updates and asks the criterion. When that fires, adapters are put
    on the targets, and the same optimizer trains them: what is frozen leaves its groups, factors
    come as new groups, and the schedulers are told. All of it happens, or nothing.

    The model changes again where the policy says so: at each of its ``stages``, at the end of its
    joint phase, at each ``restart``, where ranks grow by its ``growth``, and where its ``guard``
    finds the adapter behind. ``step`` tells of each, since a wrapper or an average of the model
    has to be made anew.

    With several processes each of them calls ``step``. The first one decides for all.

    - ``optimizer``: any of torch's, or one with its interface.
    - ``schedulers``: those that set its learning rates, torch's or timm's. A function in the place
      of one is called with the new groups, to tell a scheduler of another kind.
    - ``target_modules``: regular expressions for the ends of the names of linears, such as
      ['q_proj', 'fc1'], or 'all-linear': all but the model's last one.
    - ``rank``: a number; the share of all parameters that may train on, such as 0.2; or a policy
      of ``switchlora.ranks``.
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
        rank: int | float | RankPolicy = DEFAULT_RANKS,
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
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        check_parts(model, inner)
        if ramp_updates is not None:
            check_whole("ramp_updates", ramp_updates, 0)
        check_range("factor_weight_decay", factor_weight_decay, 0)
        check_optional(forward=forward, on_switch=on_switch)
        self.watch = WeightUpdateMonitor(
            *(model, target_modules, window, updates_per_epoch), policy.get("split_qkv", False)
        )
        listed = schedulers if isinstance(schedulers, Sequence) else [schedulers]
        with named_as_arguments():
            made = policy_of(criterion, rank, init, policy)
            self.policy = replace(made, targets=self.watch.patterns)
            check_goes_with_a_loop(self.policy, updates_per_epoch)
        self.rates = FactorRates(factor_lr)
        told = [each for each in listed if each is not None]
        super().__init__(self.watch.model, inner, told, self.rates, factor_weight_decay)
        modules = [target.module for target in self.watch.monitor.targets.values()]
        self._check_optimized(modules)
        self.ramp_updates = ramp_updates
        self.on_switch = on_switch
        self._state = SwitchState(history=self.watch.history)
        self._control = Controller(
            *(self.policy, self.watch.monitor, self._state, window, updates_per_epoch)
        )
        self._larger: dict[str, int] = {}
        """the ranks that grow after the next update"""
        self._gradients = WeightGradients(self.model, {})
        self._made = UpdateCounter(self.optimizer)
        self._idle_norms: dict[str, float] = {}
        """norms of the targets, as long as the optimizer makes no update"""
        self._loaded: RemovableHandle | None = None
        """what waits for the first update after a state was loaded"""
        self._inputs = FirstInputs(model, forward, modules)
        self._checked = False
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
    def verdict(self) -> Verdict | None:
        """The criterion's last answer."""
        return self._state.verdict

    @property
    def report(self) -> SwitchReport | None:
        """What the switch did; in stages, all of them so far."""
        return self._state.switch_report

    @property
    def switched_at(self) -> int | None:
        """The number of updates at the switch, or at its first stage."""
        return self._state.switch_update

    @property
    def switched(self) -> bool:
        """Whether adapters are in; in stages, the first ones."""
        return self.switched_at is not None

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each target that has switched."""
        return self._state.ranks

    @property
    def failures(self) -> list[str]:
        """The reasons of the changes that failed and were undone."""
        return [as_arguments(failure) for failure in self._state.failed_switches]

    def step(self, loss: Tensor | float = math.nan) -> bool:
        """Count what the optimizer has done, and return whether other tensors train from now on.

        That is so at the switch, or at each of its ``stages``, at the end of the joint phase, at
        each ``restart``, where ranks have grown, and where the guard has brought full training
        back. ``loss`` is that of the update or micro-batch. It is read at the end of a window.
        ValueError when weights move that the optimizer does not move, and under inference mode.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "step() is called under torch.inference_mode(), where no factor can begin to "
                "train: call it outside"
            )
        updates = self._made.since_last()
        self._state.num_updates += updates
        if updates and self._loaded is not None:
            self._loaded.remove()
        idle = self._made.idle
        if idle and idle % self.watch.monitor.window == 0 and self._changes_later:
            self._check_counted()
        if not self._control.measures or self._larger:
            if self.policy.guard is not None:
                self.watch.count(loss, updates)
            else:
                self.watch.num_updates += updates
            return self._change_again(updates)
        if not self._checked:
            self._check_targets()
        if not self.watch.measured(loss, updates):
            return False
        if self.policy.guard is not None:
            self._control.note_loss("train", self.history[-1].train_loss)
        fired = self._consider() or self._come_back()
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
        own = replace(self._state, history=[]).state_dict()  # the history is the monitor's
        return {
            **super().state_dict(),
            **own,
            **self.watch.state_dict(),
            "larger": self._larger,
            "ranks": self.ranks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Model, optimizer and schedulers load theirs next.

        If the model had switched, adapters of its shapes are put in, the optimizer gets their
        groups, and the schedulers are told. ValueError where this model has adapters already, in
        another phase or on other modules than the state has.
        """
        self._check_goes_back(state)
        self._made.idle = 0
        self._state.load_state_dict(state)
        self.watch.load_state_dict(state)
        self._state.history = self.watch.history
        self._loaded = self.optimizer.register_step_pre_hook(
            lambda *_: self._control.watch_as_configured()  # the weights are loaded by then
        )
        super().load_state_dict(state)
        if not self.regrouped:
            return
        self._grow_next(state["larger"])
        self._checked = True
        self._forget_inputs()

    def _check_goes_back(self, state: Mapping[str, Any]) -> None:
        """Refuse a state whose adapters this model can no longer get."""
        same_phase = state["phase"] == self._state.phase
        same_modules = set(state["layout"]) == set(adapted_modules(self.model))
        if self.switched and not (same_phase and same_modules):
            raise ValueError(
                f"the state is of the phase '{state['phase']}', and this model has adapters of "
                f"the phase '{self._state.phase}' on {len(adapted_modules(self.model))} modules: "
                "load into a new LowRankSwitch over a new model"
            )

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

    def _consider(self) -> bool:
        """Ask the criterion, and return whether the targets have switched that it chose."""
        decision = self._control.decide()
        if not decision.chosen:
            return False
        if not self._trained():
            raise ValueError(
                "no parameter of the model trains where step() is called: call it before the loop "
                "freezes them"
            )
        if not self.switched:
            self._note_full()
        report = self._change(lambda scene: self._control.switch(scene, decision))
        if report is None:
            return False
        later = self.policy.joint_epochs or (report.waiting and self.ramp_updates is None)
        self._rise(0 if later else self.ramp_updates)
        if self.on_switch is not None:
            self.on_switch(report)
        return True

    def _change_again(self, updates: int) -> bool:
        """Make the change that is due after these ``updates``, and return whether there was one.

        It ends the joint phase, restarts the adapters, lets ranks grow, or returns to full
        training.
        """
        control = self._control
        outcome: Outcome | None = None
        came_back = False
        if control.joint_phase_over:
            outcome = self._change(control.end_joint_phase)
        elif self._larger and updates:
            growing = partial(control.grow, gradients=self._gradients.found, ranks=self._larger)
            outcome = self._change(growing)
            self._grow_next({})
        elif self.watch.monitor.due(self.num_updates):
            if self.policy.guard is not None:
                control.note_loss("train", self.watch.window_loss())
            if control.restarts:
                outcome = self._change(control.restart)
            self._grow_next(control.larger_ranks())
            self.watch.monitor.start_window(self.num_updates)
            came_back = self._come_back()
        if outcome is not None and not came_back:
            self._rise(getattr(self.policy.restart, "rewarmup_updates", None), self.ramp_updates)
        return outcome is not None or came_back

    def _come_back(self) -> bool:
        """Act where the guard finds the adapter behind. Return whether all trains in full again.

        Ranks that it raises grow after the next update.
        """
        guard, standing = self.policy.guard, self._control.behind()
        if guard is None or standing is None:
            return False
        warnings.warn(f"the adapter is behind: {standing.reason}", stacklevel=4)
        if not guard.acts or not self._control.guard_acts:
            return False
        self._grow_next(self._control.ranks_of_guard() if guard.act == "ranks" else {})
        if self._larger:
            return False
        outcome = self._change(lambda scene: self._control.take_back(scene, self._full))
        if outcome is not None:
            self._rise(guard.rewarmup_updates)
        return outcome is not None

    def _grow_next(self, larger: Mapping[str, int]) -> None:
        """Let these ranks grow after the next update, whose gradients say in which directions."""
        known = self.watch.monitor.known
        self._gradients.remove()
        self._larger = dict(larger)
        self._gradients = WeightGradients(self.model, {name: known[name] for name in larger})

    def _change(self, change: Callable[[Scene[Held]], tuple[Held, T]]) -> T | None:
        """Make a change of the model, and let optimizer and schedulers follow.

        Return its outcome; None when it failed, after which all is as it was.
        """
        policy, monitor, inputs = self.policy, self.watch.monitor, self._inputs
        try:
            return self._follow(
                lambda held, rebuild: change(Scene(held, policy, monitor, None, rebuild, inputs))
            )
        except ChangeFailed as failed:
            reason = as_arguments(str(failed))
            warnings.warn(f"the {failed.what} failed and was undone: {reason}", stacklevel=4)
            return None
        finally:
            self._forget_inputs()

    def _forget_inputs(self) -> None:
        """Let the model's inputs go, if no further change is checked on them."""
        if not self._changes_later:
            self._inputs.remove()

    @property
    def _changes_later(self) -> bool:
        """Whether the model may change after further updates."""
        policy, until = self.policy, self._state.joint_until
        later = policy.restart or policy.growth or policy.guard
        return self._control.measures or later is not None or until is not None

    def _check_counted(self) -> None:
        """Refuse an optimizer that is not the one that trains the targets, or is not any more."""
        idle, before = self._made.idle, self._idle_norms
        self._idle_norms = norms_of(self.model, self.watch.monitor.known)
        if idle == self.watch.monitor.window:
            moved = self.num_updates == 0 and self.watch.moved()
        else:
            moved = self._idle_norms != before
        if moved:
            raise ValueError(
                f"weights have moved in {idle} calls of step(), and the optimizer that "
                "LowRankSwitch got made no update: give it the one whose step() the loop calls"
            )

    def _check_trained(self, module: str) -> None:
        """Refuse a target whose weight is made of others, or frozen."""
        weight = self.model.get_submodule(module).weight
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{module}.weight is no parameter, as under weight_norm, spectral_norm or prune: "
                f"remove that parametrization first, or leave {module} out of target_modules"
            )
        if not weight.requires_grad:
            raise ValueError(
                f"{module}.weight does not train: leave {module} out of target_modules, or let "
                "the weight train (requires_grad) before LowRankSwitch is made"
            )

    def _check_optimized(self, modules: Collection[str]) -> None:
        """Refuse targets that are no trained parameter, or that the optimizer does not train."""
        for name in modules:
            self._check_trained(name)
        names = names_of(self.model)
        weights = {
            name: names[self.model.get_parameter(f"{name}.weight")] for name in set(modules)
        }
        missing = sorted(name for name, weight in weights.items() if weight not in self._homes)
        if missing:
            raise ValueError(
                f"the optimizer does not train the weight of {some(missing)}: leave it out of "
                "target_modules, or give the optimizer that trains it"
            )
