"""Change which parameters an optimizer trains, while schedulers and trainers hold it.

New groups are prepared first, in a ``Regrouped``. Nothing is changed before ``commit``.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from switchlora.adapters import adapted_modules, is_factor, trained_adapters
from switchlora.learner import FactorRates, InParts, as_part_of_factors

Group = dict[str, Any]
Key = tuple[int, float]
"""what the factors of one group share: the group of their weights, and the scale of rates"""
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""keys of a group that are learning rates; schedulers keep theirs there"""
LR_SCALE = "lr_scale"
"""key of a group by which timm's schedulers multiply its learning rate"""
NAMES = "param_names"


@dataclass(frozen=True)
class FactorGroup:
    """A group of factors: which group's settings it takes, with which multiple of its rates."""

    like: int
    scale: float
    place: int
    """its index in the optimizer"""


@dataclass(frozen=True)
class Regrouped:
    """The groups that an optimizer is to have.

    Of the groups ``of_factors``, the ``new`` ones stand behind all that there are, or in the place
    of one that has lost its factors. ``others`` are no parameters of the model.
    """

    groups: list[Group]
    of_factors: list[FactorGroup]
    new: list[FactorGroup]
    others: list[nn.Parameter]

    def shadow(self, optimizer: Optimizer) -> Optimizer:
        """Return an optimizer of the same class with these groups and the state of ``others``."""
        shadow = object.__new__(type(optimizer))
        shadow.param_groups = self.groups
        shadow.state = defaultdict(dict)
        for parameter in self.others:
            if parameter in optimizer.state:
                shadow.state[parameter] = optimizer.state[parameter]
        return shadow

    def commit(self, optimizer: Optimizer, state: Mapping[Any, Any]) -> None:
        """Give ``optimizer`` these groups and ``state``. Its groups stay the same objects."""
        for old, group in zip(optimizer.param_groups, self.groups, strict=False):
            old.update(group)
        optimizer.param_groups.extend(self.groups[len(optimizer.param_groups) :])
        optimizer.state.clear()
        optimizer.state.update(state)


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of each parameter of ``model``."""
    return {parameter: name for name, parameter in model.named_parameters()}


class Home(NamedTuple):
    """Where a parameter stands in an optimizer, before a switch."""

    group: int
    place: int


Homes = Mapping[str | nn.Parameter, Home]


def homes_of(model: nn.Module, optimizer: Optimizer) -> Homes:
    """Return where the optimizer has each parameter.

    Keys are names, and parameters themselves if they belong to another model.
    """
    names = names_of(model)
    homes: dict[str | nn.Parameter, Home] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            homes[names.get(parameter, parameter)] = Home(number, place)
    return homes


def regrouped(
    model: nn.Module,
    optimizer: Optimizer,
    before: Mapping[nn.Parameter, str],
    homes: Homes,
    full: Collection[str],
    known: Sequence[FactorGroup],
    rates: FactorRates,
    weight_decay: float,
    by_lr_scale: bool = False,
) -> Regrouped:
    """Return the groups for the parameters of ``model`` that train now.

    ``before`` names the parameters that ``model`` had before a change, ``full`` those that trained
    before a switch, and ``known`` the groups of factors that ``optimizer`` has.

    - What trains stays in its group, under its name: a change may put another tensor there. What
      a change froze leaves. What was frozen before stays: the loop may let it train later. A group
      may become empty; it keeps its place. What trains again comes back to where it was
      (``homes``).
    - A row slice that trains in full is in the group of its weight (``homes``).
    - Factors have groups of their own. A new one has the settings of the group of the weight that
      they stand for, with learning rates multiplied by the scale of ``rates``, and
      ``weight_decay``. With ``by_lr_scale`` timm's schedulers multiply them. A group keeps its
      settings as long as it has factors.
    """
    names = names_of(model)
    factors: dict[Key, list[nn.Parameter]] = {}
    slices: dict[nn.Parameter, int] = {}
    for name, module in adapted_modules(model).items():
        home = homes[f"{name}.weight"].group
        slices |= dict.fromkeys(module.dense_rows().values(), home)
        for factor, scale in rates(module, optimizer):
            factors.setdefault((home, scale), []).append(factor)
    held = {name: p for p, name in names.items() if p.requires_grad or name not in full}
    beside = {n: p for n, p in held.items() if not is_factor(n) and p not in slices}
    groups = [_renewed(group, before, beside) for group in optimizer.param_groups]
    _bring_back(groups, beside, names, homes)
    for parameter, home in slices.items():
        if parameter.requires_grad:
            groups[home] = _joined(groups[home], [parameter], names)
    of_factors = _placed(known, factors, len(groups))
    new = []
    for each in of_factors:
        if each not in known or each.place >= len(optimizer.param_groups):
            own = _settings_like(optimizer.param_groups[each.like], each.scale, by_lr_scale)
            own |= {"weight_decay": weight_decay, **as_part_of_factors(optimizer)}
            new.append(each)
        else:
            own = groups[each.place]
        params = factors.get((each.like, each.scale), [])
        groups[each.place : each.place + 1] = [_joined(own, params, names)]
    others = [p for group in optimizer.param_groups for p in group["params"] if p not in before]
    return Regrouped(groups, of_factors, new, others)


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """Tell an optimizer that works on pairs of factors which belong together."""
    if isinstance(optimizer, InParts):
        optimizer.pair(trained_adapters(model))


def _placed(known: Sequence[FactorGroup], keys: Collection[Key], count: int) -> list[FactorGroup]:
    """Return the groups of factors, in the order of their places, with one for each of ``keys``.

    A key that has none gets a known group whose own key is not among them, else one behind the
    ``count`` groups that there are.
    """
    placed = {group.place: (group.like, group.scale) for group in known}
    free = [place for place, key in placed.items() if key not in keys]
    for key in sorted(keys):
        if key not in placed.values():
            place = free.pop(0) if free else max([count - 1, *placed]) + 1
            placed[place] = key
    return [FactorGroup(*key, place) for place, key in sorted(placed.items())]


def _settings_like(like: Group, scale: float, by_lr_scale: bool) -> Group:
    """Return the settings of a group of factors, without parameters."""
    group = {**like, "params": []}
    group |= {key: like[key] * scale for key in RATES if key in like}
    if by_lr_scale:
        group |= {"initial_lr": like["initial_lr"], LR_SCALE: like.get(LR_SCALE, 1.0) * scale}
    return group if NAMES not in like else {**group, NAMES: []}


def _renewed(
    group: Group, before: Mapping[nn.Parameter, str], held: Mapping[str, nn.Parameter]
) -> Group:
    """Return the group with what has the names of its parameters now, of what is ``held``."""
    kept = {}
    for place, parameter in enumerate(group["params"]):
        name = before.get(parameter)
        if name is None:  # of another model
            kept[place] = parameter
        elif name in held:
            kept[place] = held[name]
    smaller: Group = {"params": [*kept.values()]}
    if NAMES in group:
        smaller[NAMES] = [group[NAMES][place] for place in kept]
    return {**group, **smaller}


def _bring_back(
    groups: list[Group],
    held: Mapping[str, nn.Parameter],
    names: Mapping[nn.Parameter, str],
    homes: Homes,
) -> None:
    """Add what is ``held`` and in no group, in the order in which the optimizer had it once."""
    there = {parameter for group in groups for parameter in group["params"]}
    for name, parameter in held.items():
        if parameter in there or name not in homes:
            continue
        number, place = homes[name]
        before = 0
        for other in groups[number]["params"]:
            home = homes.get(names.get(other, other))
            before += home is not None and home.place < place
        groups[number] = _joined(groups[number], [parameter], names, before)


def _joined(
    group: Group,
    params: Sequence[nn.Parameter],
    names: Mapping[nn.Parameter, str],
    place: int | None = None,
) -> Group:
    """Return the group with further parameters, at the end or before those from ``place`` on."""
    end = len(group["params"]) if place is None else place
    larger = {**group, "params": [*group["params"][:end], *params, *group["params"][end:]]}
    if NAMES in group:
        own = [names[parameter] for parameter in params]
        larger[NAMES] = [*group[NAMES][:end], *own, *group[NAMES][end:]]
    return larger
