"""SwitchLoRA's layer: LoRA with a pool of vectors that wait to take the place of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from switchlora.adapters.factorized import only_adapter
from switchlora.adapters.linear import LoRALinear, add_adapters, seed_of
from switchlora.adapters.product import Adapter

NEVER = -(2**31)
"""as the update of a reset"""


class SwitchedLoRALinear(LoRALinear):
    """LoRA with min(in, out) candidates for each factor (Zhou et al., arXiv 2406.06564).

    r of the candidates are the rows of A, or the columns of B. The others wait in the rows of
    ``lora_pool_A`` and ``lora_pool_B``. A vector that was switched out waits there as it was.
    ``lora_pool_resets`` (2, r) holds the updates at which the moments of A's rows and of B's
    columns were last reset. None of the three trains.
    """

    kind = "switchlora"

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, adapter: Adapter) -> None:
        super().__init__(weight, bias, adapter)
        A, B = adapter.A, adapter.B
        rank, waiting = len(A), max(min(weight.shape) - len(A), 0)
        bounds = switchlora_bounds(self.out_features, self.in_features, max(rank, 1))
        generator = torch.Generator().manual_seed(seed_of(A))
        pools = []
        for size, bound in zip((self.in_features, self.out_features), bounds, strict=True):
            drawn = torch.rand(waiting, size, generator=generator)
            pools.append(nn.Parameter((bound * (2 * drawn - 1)).to(A), requires_grad=False))
        self.lora_pool_A, self.lora_pool_B = pools
        resets = torch.full((2, rank), NEVER, device=B.device)
        self.lora_pool_resets = nn.Parameter(resets, requires_grad=False)

    @torch.no_grad()
    def switch_A(self, number: int, num_updates: int) -> int:
        """Let a waiting vector take the place of a row of A, and return the row.

        W_res <- W_res + s b (a - a')^T keeps the function. ``number`` counts the switches: rows go
        in turn, and the vector that has waited longest comes. B's column b is noted as reset.
        """
        row, place = number % len(self.lora_A), number % len(self.lora_pool_A)
        old, new = self.lora_A[row].clone(), self.lora_pool_A[place].clone()
        self.weight.addr_(self.lora_B[:, row], old - new, alpha=self.scaling)
        self.lora_A[row] = new
        self.lora_pool_A[place] = old
        self.lora_pool_resets[1, row] = num_updates
        return row

    @torch.no_grad()
    def switch_B(self, number: int, num_updates: int) -> int:
        """Do for the columns of B, half a turn ahead, what ``switch_A`` does for the rows of A."""
        rank = len(self.lora_A)
        column, place = (number + rank // 2) % rank, number % len(self.lora_pool_B)
        old, new = self.lora_B[:, column].clone(), self.lora_pool_B[place].clone()
        self.weight.addr_(old - new, self.lora_A[column], alpha=self.scaling)
        self.lora_B[:, column] = new
        self.lora_pool_B[place] = old
        self.lora_pool_resets[0, column] = num_updates
        return column


def switchlora_bounds(out_features: int, in_features: int, rank: int) -> tuple[float, float]:
    """Return the bounds of the uniform entries of A and of B (arXiv 2406.06564).

    With s = 1 / r, B A is as large as a linear's own start, and a step of either factor moves it
    as far.
    """
    m, n, r = out_features, in_features, rank
    gain = 3**-0.5
    std_A = (m**0.5 * r / n**1.5) ** 0.25 * gain**0.5
    std_B = (r / (m * n) ** 0.5) ** 0.25 * gain**0.5
    return 3**0.5 * std_A, 3**0.5 * std_B


def switched_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> SwitchedLoRALinear:
    """Return a module of the same function as ``linear``, with candidates for its factors.

    The bias is shared with ``linear``. ValueError if ``adapters`` are of row slices.
    """
    weight = add_adapters(linear.weight.detach(), adapters, sign=-1)
    module = SwitchedLoRALinear(weight, linear.bias, only_adapter(adapters))
    return module.train(linear.training)


switched_linear.makes = SwitchedLoRALinear  # type: ignore[attr-defined]
