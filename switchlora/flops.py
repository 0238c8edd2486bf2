"""FLOPs of products and attention, two a multiply-add, by the formulas of torch's own counter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SAME_FORMULA = {
    "addmm_": "addmm",
    "baddbmm_": "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "_scaled_dot_product_flash_attention_backward"
    ),
}
aten = torch.ops.aten
FORMULAS = flop_registry | {
    getattr(aten, name): flop_registry[getattr(aten, like)] for name, like in SAME_FORMULA.items()
}


def flops_of(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """FLOPs of one operator call; 0 of the element-wise rest."""
    formula = FORMULAS.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, forward and backward, into ``total``.

    Unlike torch's ``FlopCounterMode`` it hooks no modules, so that wrappers and checkpointed
    blocks run as they do without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.total += flops_of(func, args, kwargs, result)
        return result
