"""Compare runs with full training of the same cost: with a curve through its shortened runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchlora.analysis.tables.columns import Read, cost_flops, val_top1
from switchlora.analysis.tables.rows import METHOD, Row, without_seed
from switchlora.storage import Record

SCHEDULED_LENGTH = ("epochs", "length")
"""keys that shorten a run together with its schedule; ``max_updates`` cuts it off"""


@dataclass(frozen=True)
class FullCurve:
    """The accuracy of full training by its cost, for one seed."""

    costs: tuple[float, ...]
    """FLOPs, ascending"""
    accuracies: tuple[float, ...]
    """val top1 in %"""

    def accuracy_at(self, cost: float) -> float | None:
        """Return the accuracy at ``cost``, between two runs by a line; None beyond all runs."""
        if not self.costs[0] <= cost <= self.costs[-1]:
            return None
        return float(np.interp(cost, self.costs, self.accuracies))


Curves = dict[Path, FullCurve]
"""by folder of a run, the full training of its seed"""


def full_curves(row: Row, baseline: Row, rows: Sequence[Row]) -> Curves:
    """Return the curve for each run of ``row``: ``baseline`` and those ``rows`` of other lengths.

    A seed with fewer than two lengths of full training has no curve.
    """
    lengths = [each for each in rows if differs_in_length(each, baseline)]
    curves: Curves = {}
    for record in row.records:
        points = []
        for each in (baseline, *lengths):
            points += _points(each, record.config["seed"])
        if len(points) > 1:
            costs, accuracies = zip(*sorted(points), strict=True)
            curves[record.folder] = FullCurve(costs, accuracies)
    return curves


def differs_in_length(row: Row, baseline: Row) -> bool:
    """Return whether two rows of full training differ in their length, and in nothing else."""
    return row is not baseline and _beside_length(row) == _beside_length(baseline)


def over_full_training(curves: Curves) -> Read:
    """Return a function that reads how far a run ends above full training of the same cost."""

    def read(record: Record) -> float | None:
        curve = curves.get(record.folder)
        cost, accuracy = cost_flops(record), val_top1(record)
        if curve is None or cost is None or accuracy is None:
            return None
        reached = curve.accuracy_at(cost)
        return None if reached is None else accuracy - reached

    return read


def _points(row: Row, seed: int) -> list[tuple[float, float]]:
    """Return cost and accuracy of the row's run with this seed, if it has both."""
    found = []
    for record in row.records:
        cost, accuracy = cost_flops(record), val_top1(record)
        if record.config["seed"] == seed and cost is not None and accuracy is not None:
            found.append((cost, accuracy))
    return found


def _beside_length(row: Row) -> dict[str, object]:
    settings = without_seed(row.records[0].config)
    for key in (METHOD, *SCHEDULED_LENGTH):
        settings.pop(key, None)
    return settings
