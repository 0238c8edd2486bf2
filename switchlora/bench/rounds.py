"""Rounds of the benchmark: every arm makes one update in each, under the same conditions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import nn
from tqdm import tqdm

from switchlora.bench.arms import Arm
from switchlora.cost import take_turns
from switchlora.process import distributed

ROUNDS_OF_PARTS = 3


@dataclass(frozen=True)
class Conditions:
    """The conditions that must be equal before times are compared."""

    batch: int
    precision: str
    accumulation: int
    dropout: str


def conditions_of(arm: Arm) -> Conditions:
    """Read the conditions of an arm from its learner, batch and model."""
    recipe = arm.learner.recipe
    batch = len(arm.images) * distributed.world_size()
    return Conditions(batch, recipe.precision, recipe.accumulation, dropout_of(arm.model))


def dropout_of(model: nn.Module) -> str:
    """Describe the active dropout and drop-path modules of ``model`` and their probabilities.

    Return 'none' when nothing is dropped.
    """
    found: dict[str, list[float]] = {}
    for module in model.modules():
        kind = type(module).__name__
        if "Drop" not in kind or not module.training:
            continue
        chance = max(getattr(module, name, 0.0) for name in ("p", "drop_prob", "prob"))
        if chance:
            found.setdefault(kind, []).append(chance)
    shown = []
    for kind, chances in sorted(found.items()):
        shown.append(f"{len(chances)} {kind} up to {max(chances):g}")
    return ", ".join(shown) or "none"


def common_conditions(conditions: Mapping[str, Conditions]) -> Conditions:
    """Return the conditions that all arms share. Raise ValueError with the first difference."""
    (first, mine), *others = conditions.items()
    for name, theirs in others:
        refuse_difference({f"arm '{first}'": asdict(mine), f"arm '{name}'": asdict(theirs)})
    return mine


def refuse_difference(sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError when two named sets of conditions differ."""
    (first, mine), (second, theirs) = sides.items()
    for key, value in mine.items():
        if value != theirs.get(key):
            raise ValueError(
                f"no comparison: {key} is '{value}' in {first} and '{theirs.get(key)}' in "
                f"{second}; make them the same"
            )


def timed_rounds(
    arms: Sequence[Arm],
    rounds: int,
    warmup: int,
    label: str,
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield the seconds by arm of each complete round after the ``warmup`` rounds.

    In a round every arm makes one update. The keys of the dictionary are in the order of the
    updates. Rounds of whole updates come first, under 'total'. Then some show the parts.
    """
    common_conditions({arm.name: conditions_of(arm) for arm in arms})
    of_parts = min(rounds, ROUNDS_OF_PARTS)
    total = (warmup + rounds + of_parts) * len(arms)
    with tqdm(total=total, desc=label, leave=False, disable=not distributed.is_primary()) as bar:

        def timed(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
            distributed.total([0.0])  # ranks start together
            seconds = measure()
            bar.update()
            return seconds

        wholes = {arm.name: partial(timed, arm.lap) for arm in arms}
        yield from islice(take_turns(wholes, warmup, shuffle=True), rounds)
        parts = {arm.name: partial(timed, arm.lap_of_parts) for arm in arms}
        yield from islice(take_turns(parts, 0, shuffle=True), of_parts)
