"""Factorise matrices with and without RefLoRA: ``python scripts/reflora.py --out FOLDER``.

The loss is ||B A - Y||_F^2 / 2, the target Y has the rank of the factors. Starts have one product
B A each, split into factors of different norms, but for the last: it is LoRA's, with a small B.
Every method has its best of ``RATES``, by the loss after ``STEPS`` steps, with plain gradient
descent and with Adam. ``reflora.csv`` tells after how many steps the loss is 1 % of the first one,
``reflora.png`` shows the losses. It is the setting of the figure on matrix factorisation of Zhang,
Li & Giannakis (arXiv 2505.18877), with sizes of our own.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from study import write_csv
from torch import Tensor

from switchlora.adapters import Factors
from switchlora.analysis.output import save
from switchlora.learner import refactoring_matrices
from switchlora.storage import output_folder

STEPS = 200
RATES = torch.logspace(-4, 1, 24, dtype=torch.float64)
SHAPE = (64, 48)
RANK = 4
CONDITIONS = (1, 10)
"""largest over smallest singular value of the target"""
STARTS = {"|B| = |A|": 1.0, "|B| = 10 |A|": 10.0, "|B| = 100 |A|": 100.0, "B near 0": 1e-3}
"""||B||_F / ||A||_F at the start"""
REACHED = 0.01
DIVERGED = 1e3
"""times the first loss; a rate that comes there stops"""
TITLES = ("optimizer", "condition", "start", "method", "seed")
"""what a curve is of"""
Gradients = tuple[Tensor, Tensor]
Method = Callable[[Factors, Gradients], Gradients]


def lora(factors: Factors, gradients: Gradients) -> Gradients:
    """Return the gradients as they are."""
    return gradients


def reflora(factors: Factors, gradients: Gradients) -> Gradients:
    """Return S^-1 g_A and g_B S, where S makes the pair balanced."""
    S, inverse = refactoring_matrices(*factors)
    g_A, g_B = gradients
    return inverse @ g_A, g_B @ S


def reflora_s(factors: Factors, gradients: Gradients) -> Gradients:
    """Return the same for S = ||B||_F / ||A||_F I."""
    A, B = factors
    S = torch.linalg.matrix_norm(B) / torch.linalg.matrix_norm(A)
    g_A, g_B = gradients
    return g_A / S[:, None, None], g_B * S[:, None, None]


def scaled_gd(factors: Factors, gradients: Gradients) -> Gradients:
    """Return (B^T B)^-1 g_A and g_B (A A^T)^-1: ScaledGD (Tong et al., arXiv 2005.08898)."""
    A, B = factors
    g_A, g_B = gradients
    return torch.linalg.solve(B.mT @ B, g_A), torch.linalg.solve(A @ A.mT, g_B.mT).mT


METHODS: dict[str, Method] = {
    "LoRA": lora,
    "RefLoRA": reflora,
    "RefLoRA-S": reflora_s,
    "ScaledGD": scaled_gd,
}
OPTIMIZERS = {"gradient descent": tuple(METHODS), "Adam": ("LoRA", "RefLoRA")}
"""and the methods shown with each: RefLoRA-S under Adam also rescales moments"""


class Descent:
    """Plain gradient descent, or Adam, of one tensor at many rates."""

    def __init__(self, adam: bool) -> None:
        self.adam = adam
        self.steps = 0
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def direction(self, gradient: Tensor) -> Tensor:
        """Return what a rate of 1 would subtract."""
        if not self.adam:
            return gradient
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient.square()
        mean = self.mean / (1 - 0.9**self.steps)
        square = self.square / (1 - 0.999**self.steps)
        return mean / (square.sqrt() + 1e-8)


@dataclass(frozen=True)
class Curve:
    """The losses of one method from one start at its best rate, over the first loss."""

    optimizer: str
    condition: int
    start: str
    method: str
    seed: int
    rate: float
    losses: Tensor

    @property
    def steps(self) -> int | None:
        """Steps after which the loss is 1 % of the first one; None if it never is."""
        found = (self.losses <= REACHED).nonzero()
        return int(found[0]) if len(found) else None


def main() -> None:
    """Write the table of all seeds and the picture of the first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=output_folder, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    curves = []
    for seed in options.seeds:
        curves += all_curves(seed)
    first = [curve for curve in curves if curve.seed == options.seeds[0]]
    paths = save(picture(first), options.out, "reflora")
    write_csv(options.out / "reflora.csv", [row_of(curve) for curve in curves])
    print(*paths, options.out / "reflora.csv", sep="\n")


