"""CoLA: two factors in the place of a weight, with a nonlinearity between them."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from switchlora.adapters.factorized import LowRankLinear, only_adapter
from switchlora.adapters.product import Adapter


class CoLALinear(LowRankLinear):
    """y = s B silu(A x) + b, in the place of W x + b: CoLA (Liu et al., arXiv 2502.10940).

    The activations between the factors have low rank, not a weight. No matrix is this function.
    So nothing can be merged, and the layer begins anew instead of as the weight it replaces.
    """

    kind = "cola"
    begins_anew = True
    has_weight = False

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        dropped = F.dropout(input, self.dropout, self.training)
        low = F.silu(F.linear(dropped, self.lora_A))
        return F.linear(low, self.scaling * self.lora_B, self.bias)

    def merged(self) -> Tensor:
        """Raise ValueError: B silu(A x) is no matrix."""
        raise ValueError("a layer of switch/adapter=cola, B silu(A x), is no matrix to merge")


def cola_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> CoLALinear:
    """Return B silu(A x) in the place of ``linear``, whose bias is shared.

    ValueError if ``adapters`` are of row slices.
    """
    module = CoLALinear(linear.bias, only_adapter(adapters))
    return module.train(linear.training)


cola_linear.makes = CoLALinear  # type: ignore[attr-defined]
