"""Measure how far the weight of every target moves, once per window of optimizer updates."""

import math
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from switchlora.adapters import Target
from switchlora.monitor import batched
from switchlora.monitor.measurement import LayerStats, Measurement
from switchlora.monitor.spectral import (
    effective_rank,
    polar_factor,
    spectral_norm,
    stable_rank,
)
from switchlora.process import distributed, exact_products

FIRST_ITERATIONS = 32
NUMBERS = ("weight_norm", "update_norm", "weight_stable_rank", "update_stable_rank", "grad_norm")
"""what is measured of every target, in the order of its row"""
Value = TypeVar("Value")


def goes_together(device: torch.device) -> bool:
    """Return whether the targets of one shape are measured in one product on a device.

    A CPU is faster with one matrix at a time, which stays in its cache.
    """
    return device.type != "cpu"


class WeightUpdates(Mapping[str, Tensor]):
    """The updates W - W_ref of the targets (out, in), float32, each computed when it is asked for.

    They are never all in memory: the switch needs one matrix at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        references: Mapping[str, Tensor],
        decay: float = 0.0,
    ) -> None:
        self._model = model
        self._targets = targets
        self._references = references
        self._decay = decay

    def __getitem__(self, name: str) -> Tensor:
        """Return W - W_ref + c (W + W_ref) / 2, the update without the share of weight decay.

        c is the window's sum of lr * weight decay. With c = 0 the decay stays in.
        """
        weight = self._targets[name].weight(self._model).float()
        reference = self._references[name].to(weight)
        update = weight - reference
        if self._decay:
            update.add_(weight + reference, alpha=self._decay / 2)
        return update

    def only(self, targets: Collection[str]) -> "WeightUpdates":
        """Return the updates of some of the targets."""
        some = _only(targets, self._targets)
        return WeightUpdates(self._model, some, self._references, self._decay)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


@dataclass
class UpdateMonitor:
    """Measures each target every ``window`` updates against a copy from the window's start.

    The copies live on ``device``. It is the CPU by default, so that they do not show in the memory
    table. Spectral norms come from ``iterations`` power iterations, which start from the vector of
    the previous window. Where the model is not on the CPU, targets of one shape are measured
    together. Two options each cost two SVDs per target and window:

    - ``exact`` adds full spectra, with the first ``leading`` singular values, and how much of an
      update lies in the ``leading`` directions of the window before.
    - ``bases`` adds how far the singular bases turned.
    """

    model: nn.Module
    targets: Mapping[str, Target]
    window: int
    device: str | torch.device = "cpu"
    iterations: int = 5
    exact: bool = False
    leading: int = 16
    bases: bool = False
    known: Mapping[str, Target] = field(init=False)
    """all targets; ``targets`` are those of them that are measured now"""
    references: dict[str, Tensor] = field(init=False, default_factory=dict)
    initial_stable_ranks: dict[str, float] = field(init=False, default_factory=dict)
    """stable rank of each weight before training"""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"monitor.window is {self.window}: give at least 1 update")
        self.known = self.targets
        self._vectors: dict[str, Tensor] = {}
        self._directions: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._decay = 0.0
        self._window_start = 0
        self._copying = False
        self.start_window(0)
        self.initial_stable_ranks = self._weights_stable_ranks()

    def observe(self, loss: float, decay: float = 0.0) -> None:
        """Count one update: its train loss and its lr * decoupled weight decay."""
        self._losses.append(loss)
        self._decay += decay

    def due(self, num_updates: int) -> bool:
        """Return whether the window is complete after ``num_updates`` updates."""
        return num_updates - self._window_start >= self.window

    @torch.no_grad()
    @exact_products()
    def measure(self, num_updates: int, epoch: float, share: bool = False) -> Measurement:
        """Return the statistics of every target at the end of the window.

        What cannot be computed, such as the spectrum of a weight that is not finite, is NaN.

        Norms and stable ranks of all targets reach the host in one transfer. With ``share`` each
        rank measures a part of the targets, and all ranks must call this.
        """
        names = list(self.targets)
        ranks = distributed.world_size()
        if share and ranks > 1:
            layers = self._exchanged(self._measure(names[distributed.rank() :: ranks]))
        else:
            layers = self._measure(names)
        loss = math.nan
        if self._losses:
            loss = sum(self._losses) / len(self._losses)
        return Measurement(num_updates, epoch, loss, layers)

    def updates(self, without_decay: bool = False, of: nn.Module | None = None) -> WeightUpdates:
        """Return the movement of the weights over the window.

        ``without_decay`` takes out the share of weight decay. ``of`` is a copy of the model; if
        given, the present weights are read from it.
        """
        self._wait_for_copies()
        decay = self._decay if without_decay else 0.0
        return WeightUpdates(of or self.model, self.targets, self.references, decay)

    def watch(self, names: Collection[str], num_updates: int) -> None:
        """Measure only these of the known targets from now on, in a new window.

        The copies and vectors of the other targets are released.
        """
        self.targets = _only(names, self.known)
        self.references = _only(names, self.references)
        of_updates = map(_key_of_update, names)
        self._vectors = _only({*names, *of_updates}, self._vectors)
        self._directions = _only(names, self._directions)
        self.start_window(num_updates)

    @torch.no_grad()
    def start_window(self, num_updates: int) -> None:
        """Take the present weights as the reference of a new window."""
        for name, target in self.targets.items():
            weight = target.weight(self.model)
            if name not in self.references:
                self.references[name] = _place_for(weight, self.device)
            self.references[name].copy_(weight, non_blocking=True)
        self._losses.clear()
        self._decay = 0.0
        self._window_start = num_updates
        to_host = torch.device(self.device).type == "cpu"
        self._copying = to_host and self._model_device.type == "cuda"

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next measurement depends on, as plain types and tensors."""
        self._wait_for_copies()
        return {
            "window": self.window,
            "references": self.references,
            "initial_stable_ranks": self.initial_stable_ranks,
            "vectors": self._vectors,
            "directions": self._directions,
            "losses": self._losses,
            "decay": self._decay,
            "window_start": self._window_start,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; ValueError if it is of other targets."""
        if set(state["initial_stable_ranks"]) != set(self.known):
            raise ValueError("the checkpoint measured other switch.targets: give the same")
        self.watch(state["references"], state["window_start"])
        self._wait_for_copies()  # of the present weights, which are still on their way
        for name, reference in state["references"].items():
            self.references[name].copy_(reference)
        self.initial_stable_ranks = dict(state["initial_stable_ranks"])
        device = next(self.model.parameters()).device
        self._vectors = {key: vector.to(device) for key, vector in state["vectors"].items()}
        for name, rows in state["directions"].items():
            self._directions[name] = rows.to(device)
        self._losses = list(state["losses"])
        self._decay = state["decay"]
        self._window_start = state["window_start"]
        self.window = state["window"]

    def _measure(self, names: Sequence[str]) -> dict[str, LayerStats]:
        rows = self._rows_together(names) if self._is_batched else self._rows_one_by_one(names)
        layers = {}
        for name, row in zip(names, rows, strict=True):
            numbers = dict(zip(NUMBERS, row, strict=True))
            stats: dict[str, Any] = {**numbers, **self._exact_stats(name)}
            layers[name] = LayerStats(**stats)
        return layers

    def _exchanged(self, own: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
        """Return what all ranks measured, and take over their vectors and directions."""
        vectors = _only({*own, *map(_key_of_update, own)}, self._vectors)
        directions = _only(own, self._directions)
        found: dict[str, LayerStats] = {}
        for layers, *tensors in distributed.gather((own, _on_host(vectors), _on_host(directions))):
            found.update(layers)
            self._take_over(*tensors)
        return {name: found[name] for name in self.targets}

    def _take_over(self, vectors: Mapping[str, Tensor], directions: Mapping[str, Tensor]) -> None:
        for own, others in ((self._vectors, vectors), (self._directions, directions)):
            for key, tensor in others.items():
                own[key] = tensor.to(self._model_device)

    @property
    def _model_device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _is_batched(self) -> bool:
        return goes_together(self._model_device)

    def _rows_one_by_one(self, names: Sequence[str]) -> list[list[float]]:
        measured = [self._measure_target(name) for name in names]
        return torch.stack(measured).tolist() if measured else []

    def _rows_together(self, names: Sequence[str]) -> list[list[float]]:
        """Return what ``_rows_one_by_one`` returns, with one kernel for targets of one shape."""
        sketches = []
        for group in self._groups(names):
            weights = self._stacked(group)
            sketches.append(self._sketch(group, weights))
            updates = weights.sub_(self._stacked_references(group))
            sketches.append(self._sketch([*map(_key_of_update, group)], updates))
        measured, grad_norms = batched.measure(sketches, self._grad_norms(names))
        self._vectors.update(measured.vectors)
        rows = []
        for name, grad_norm in zip(names, grad_norms, strict=True):
            keys = (name, _key_of_update(name))
            norms = [measured.norms[key] for key in keys]
            ranks = [measured.stable_ranks[key] for key in keys]
            rows.append([*norms, *ranks, grad_norm])
        return rows

    @exact_products()
    def _weights_stable_ranks(self) -> dict[str, float]:
        if not self._is_batched:
            ranks = [self._weight_stats(name)[1] for name in self.targets]
            return dict(zip(self.targets, torch.stack(ranks).tolist(), strict=True))
        groups = self._groups(list(self.targets))
        sketches = [self._sketch(group, self._stacked(group)) for group in groups]
        measured, _ = batched.measure(sketches, torch.empty(0, device=self._model_device))
        self._vectors.update(measured.vectors)
        return {name: measured.stable_ranks[name] for name in self.targets}

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        return batched.of_one_shape({name: self.references[name].shape for name in names})

    def _stacked(self, names: Sequence[str]) -> Tensor:
        weights = torch.stack([self.targets[name].weight(self.model) for name in names])
        return weights.float()

    def _stacked_references(self, names: Sequence[str]) -> Tensor:
        references = [self.references[name] for name in names]
        here = [each.to(self._model_device, non_blocking=True) for each in references]
        return torch.stack(here)

    def _sketch(self, keys: Sequence[str], matrices: Tensor) -> batched.Sketch:
        known = all(key in self._vectors for key in keys)
        iterations = self.iterations if known else FIRST_ITERATIONS
        if known:
            starts = torch.stack([self._vectors[key].to(matrices.device) for key in keys])
        else:
            starts = _start_vector(matrices[0]).expand(len(keys), -1)
        return batched.sketch(keys, matrices, starts, iterations)

    def _grad_norms(self, names: Sequence[str]) -> Tensor:
        """Return the norms of the targets' gradients (n,); NaN where there is none."""
        norms = torch.full((len(names),), math.nan)
        grads = {}
        for place, name in enumerate(names):
            grad = self.targets[name].grad(self.model)
            if grad is not None:
                grads[place] = grad.float()
        norms = norms.to(self._model_device, non_blocking=True)
        if grads:
            places = torch.tensor([*grads]).to(self._model_device, non_blocking=True)
            norms[places] = torch.stack(torch._foreach_norm([*grads.values()]))
        return norms

    def _wait_for_copies(self) -> None:
        """Wait until the copies of the weights have reached the host's memory."""
        if self._copying:
            torch.cuda.synchronize(self._model_device)
        self._copying = False

    def _measure_target(self, name: str) -> Tensor:
        weight_norm, weight_stable = self._weight_stats(name)
        update = self.updates()[name]
        update_norm = torch.linalg.vector_norm(update)
        update_spectral = self._spectral_norm(_key_of_update(name), update)
        update_stable = stable_rank(update_norm, update_spectral)
        grad = self.targets[name].grad(self.model)
        if grad is None:
            grad_norm = torch.full_like(weight_norm, math.nan)
        else:
            grad_norm = torch.linalg.vector_norm(grad.float())
        return torch.stack([weight_norm, update_norm, weight_stable, update_stable, grad_norm])

    def _weight(self, name: str) -> Tensor:
        weight = self.targets[name].weight(self.model)
        return weight.float()

    def _weight_stats(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the norm and the stable rank of a target's weight."""
        weight = self._weight(name)
        norm = torch.linalg.vector_norm(weight)
        spectral = self._spectral_norm(name, weight)
        return norm, stable_rank(norm, spectral)

    def _spectral_norm(self, key: str, matrix: Tensor) -> Tensor:
        if key in self._vectors:
            start = self._vectors[key].to(matrix.device)  # which may have moved
            iterations = self.iterations
        else:
            start = _start_vector(matrix)
            iterations = FIRST_ITERATIONS
        try:
            norm, vector = spectral_norm(matrix, start, iterations)
        except torch.linalg.LinAlgError:  # an entry that is not finite, or no convergence
            return matrix.new_tensor(math.nan)
        self._vectors[key] = torch.where(vector.isfinite().all(), vector, start)
        return norm

    def _exact_stats(self, name: str) -> dict[str, Any]:
        stats: dict[str, Any] = {}
        if self.bases:
            stats["basis_stability"] = self._basis_stability(name)
        if self.exact:
            update = self.updates()[name]
            values, rows = _spectrum(update)
            spectra = {"weight": _singular_values(self._weight(name)), "update": values}
            for of, spectrum in spectra.items():
                leading = spectrum[: self.leading]
                stats[f"{of}_effective_rank"] = effective_rank(spectrum)
                stats[f"{of}_singular_values"] = tuple(leading.tolist())
            if name in self._directions:
                kept = _energy_along(update, self._directions[name])
                stats["update_kept_energies"] = tuple(kept.tolist())
            self._directions[name] = rows[: self.leading]
        return stats

    def _basis_stability(self, name: str) -> float:
        """Return OIALR's statistic (arXiv 2401.08505): how little the singular bases turned.

        It compares the columns of U V^T now and at the start of the window; for a wide W those of
        its transpose. These columns are orthonormal, so the mean of their cosines is an inner
        product.
        """
        weight = self._weight(name)
        reference = self.references[name].to(weight)
        now = polar_factor(weight)
        before = polar_factor(reference)
        cosines = (now * before).sum()
        return float(cosines / min(weight.shape))


def _only(names: Container[str], values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name in names}


def _key_of_update(name: str) -> str:
    """Return the key of the vector for a target's update; its weight's key is the name alone."""
    return f"{name}:update"


def _singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values; NaN where the decomposition fails."""
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError:
        return matrix.new_full((min(matrix.shape),), math.nan)


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values and, as rows, right singular vectors; NaN where that fails."""
    try:
        _, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        smaller = min(matrix.shape)
        return matrix.new_full((smaller,), math.nan), torch.full_like(matrix[:smaller], math.nan)
    return values, Vh


def _energy_along(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return ||M v||^2 / ||M||_F^2 for each of the orthonormal ``rows`` v (k, n)."""
    along = (matrix @ rows.mT).square().sum(dim=0)
    return along / matrix.square().sum()


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, each with memory of its own."""
    return {key: tensor.cpu().clone() for key, tensor in tensors.items()}


def _place_for(weight: Tensor, device: str | torch.device) -> Tensor:
    """Return an empty tensor like ``weight``; on the host of a GPU its memory is pinned."""
    from_gpu = weight.is_cuda and torch.device(device).type == "cpu"
    return torch.empty_like(weight, device=device, pin_memory=from_gpu)


def _start_vector(matrix: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    _, in_features = matrix.shape
    vector = torch.randn(in_features, generator=generator)
    unit = vector / torch.linalg.vector_norm(vector)
    return unit.to(matrix)
