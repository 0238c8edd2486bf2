"""Linear layers whose weight is a product of two factors, without a residual weight."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchlora.adapters.linear import AdaptedLinear, LoRALinear, SlicedLoRALinear
from switchlora.adapters.product import Adapter


class LowRankLinear(LoRALinear):
    """y = s B (A x) + b: r (in + out) weights instead of in out.

    It is used in Pufferfish (Wang et al., arXiv 2103.03936), in Cuttlefish (Wang et al., arXiv
    2305.02538) and in the low-rank feed-forward layers of Wei et al. (arXiv 2407.09835).
    ``weight`` is None, so a state dict has the factors alone.
    """

    kind = "factorized"
    keeps_residual = False

    def __init__(self, bias: nn.Parameter | None, adapter: Adapter) -> None:
        out_features = len(adapter.B)
        in_features = adapter.A.shape[1]
        no_weight = torch.empty(out_features, in_features, device="meta")
        super().__init__(no_weight, bias, adapter)
        self.weight = None  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        return _low_rank(self, input, self.scaling * self.lora_A)

    def residual(self) -> Tensor:
        """Return what s B A is added to (out, in): zeros."""
        return self.lora_B.new_zeros(self.out_features, self.in_features)

    def merged(self) -> Tensor:
        """Return s B A (out, in): summed in float64, rounded once to the factors' dtype."""
        return _product(self).to(self.lora_B.dtype)


class SlicedLowRankLinear(SlicedLoRALinear):
    """A fused linear, such as qkv, as one product s B A for each of its row slices.

    The published Pufferfish has such factors of q, k and v (Wang et al., arXiv 2103.03936).
    ``weight`` is None. All slices switch together, and each has a rank above 0.
    """

    kind = "factorized"
    keeps_residual = False

    def __init__(self, bias: nn.Parameter | None, adapters: Mapping[str, Adapter]) -> None:
        for part, adapter in adapters.items():
            if not len(adapter.A):
                raise ValueError(
                    f"the rows {part} of a fused linear have rank 0: factors would lose them, so "
                    "switch.split_qkv and switch/adapter=factorized need ranks of at least 1"
                )
        out_features = sum(len(adapter.B) for adapter in adapters.values())
        in_features = next(iter(adapters.values())).A.shape[1]
        no_weight = torch.empty(out_features, in_features, device="meta")
        super().__init__(no_weight, bias, adapters)
        self.weight = None  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        adapters = self.adapters().values()
        all_A = torch.cat([adapter.scaling * adapter.A for adapter in adapters])
        dropped = F.dropout(input, self.dropout, self.training)
        low = F.linear(dropped, all_A).split([len(adapter.A) for adapter in adapters], dim=-1)
        parts = [F.linear(each, adapter.B) for each, adapter in zip(low, adapters, strict=True)]
        outputs = torch.cat(parts, dim=-1)
        return outputs if self.bias is None else outputs + self.bias.to(outputs)

    def residual(self) -> Tensor:
        """Return what the products are added to (out, in): zeros."""
        one = next(iter(self.lora_B.values()))
        return one.new_zeros(self.out_features, self.in_features)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return s B A of all slices (out, in): summed in float64, rounded once."""
        products = []
        for A, B, _, scaling in self.adapters().values():
            products.append(scaling * (B.double() @ A.double()))
        return torch.cat(products).to(next(self.parameters()).dtype)


class GuidedLinear(LoRALinear):
    """o = a W x + (1 - a) s B (A x) + b, where W trains too and a falls from 1 to 0.

    Self-guided training (Wei et al., arXiv 2406.16450). W starts at s B A, so at the start every a
    gives the same function. ``mix`` is a, the same for all layers: see ``set_mix``.

    A ``stochastic`` layer in training evaluates W x only with probability a. Each layer draws anew
    in each micro-batch whether it does: see ``draw_dense``. A micro-batch without W x computes
    o = s B (A x) + b and gives W a gradient of zeros, since DDP would wait for a missing one for
    ever. After an update whose micro-batches all left W x out, ``drop_skipped_gradients`` takes
    these zeros away, so that the optimizer leaves W alone.
    """

    kind = "guided"
    keeps_residual = False
    mix = 1.0
    drawn_dense = True
    """whether a stochastic layer evaluates W x in this micro-batch: compiled code has a graph for
    either, where it would have one for each number that was drawn"""
    skipped = 0
    """number of micro-batches of this update that leave W x out"""
    tokens = 0
    """number of tokens in the last forward pass"""

    def __init__(
        self,
        bias: nn.Parameter | None,
        adapter: Adapter,
        stochastic: bool = False,
    ) -> None:
        A, B, _, scaling = adapter
        weight = scaling * (B.double() @ A.double())
        super().__init__(weight.to(B.dtype), bias, adapter)
        self.weight.requires_grad_()
        self.stochastic = stochastic

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        self.tokens = input.shape[:-1].numel()
        A = self.scaling * self.lora_A
        if self.skips_dense():
            zero = self.weight[:0].sum()
            return _low_rank(self, input, A + zero)
        low_rank = _low_rank(self, input, A)
        dense = F.linear(input, self.weight, self.bias)
        return torch.lerp(low_rank, dense, self.mix)

    def skips_dense(self) -> bool:
        """Return whether W x is left out: only by the draw of a stochastic layer in training."""
        return self.training and self.stochastic and not self.drawn_dense

    def merged(self) -> Tensor:
        """Return a W + (1 - a) s B A (out, in): summed in float64, rounded once to W's dtype."""
        dense = self.weight.detach().double()
        mixed = torch.lerp(_product(self), dense, self.mix)
        return mixed.to(self.weight)

    def settings(self) -> dict[str, Any]:
        """Return the kind and the attributes, with a, since the merged weight depends on it."""
        settings = super().settings()
        settings["stochastic"] = self.stochastic
        settings["mix"] = self.mix
        return settings


