r"""Muon for the matrices of a network, LoRA-Muon for factors, AdamW for all other parameters.

Muon moves a weight along msign(M), where M is the momentum and msign(U S V^T) = U V^T (Jordan et
al., 2024). LoRA-Muon is the same step within the weights of rank r (Cesista et al., arXiv
2606.12921): with the momenta M_A and M_B of the factors and their Gram matrices S_A = A A^T and
S_B = B^T B,

    dB = -c / s  msign(M_B S_A^(-1/2)) S_A^(-1/2),
    dA = -c / s  S_B^(-1/2) msign(S_B^(-1/2) M_A).

The spectral norm of s dB A is c, and so is that of s B dA. Both factors share the step: c is half
of Muon's where both train. The step does not depend on how B A is split into factors, so the
learning rate of the full phase goes on through a switch, for every rank and every start. A factor
beside a zero one does not move, since no step of it would move the weight.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon as TorchMuon, Optimizer

from switchlora.adapters import Adapter, is_factor

MATRICES, FACTORS, OTHERS = "matrices", "factors", "others"
MATCHED_RMS = 0.2
"""root mean square of Muon's step relative to AdamW's, so that both share a learning rate (Liu et
al., arXiv 2502.16982); ``adjust_lr_fn='match_rms_adamw'`` of ``torch.optim.Muon``"""
SMALLEST = 1e-6
"""eigenvalues of a Gram matrix below this share of the largest count as this share"""


class Muon(Optimizer):
    """Update each parameter group by the optimizer that its key 'part' names.

    - 'matrices': ``torch.optim.Muon``.
    - 'factors': LoRA-Muon, for the adapters that ``pair`` was given.
    - 'others', or no key: ``torch.optim.AdamW``.

    Learning rates are AdamW's. ``betas`` and ``eps`` are AdamW's too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "part": OTHERS}
        super().__init__(params, defaults)
        self.momentum = momentum
        self.nesterov = nesterov
        self._adapters: list[Adapter] = []
        self._own: dict[str, Optimizer] = {}
        if matrices := self._groups(MATRICES):
            matched = "match_rms_adamw"
            self._own[MATRICES] = TorchMuon(
                matrices, lr, weight_decay, momentum, nesterov, adjust_lr_fn=matched
            )
        if others := self._groups(OTHERS):
            first, second = betas
            self._own[OTHERS] = AdamW(others, lr, (first, second), eps, weight_decay)

    def pair(self, adapters: Sequence[Adapter]) -> None:
        """Say which factors belong together. ValueError unless all that train are among them."""
        self._adapters = list(adapters)
        paired = {factor for A, B, _, _ in adapters for factor in (A, B)}
        if not paired.issuperset(self._factor_groups()):
            raise ValueError("Muon has a factor to train whose adapter it was not given")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, optimizer in self._own.items():
            optimizer.param_groups = self._groups(part)
            optimizer.state = self.state
            optimizer.step()
        groups = self._factor_groups()
        for adapter in self._adapters:
            self._step_adapter(adapter, groups)
        return loss

    def _groups(self, part: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["part"] == part]

    def _factor_groups(self) -> dict[Tensor, dict[str, Any]]:
        """Return the group of each factor that trains."""
        return {factor: group for group in self._groups(FACTORS) for factor in group["params"]}

    def _step_adapter(self, adapter: Adapter, groups: Mapping[Tensor, dict[str, Any]]) -> None:
        A, B, _, s = adapter
        steps: dict[Tensor, Tensor] = {}
        if A.grad is not None:
            steps[A] = factor_step(self._momentum(A).mT, inverse_root(B)).mT
        if B.grad is not None:
            steps[B] = factor_step(self._momentum(B), inverse_root(A.mT))
        norm = MATCHED_RMS * math.sqrt(max(len(B), A.shape[1]))
        for factor, step in steps.items():
            lr, decay = groups[factor]["lr"], groups[factor]["weight_decay"]
            factor.mul_(1 - lr * decay)
            factor.sub_(step, alpha=lr * norm / (s * len(steps)))

    def _momentum(self, factor: Tensor) -> Tensor:
        """Return the momentum after the present gradient, with a look ahead by Nesterov's rule."""
        gradient = factor.grad
        assert gradient is not None
        state = self.state[factor]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(buffer, self.momentum) if self.nesterov else buffer


def factor_step(momentum: Tensor, root: Tensor) -> Tensor:
    """Return msign(M R) R for the momentum M (n, r) of B and the inverse root R (r, r) of S_A."""
    whitened = momentum @ root
    return whitened @ inverse_root(whitened) @ root


def inverse_root(columns: Tensor) -> Tensor:
    """Return (X^T X)^(-1/2) of a matrix X (n, r), for which msign(X) = X (X^T X)^(-1/2).

    Zeros for X = 0. It is computed in float64, where Newton and Schulz's iteration would not pay
    for a matrix as small as (r, r).
    """
    exact = columns.double()
    values, vectors = torch.linalg.eigh(exact.mT @ exact)
    largest = values[-1].clamp_min(0)
    inverse = values.clamp_min(SMALLEST * largest).rsqrt()
    inverse = torch.where(largest > 0, inverse, torch.zeros_like(inverse))
    return ((vectors * inverse) @ vectors.mT).to(columns.dtype)


def in_parts(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``groups`` of the parameters of ``model``, each split by the parts of ``Muon``."""
    matrices = _matrices(model)
    factors = {p for name, p in model.named_parameters() if is_factor(name, ("A", "B"))}
    found = []
    for group in groups:
        by_part: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            part = OTHERS
            if parameter in factors:
                part = FACTORS
            elif parameter in matrices:
                part = MATRICES
            by_part.setdefault(part, []).append(parameter)
        found += [{**group, "params": params, "part": part} for part, params in by_part.items()]
    return found


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of the linears of ``model`` without its classifier's."""
    get_classifier = getattr(model, "get_classifier", lambda: getattr(model, "head", None))
    classifier = get_classifier()
    inside: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not classifier:
            inside.update(p for p in module.parameters() if p.ndim == 2)
    return inside
