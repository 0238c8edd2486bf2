"""PreLoRA's criterion (arXiv 2509.21619), as published and as its code has it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from switchlora.criteria.basic import LOSS, Verdict, by_layer, relative_changes, too_short
from switchlora.errors import check_choice, check_range
from switchlora.monitor import LayerStats, Measurement
from switchlora.names import family

OUTPUTS = r"(attn\.proj|mlp\.fc2)$"
"""both are called output.dense in the model of PreLoRA's public code"""


@dataclass(frozen=True)
class PreLoRA:
    """PreLoRA's partial-convergence test (arXiv 2509.21619, in the form of its public code).

    d_i(t) = 100 * | n_i(t) - n_i(t-1) | / n_i(t-1),  n_i = ||W_i||_F;  D_F = mean of d_i over a
    family. Fires when, for all k - 1 consecutive pairs of the last k windows, D_F < tau for every
    family and 100 * |l(t) - l(t-1)| / l(t-1) <= zeta for the window's mean train loss. Both in per
    cent. ``signal='update_norm'`` measures 100 * ||W_i(t) - W_i(t-1)||_F / ||W_i(t-1)||_F instead,
    which sees a rotation at constant norm.

    Two bugs of that code can be turned on, to compare: ``published_counter`` = [accumulation,
    micro-batches an epoch] tests only where ``checks_at`` says; ``shared_output`` gives the two
    output projections of a block one entry, that of mlp.fc2, so attn.proj moves unseen.
    """

    tau: float = 5.0
    zeta: float = 10.0
    windows: int = 3
    signal: str = "weight_norm"
    published_counter: Sequence[int] | None = None
    shared_output: bool = False

    def __post_init__(self) -> None:
        check_choice("signal", self.signal, ("weight_norm", "update_norm"))
        check_range("windows", self.windows, 2)
        if (counter := self.published_counter) and (len(counter) != 2 or min(counter) < 1):
            raise ValueError(
                f"published_counter is {counter}: give [accumulation, micro-batches an epoch]"
            )

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margins are each target's own, tau - max d_i, though the family's mean decides."""
        if len(history) < self.windows:
            return too_short(history, self.windows)
        recent = history[-self.windows :]
        changes = {name: self._changes(stats) for name, stats in by_layer(recent).items()}
        families = _family_means(self._entries(changes))
        loss = max(relative_changes([m.train_loss for m in recent]))
        margins = {name: self.tau - max(d) for name, d in changes.items()}
        margins[LOSS] = self.zeta - loss
        worst, change = max(families.items(), key=lambda item: item[1])
        fires = change < self.tau and loss <= self.zeta
        reason = self._reason(worst, change, loss, margins)
        if fires and not self.checks_at(done := history[-1].num_updates):
            fires, reason = False, f"published_counter is blind at update {done}: {reason}"
        return Verdict(fires, margins, reason)

    def checks_at(self, num_updates: int) -> bool:
        """Whether the test is made after ``num_updates`` updates, a multiple of the window.

        The public code measures when its counter c of micro-batches, from 0, is a multiple of
        window * accumulation, and tests there only if the micro-batch is one that an update
        follows: (c mod per_epoch + 1) mod accumulation = 0. With 2 an update and an even number
        an epoch, that is never.
        """
        if not self.published_counter:
            return True
        accumulation, per_epoch = self.published_counter
        return (num_updates * accumulation % per_epoch + 1) % accumulation == 0

    def _entries(self, changes: Mapping[str, list[float]]) -> Mapping[str, list[float]]:
        if not self.shared_output:
            return changes
        return {re.sub(OUTPUTS, "output", name): values for name, values in changes.items()}

    def _changes(self, stats: Sequence[LayerStats]) -> list[float]:
        if self.signal == "weight_norm":
            return relative_changes([s.weight_norm for s in stats])
        pairs = zip(stats, stats[1:], strict=False)
        return [100 * new.update_norm / max(old.weight_norm, 1e-12) for old, new in pairs]

    def _reason(self, worst: str, change: float, loss: float, margins: Mapping[str, float]) -> str:
        hidden = sum(m <= 0 for name, m in margins.items() if name != LOSS)
        moving = f"; {hidden} target(s) alone move by more" if hidden else ""
        return (
            f"family {worst} changed most, {change:.3g} % (tau {self.tau:g} %), train loss "
            f"changed {loss:.3g} % (zeta {self.zeta:g} %) over {self.windows} windows{moving}"
        )


def _family_means(changes: Mapping[str, list[float]]) -> dict[str, float]:
    members: dict[str, list[list[float]]] = {}
    for name, values in changes.items():
        members.setdefault(family(name), []).append(values)
    return {
        name: max(mean(at_once) for at_once in zip(*rows, strict=True))
        for name, rows in members.items()
    }