def factorized_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> AdaptedLinear:
    """Return the product s B A in the place of ``linear``, without its weight.

    The bias is shared with ``linear``. Row slices have a product each. ValueError if one of them
    has rank 0.
    """
    module: AdaptedLinear
    if set(adapters) == {""}:
        module = LowRankLinear(linear.bias, adapters[""])
    else:
        module = SlicedLowRankLinear(linear.bias, adapters)
    return module.train(linear.training)


def guided_linear(
    linear: nn.Linear,
    adapters: Mapping[str, Adapter],
    stochastic: bool = False,
) -> GuidedLinear:
    """Return the product s B A in the place of ``linear``, guided by a dense W.

    W starts at s B A too. The bias is shared with ``linear``. ValueError if ``adapters`` are of
    row slices.
    """
    module = GuidedLinear(linear.bias, only_adapter(adapters), stochastic)
    return module.train(linear.training)


def only_adapter(adapters: Mapping[str, Adapter]) -> Adapter:
    """Return the one adapter of ``adapters``; ValueError if they are of row slices."""
    if set(adapters) != {""}:
        raise ValueError(
            "a switch/adapter without a residual weight takes one adapter for all rows of a "
            "linear: it does not go with switch.split_qkv"
        )
    return adapters[""]


def settled(module: GuidedLinear) -> LowRankLinear:
    """Return ``module`` without its W; the factors and the bias are the same parameters."""
    adapter = module.adapters()[""]
    alone = LowRankLinear(module.bias, adapter)
    alone.lora_A = module.lora_A
    alone.lora_B = module.lora_B
    alone.dropout = module.dropout
    alone.start_norms = module.start_norms
    return alone.train(module.training)


def cosine_mix(done: float) -> float:
    """Return a = (1 + cos(pi t)) / 2, where t is the share of guided updates that are done.

    The schedule is that of arXiv 2406.16450.
    """
    t = min(max(done, 0.0), 1.0)
    return (1 + math.cos(math.pi * t)) / 2


def set_mix(model: nn.Module, mix: float) -> None:
    """Set a of all guided layers of ``model``."""
    for layer in guided_layers(model):
        layer.mix = mix


def draw_dense(layers: Sequence[GuidedLinear], num_updates: int, micro_batch: int) -> None:
    """Draw for each guided layer whether it evaluates W x in this micro-batch of an update.

    A draw depends only on the update, the micro-batch and the layer's place in the model. So all
    ranks draw the same, and a resumed run does too.
    """
    if not layers:
        return
    draws = np.random.default_rng([num_updates, micro_batch]).random(len(layers)).tolist()
    for layer, draw in zip(layers, draws, strict=True):
        layer.drawn_dense = draw < layer.mix
        earlier = layer.skipped if micro_batch else 0
        layer.skipped = earlier + layer.skips_dense()


def drop_skipped_gradients(layers: Sequence[GuidedLinear], micro_batches: int) -> None:
    """Take the gradient away from each W that all micro-batches of an update left out."""
    for layer in layers:
        if layer.skipped == micro_batches:
            layer.weight.grad = None


def skipped_flops(model: nn.Module) -> int:
    """Return the FLOPs that the last update saved by leaving out W x.

    For T tokens the dense product costs 2 T in out FLOPs forward and twice that backward.
    """
    saved = 0
    for layer in guided_layers(model):
        saved += layer.skipped * 6 * layer.tokens * layer.in_features * layer.out_features
    return saved


def guided_layers(model: nn.Module) -> list[GuidedLinear]:
    """Return the guided layers of ``model``, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, GuidedLinear)]


factorized_linear.makes = LowRankLinear  # type: ignore[attr-defined]
guided_linear.makes = GuidedLinear  # type: ignore[attr-defined]


def _low_rank(module: LoRALinear, input: Tensor, A: Tensor) -> Tensor:
    """Return B (A drop(x)) + b; A already contains the scaling."""
    dropped = F.dropout(input, module.dropout, module.training)
    low = F.linear(dropped, A)
    return F.linear(low, module.lora_B, module.bias)


@torch.no_grad()
def _product(module: LoRALinear) -> Tensor:
    """Return s B A (out, in) in float64."""
    A = module.lora_A.double()
    B = module.lora_B.double()
    return module.scaling * (B @ A)
