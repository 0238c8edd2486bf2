"""What a loop trains with: an optimizer and schedulers that follow the changes of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from switchlora.adapters import adapter_layout, inject_empty, train_only
from switchlora.learner import LONGEST_RAMP, FactorRates
from switchlora.loop.groups import (
    FactorGroup,
    Homes,
    Regrouped,
    follow,
    homes_of,
    names_of,
    regrouped,
)
from switchlora.loop.ramp import Ramp
from switchlora.loop.schedulers import Tell, is_timms, prepared

T = TypeVar("T")


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


class LoopTraining:
    """A model, its ``optimizer`` and its ``schedulers``: the objects stay, their groups change.

    Factors have learning rates by ``rates``, and a weight decay of their own. ValueError for a
    scheduler of unknown kind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedulers: list[Any],
        rates: FactorRates,
        factor_weight_decay: float,
    ) -> None:
        self.model, self.optimizer, self.schedulers = model, optimizer, schedulers
        self.rates, self.factor_weight_decay = rates, factor_weight_decay
        self._groups: list[FactorGroup] = []
        self._homes: Homes = {}
        self._full: list[str] = []
        """names of what trains before a switch"""
        self._note_full()
        self._ramp: Ramp | None = None
        self._tells_of([])

    @property
    def regrouped(self) -> bool:
        """Whether the optimizer has groups for factors; they may be empty again."""
        return bool(self._groups)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs, as plain types."""
        return {
            "layout": adapter_layout(self.model),
            "trained": self._trained(),
            "full": self._full,
            "ramp": (self._ramp.updates, self._ramp.done) if self._ramp else (0, 0),
            "groups": [astuple(group) for group in self._groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put adapters of the shapes of ``state`` in, with their groups; the model is plain.

        A state from before the switch changes nothing.
        """
        if not state["groups"]:
            return
        self._full = state.get("full", self._full)
        before = names_of(self.model)
        inject_empty(self.model, state["layout"])
        train_only(self.model, state["trained"], factors=())  # factors are among the names
        self._groups = [FactorGroup(*group) for group in state["groups"]]
        self._commit(*self._plan(before), {})
        if self._ramp is not None:
            self._ramp.stop()
        self._ramp = Ramp(self.optimizer, *state["ramp"])

    def _trained(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _note_full(self) -> None:
        """Take down what trains in full, and where the optimizer has it."""
        self._full = self._trained()
        self._homes = {**self._homes, **homes_of(self.model, self.optimizer)}

    def _follow(self, change: Callable[[Held, Callable[[nn.Module], Held]], tuple[Held, T]]) -> T:
        """Make a change of the model, whose learner it can rebuild, and return its outcome."""
        before = names_of(self.model)
        plans: list[tuple[Regrouped, list[Tell]]] = []

        def rebuild(model: nn.Module) -> Held:
            plans.append(self._plan(before))
            return Held(model, plans[-1][0].shadow(self.optimizer))

        new, outcome = change(Held(self.model, self.optimizer), rebuild)
        self._commit(*plans[-1], new.optimizer.state)
        return outcome

    def _rise(self, *asked: int | None) -> None:
        """Let the learning rates rise again, over the first number of updates that is given."""
        if self._ramp is not None:
            self._ramp.stop()
        updates = next(number for number in (*asked, LONGEST_RAMP) if number is not None)
        self._ramp = Ramp(self.optimizer, updates)

    def _plan(self, before: Mapping[nn.Parameter, str]) -> tuple[Regrouped, list[Tell]]:
        known = (before, self._homes, self._full, self._groups)
        rates = (self.rates, self.factor_weight_decay, any(map(is_timms, self.schedulers)))
        plan = regrouped(self.model, self.optimizer, *known, *rates)
        return plan, self._tells_of(plan.new)

    def _tells_of(self, new: Sequence[FactorGroup]) -> list[Tell]:
        tells: list[Tell] = []
        for scheduler in self.schedulers:
            tells += prepared(scheduler, len(self.optimizer.param_groups), new)
        return tells

    def _commit(self, plan: Regrouped, tells: Sequence[Tell], state: Mapping[Any, Any]) -> None:
        plan.commit(self.optimizer, state)
        self._groups = plan.of_factors
        for tell in tells:
            tell()
        follow(self.model, self.optimizer)
        torch.compiler.reset()