def all_curves(seed: int) -> Iterator[Curve]:
    """Yield the curve of each optimizer, condition, start and method."""
    for optimizer, methods in OPTIMIZERS.items():
        for condition, start, method in product(CONDITIONS, STARTS, methods):
            yield best_curve(optimizer, condition, start, method, seed)


def best_curve(optimizer: str, condition: int, start: str, method: str, seed: int = 0) -> Curve:
    """Return the curve of the rate with the lowest loss after the last step."""
    target = target_of(condition, seed)
    factors = start_of(STARTS[start], seed)
    losses = descend(target, factors, METHODS[method], adam=optimizer == "Adam")
    best = int(losses[-1].argmin())
    relative = losses[:, best] / losses[0, best]
    return Curve(optimizer, condition, start, method, seed, RATES[best].item(), relative)


def target_of(condition: float, seed: int) -> Tensor:
    """Return a matrix with singular values from 1 down to 1 / ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (_normal((size, RANK), generator) for size in SHAPE)
    values = torch.tensor(float(condition), dtype=torch.float64) ** -torch.linspace(0, 1, RANK)
    return torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.mT


def start_of(ratio: float, seed: int) -> Factors:
    """Return random factors with ||B||_F = ``ratio`` ||A||_F.

    The product is the same for all ratios from 1 on. Below, B alone is smaller.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    out_features, in_features = SHAPE
    A = _normal((RANK, in_features), generator) / in_features**0.5
    B = _normal((out_features, RANK), generator)
    B = B * A.norm() / B.norm()
    if ratio < 1:
        return Factors(A, ratio * B)
    return Factors(A / ratio**0.5, B * ratio**0.5)


def descend(target: Tensor, start: Factors, method: Method, adam: bool = False) -> Tensor:
    """Return the losses (``STEPS`` + 1, rates) of a method at all rates."""
    A, B = (factor.expand(len(RATES), -1, -1) for factor in start)
    rates = RATES[:, None, None]
    of_A, of_B = Descent(adam), Descent(adam)
    losses = [squared(B @ A - target)]
    for _ in range(STEPS):
        error = B @ A - target
        g_A, g_B = method(Factors(A, B), (B.mT @ error, error @ A.mT))
        goes_on = (losses[-1] < DIVERGED * losses[0])[:, None, None]
        A = torch.where(goes_on, A - rates * of_A.direction(g_A), A)
        B = torch.where(goes_on, B - rates * of_B.direction(g_B), B)
        losses.append(squared(B @ A - target))
    return torch.stack(losses)


def squared(error: Tensor) -> Tensor:
    """Return half the squared norm of each matrix."""
    return error.square().sum((-2, -1)) / 2


def row_of(curve: Curve) -> dict[str, object]:
    """Return the line of a curve."""
    row = {title: getattr(curve, title) for title in TITLES}
    return row | {
        "rate": f"{curve.rate:.2g}",
        "steps to 1 %": "never" if curve.steps is None else curve.steps,
        "last loss": f"{curve.losses[-1]:.1e}",
    }


def picture(curves: list[Curve]) -> Figure:
    """Return the losses at the largest condition: a row for each optimizer, a column a start."""
    figure, axes = plt.subplots(2, len(STARTS), figsize=(12, 5.5), sharex=True, sharey=True)
    for row, optimizer in zip(axes, OPTIMIZERS, strict=True):
        for axis, start in zip(row, STARTS, strict=True):
            for curve in curves:
                place = (curve.optimizer, curve.condition, curve.start)
                if place == (optimizer, CONDITIONS[-1], start):
                    axis.semilogy(curve.losses, label=curve.method)
            axis.axhline(REACHED, color="grey", linewidth=0.5)
            axis.set_ylim(1e-6, 2)
        row[0].set_ylabel(f"{optimizer}\nloss over the first")
    for axis, start in zip(axes[0], STARTS, strict=True):
        axis.set_title(start)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0][0].legend()
    figure.tight_layout()
    return figure


def _normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


if __name__ == "__main__":
    main()
