"""Linear layers of which only a core between two frozen orthonormal bases trains: OIALR."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchlora.adapters.factorized import only_adapter
from switchlora.adapters.linear import Factors, LoRALinear
from switchlora.adapters.product import Adapter

TINY = 1e-30


class CoreLinear(LoRALinear):
    """y = U S (V^T x) + b, where U (out, k) and V^T (k, in) are frozen and S (k, k) trains.

    OIALR (Coquelin et al., arXiv 2401.08505; Helmholtz-AI-Energy/OIALR). ``lora_A`` is V^T,
    ``lora_B`` is S, and ``lora_U`` is U. For factors B A from an SVD both bases are orthonormal.
    S starts diagonal: B A = U diag(|b_i| |a_i|) V^T, with the columns of B and the rows of A.
    """

    kind = "core"
    keeps_residual = False
    must_save = False

    def __init__(self, bias: nn.Parameter | None, adapter: Adapter) -> None:
        A, B, rows, scaling = adapter
        norms_A = torch.linalg.vector_norm(A, dim=1)
        norms_B = torch.linalg.vector_norm(B, dim=0)
        right = A / norms_A.clamp(min=TINY)[:, None]
        left = B / norms_B.clamp(min=TINY)
        core = torch.diag(scaling * norms_A * norms_B)
        no_weight = torch.empty(len(B), A.shape[1], device="meta")
        super().__init__(no_weight, bias, Adapter(right, core, rows, 1.0))
        self.weight = None  # type: ignore[assignment]
        self.lora_A.requires_grad_(False)
        self.lora_U = nn.Parameter(left, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        dropped = F.dropout(input, self.dropout, self.training)
        inside = F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        return F.linear(inside, self.lora_U, self.bias)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return U S V^T (out, in): summed in float64, rounded once to the core's dtype."""
        left = self.lora_U.double() @ self.lora_B.double()
        return (left @ self.lora_A.double()).to(self.lora_B.dtype)

    @torch.no_grad()
    def refreshed(self, cutoff: float) -> Factors:
        """Return balanced factors B A of the layer whose bases are turned into those of the core.

        With S = P diag(s) Q^T they are U P sqrt(s) and sqrt(s) Q^T V^T, cut off where s is small:
        see ``kept_values``.
        """
        P, s, Qh = torch.linalg.svd(self.lora_B.double())
        kept = kept_values(s, cutoff, min(self.in_features, self.out_features))
        root = s[:kept].sqrt()
        B = self.lora_U.double() @ P[:, :kept] * root
        A = root[:, None] * (Qh[:kept] @ self.lora_A.double())
        dtype = self.lora_B.dtype
        return Factors(A.to(dtype), B.to(dtype))


def kept_values(values: Tensor, cutoff: float, full: int) -> int:
    """Return how many of the descending singular values a refresh keeps.

    A value is cut when it is below ``cutoff`` times the largest. At least half of the values stay,
    and at least 1 % of the ``full`` rank.

    >>> kept_values(torch.tensor([8.0, 4.0, 2.0, 0.5]), 0.1, 4)
    3
    >>> kept_values(torch.tensor([8.0, 0.1, 0.1, 0.1]), 0.1, 4)
    2
    """
    large = int((values >= cutoff * values[0]).sum())
    return max(large, len(values) // 2, int(0.01 * full), 1)


def core_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> CoreLinear:
    """Return U S V^T in the place of ``linear``, where U S V^T is the adapter's product s B A.

    The bias is shared with ``linear``. ValueError if ``adapters`` are of row slices.
    """
    return CoreLinear(linear.bias, only_adapter(adapters)).train(linear.training)


core_linear.makes = CoreLinear  # type: ignore[attr-defined]


def core_modules(model: nn.Module) -> dict[str, CoreLinear]:
    """Return the modules of ``model`` that train a core alone, by name, in their order."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CoreLinear):
            found[name] = module
    return found
