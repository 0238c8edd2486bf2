"""Ranks that grow in training as soon as the present ones are all in use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from switchlora.adapters import Adapter
from switchlora.errors import check_range, check_share


@dataclass(frozen=True)
class InRank:
    """Let a rank grow until its leading modes explain B A: InRank (Zhao et al., arXiv 2306.11250).

    The last ``buffer`` modes of an adapter look ahead. Every ``every_updates`` updates after
    ``earliest`` of them, the others become as many as explain more than the share ``threshold`` of
    the variance of the singular values of B A, the cumulative update. A rank never shrinks, and
    stays within the share ``most`` of the full rank (jiaweizhao/InRank).
    """

    every_updates: int = 25
    earliest: int = 200
    threshold: float = 0.9
    buffer: int = 100
    most: float = 0.5

    def __post_init__(self) -> None:
        check_range("switch.growth.every_updates", self.every_updates, 1)
        check_range("switch.growth.earliest", self.earliest, 0)
        check_range("switch.growth.buffer", self.buffer, 1)
        check_share("switch.growth.threshold", self.threshold)
        check_share("switch.growth.most", self.most)

    def rank(self, adapter: Adapter) -> int:
        """Return the rank that ``adapter`` should have, at least its own."""
        values = singular_values(adapter)
        modes = max(len(adapter.A) - self.buffer, 1)
        most = int(self.most * len(values)) - self.buffer
        tried = range(modes, min(modes + self.buffer, most))
        if not len(tried) or not values.any():
            return len(adapter.A)
        enough = (k for k in tried if explained_variance(values, k) > self.threshold)
        return max(next(enough, tried[-1]) + self.buffer, len(adapter.A))


def explained_variance(values: Tensor, modes: int) -> float:
    """Return 1 - var(s without its first ``modes`` values) / var(s), as zeros where left out."""
    rest = values.clone()
    rest[:modes] = 0
    return float(1 - rest.var() / values.var())


@torch.no_grad()
def singular_values(adapter: Adapter) -> Tensor:
    """Return all min(in, out) singular values of B A in float64, from the factors' triangles."""
    A, B = adapter.A.double(), adapter.B.double()
    triangles = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
    found = torch.linalg.svdvals(triangles)
    values = found.new_zeros(min(len(B), A.shape[1]))
    values[: len(found)] = found[: len(values)]
    return values
