"""PreLoRA's criterion (arXiv 2509.21619), in the form of its paper and of its public code."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from switchlora.criteria.basic import (
    LOSS,
    SMALLEST,
    LossPlateau,
    SwitchCriterion,
    Verdict,
    by_layer,
    held_back,
    joined,
    relative_changes,
    too_short,
)
from switchlora.errors import check_choice, check_range
from switchlora.monitor import LayerStats, Measurement
from switchlora.names import family

OUTPUTS = r"(attn\.proj|mlp\.fc2)$"
"""output projections: the model of PreLoRA's public code calls both of them output.dense"""


@dataclass(frozen=True)
class PreLoRA:
    """Fire when weight norms and train loss stop changing: PreLoRA's partial-convergence test.

    From arXiv 2509.21619, in the form of its public code. Per cent are used throughout:

    - d_i(t) = 100 * | n_i(t) - n_i(t-1) | / n_i(t-1), with n_i = ||W_i||_F of target i.
    - D_F(t) is the mean of d_i(t) over the targets of family F.
    - The loss changes by 100 * |l(t) - l(t-1)| / l(t-1), with l the mean train loss of a window.

    The criterion looks at the last k = ``windows`` windows. It fires when D_F < ``tau`` for every
    family and the loss changes by at most ``zeta``, in all k - 1 pairs of consecutive windows.
    With ``signal='update_norm'``, d_i = 100 * ||W_i(t) - W_i(t-1)||_F / ||W_i(t-1)||_F. This
    measure also sees a rotation at constant norm.
    """

    tau: float = 5.0
    zeta: float = 10.0
    windows: int = 3
    signal: str = "weight_norm"

    def __post_init__(self) -> None:
        check_choice("signal", self.signal, ("weight_norm", "update_norm"))
        check_range("windows", self.windows, 2)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict; margins: tau - max d_i per target, zeta - largest loss change.

        Only the family means and the loss decide; the margin of a single target does not.
        """
        if len(history) < self.windows:
            return too_short(history, self.windows)
        recent = history[-self.windows :]
        losses = [measured.train_loss for measured in recent]
        changes = {name: self._changes(stats) for name, stats in by_layer(recent).items()}
        if verdict := held_back({**changes, LOSS: losses}, "change"):
            return verdict
        families = self._family_means(changes)
        loss = max(map(abs, relative_changes(losses)))
        margins = {name: self.tau - max(d) for name, d in changes.items()}
        margins[LOSS] = self.zeta - loss
        worst = max(families, key=lambda name: families[name])
        change = families[worst]
        fires = change < self.tau and loss <= self.zeta
        return Verdict(fires, margins, self._reason(worst, change, loss, margins))

    def _changes(self, stats: Sequence[LayerStats]) -> list[float]:
        if self.signal == "weight_norm":
            norms = [window.weight_norm for window in stats]
            return list(map(abs, relative_changes(norms)))
        found = []
        for old, new in pairwise(stats):
            found.append(100 * new.update_norm / max(old.weight_norm, SMALLEST))
        return found

    def _family_means(self, changes: Mapping[str, list[float]]) -> dict[str, float]:
        """Return, by family, the largest D_F(t) of the last windows."""
        members: dict[str, list[list[float]]] = {}
        for name, values in changes.items():
            members.setdefault(family(name), []).append(values)
        found = {}
        for name, rows in members.items():
            means = [mean(at_once) for at_once in zip(*rows, strict=True)]
            found[name] = max(means)
        return found

    def _reason(self, worst: str, change: float, loss: float, margins: Mapping[str, float]) -> str:
        hidden = sum(m <= 0 for name, m in margins.items() if name != LOSS)
        moving = f"; {hidden} target(s) alone move by more" if hidden else ""
        return (
            f"family {worst} changed most, {change:.3g} % (tau {self.tau:g} %), train loss "
            f"changed {loss:.3g} % (zeta {self.zeta:g} %) over {self.windows} windows{moving}"
        )


@dataclass(frozen=True)
class PublishedPreLoRA(PreLoRA):
    """PreLoRA's test with two bugs of its public code, to compare with.

    - ``counter`` = [accumulation, micro-batches an epoch]: test only at the updates that
      ``checks_at`` accepts. None tests at each.
    - ``shared_output``: store both output projections of a block under one name. The values of
      mlp.fc2 overwrite those of attn.proj, whose changes are then not seen.
    """

    counter: Sequence[int] | None = None
    shared_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        counter = self.counter
        if counter is not None and (len(counter) != 2 or min(counter) < 1):
            raise ValueError(f"counter is {counter}: give [accumulation, micro-batches an epoch]")

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict of PreLoRA, which fires only where the counter lets it."""
        verdict = super().__call__(history)
        if not verdict.fires or self.checks_at(history[-1].num_updates):
            return verdict
        reason = f"the counter is blind at update {history[-1].num_updates}: {verdict.reason}"
        return Verdict(False, verdict.margins, reason)

    def checks_at(self, num_updates: int) -> bool:
        """Return whether the test is made after ``num_updates``, a multiple of the window.

        The public code counts micro-batches with c, from 0. It measures when c is a multiple of
        window * accumulation. It tests there only if an update follows this micro-batch:
        (c mod per_epoch + 1) mod accumulation = 0. With 2 micro-batches an update and an even
        number an epoch, this never holds.
        """
        if self.counter is None:
            return True
        accumulation, per_epoch = self.counter
        return (num_updates * accumulation % per_epoch + 1) % accumulation == 0

    def _family_means(self, changes: Mapping[str, list[float]]) -> dict[str, float]:
        if not self.shared_output:
            return super()._family_means(changes)
        entries = {re.sub(OUTPUTS, "output", name): values for name, values in changes.items()}
        return super()._family_means(entries)


def reads_loss(criterion: SwitchCriterion) -> bool:
    """Return whether ``criterion``, or one that it joins, reads the train loss."""
    return any(isinstance(each, LossPlateau | PreLoRA) for each in joined(criterion))
