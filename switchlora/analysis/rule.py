"""The rule of the criterion on update norms, as pictures show it: u_t beside its own peak."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

UPDATE_NORM = ".UpdateNorm"


@dataclass(frozen=True)
class Rule:
    """A target has converged when u_t <= ``fraction`` * its peak for ``patience`` windows."""

    fraction: float
    patience: int


def rule_of(config: Mapping[str, Any]) -> Rule | None:
    """Return the rule in a run's criterion, or None when it does not judge update norms.

    The criterion may be one of several that are joined.
    """
    criterion = (config.get("switch") or {}).get("criterion") or {}
    for part in _parts(criterion):
        if str(part.get("_target_", "")).endswith(UPDATE_NORM):
            return Rule(part.get("fraction", 0.7), part.get("patience", 3))
    return None


def _parts(criterion: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a criterion and all that it joins."""
    if isinstance(criterion, Mapping):
        yield criterion
        for part in criterion.get("criteria") or ():
            yield from _parts(part)


def over_own_peak(norms: np.ndarray) -> np.ndarray:
    """Return norms (windows, targets) over the largest so far of the same target; NaN stays."""
    peaks = np.fmax.accumulate(norms, axis=0)
    return norms / np.where(peaks > 0, peaks, np.nan)


def crossing(shares: Sequence[float] | np.ndarray, fraction: float) -> int | None:
    """Return the place from which the measured shares stay at or under ``fraction``.

    None when the last one lies above, or when none was measured.
    """
    found = None
    for place, share in enumerate(shares):
        if share > fraction:
            found = None
        elif share <= fraction and found is None:
            found = place
    return found
