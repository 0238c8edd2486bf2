"""Change which parameters an optimizer trains, while schedulers and trainers hold it.

New groups are prepared first, in a ``Regrouped``. Nothing is changed before ``commit``.
"""

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from switchlora.adapters import adapted_modules, trained_adapters
from switchlora.learner import FactorRates, InParts, as_part_of_factors

Group = dict[str, Any]
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""keys of a group that are learning rates; schedulers keep theirs there"""
LR_SCALE = "lr_scale"
"""key of a group by which timm's schedulers multiply its learning rate"""
NAMES = "param_names"


@dataclass(frozen=True)
class NewGroup:
    """A group of factors: which group's settings it takes, with which multiple of its rates."""

    like: int
    scale: float


@dataclass(frozen=True)
class Regrouped:
    """The groups that an optimizer is to have: those it has, then the ``new`` ones."""

    groups: list[Group]
    new: list[NewGroup]

    def shadow(self, optimizer: Optimizer) -> Optimizer:
        """Return an optimizer of the same class with these groups and no state."""
        shadow = object.__new__(type(optimizer))
        shadow.param_groups = self.groups
        shadow.state = defaultdict(dict)
        return shadow

    def commit(self, optimizer: Optimizer, state: Mapping[Any, Any]) -> None:
        """Give ``optimizer`` these groups and ``state``. Its groups stay the same objects."""
        for old, group in zip(optimizer.param_groups, self.groups, strict=False):
            old.update(group)
        optimizer.param_groups.extend(self.groups[len(optimizer.param_groups) :])
        optimizer.state.clear()
        optimizer.state.update(state)


def home_of_weights(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Return the index of the group of each linear's weight, by the linear's name."""
    places = {}
    for place, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            places[parameter] = place
    homes = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight in places:
            homes[name] = places[weight]
    return homes


def regrouped(
    model: nn.Module,
    optimizer: Optimizer,
    homes: Mapping[str, int],
    rates: FactorRates,
    weight_decay: float,
    by_lr_scale: bool = False,
) -> Regrouped:
    """Return the groups for the parameters of ``model`` that train now.

    - What is frozen leaves its group. A group may become empty; it keeps its place.
    - Factors get new groups. These have the settings of the group of the weight that they stand
      for (``homes``), with learning rates multiplied by the scale of ``rates``, and
      ``weight_decay``. With ``by_lr_scale`` timm's schedulers multiply them.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    groups = [_only(group, trained) for group in optimizer.param_groups]
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, module in adapted_modules(model).items():
        for factor, scale in rates(module, optimizer):
            factors.setdefault((homes[name], scale), []).append(factor)
    new = []
    for (home, scale), params in sorted(factors.items(), key=lambda item: item[0]):
        like = optimizer.param_groups[home]
        group = {**like, "params": params, "weight_decay": weight_decay}
        group |= as_part_of_factors(optimizer)
        group |= {key: like[key] * scale for key in RATES if key in like}
        if by_lr_scale:
            group |= {"initial_lr": like["initial_lr"], LR_SCALE: like.get(LR_SCALE, 1.0) * scale}
        if NAMES in like:
            group[NAMES] = [names[parameter] for parameter in params]
        groups.append(group)
        new.append(NewGroup(home, scale))
    return Regrouped(groups, new)


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """Tell an optimizer that works on pairs of factors which belong together."""
    if isinstance(optimizer, InParts):
        optimizer.pair(trained_adapters(model))


def _only(group: Group, trained: Container[nn.Parameter]) -> Group:
    """Return the group without the parameters that do not train, or left the model."""
    kept = [place for place, parameter in enumerate(group["params"]) if parameter in trained]
    smaller = {"params": [group["params"][place] for place in kept]}
    if NAMES in group:
        smaller[NAMES] = [group[NAMES][place] for place in kept]
    return {**group, **smaller}
