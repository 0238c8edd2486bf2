r"""How near the edge of stability is a switch? ``python scripts/edge.py RUN UPDATE``.

RUN switches at UPDATE, the number of its checkpoint of just before. With D the step of the
optimizer for a gradient of 1, relative to the learning rate eta of the weights, the script finds

    eta lambda_max(D^1/2 H D^1/2)

for the Hessian H of the loss: once for all that full training moves, once for all that trains
after the switch. Adam with beta_1 = 0.9 is stable on a quadratic loss while that is below
2 (1 + beta_1) / (1 - beta_1) = 38, and full training comes to rest there (Cohen et al., arXiv
2207.14484). D is the scale of a tensor's rate over the root mean square of its gradients.

Words after UPDATE change the run's settings: ``adapter.matched_step=2``.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import switchlora.cli  # noqa: F401  # the words of configurations
from switchlora.adapters import adapted_modules, is_factor
from switchlora.bench.systems import QUIET
from switchlora.process import USER_ERRORS, one_line
from switchlora.run import Run, consider_switch, end_window, prepare
from switchlora.storage import read_config
from switchlora.storage.retention import name_of

GRADIENTS = 10
"""batches whose gradients tell the optimizer's steps"""
IMAGES = 256
"""images of the loss whose Hessian it is"""
EPS = 1e-8
ON_CPU = {"system": {"device": "cpu"}}
PRECISE = 0.02
"""of the eigenvalue, relative"""

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensor, Tensor], Tensor]
"""the loss of these tensors on inputs and labels"""


@dataclass(frozen=True)
class Training:
    """What trains: tensors by name, their loss, and how their rates relate to eta."""

    tensors: Tensors
    loss: Loss
    scales: Mapping[str, float]


def main() -> None:
    """Print the two numbers, and write them beside the settings where ``--out`` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("update", type=int)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--checkpoints", type=Path, help="folder of UPDATE's checkpoint")
    parser.add_argument("--out", type=Path, help="file that gets one more line of JSON")
    asked = parser.parse_args()
    place = asked.checkpoints or asked.run / "checkpoints"
    changed = [f"resume={place / name_of(asked.update)}", *asked.words]
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(changed_config(asked.run, changed), Path(folder))
    except (*USER_ERRORS, OmegaConfBaseException) as error:
        sys.exit(f"edge: {one_line(error)}")
    line = json.dumps({"run": asked.run.name, "update": asked.update, **found})
    print(line)
    if asked.out is not None:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def changed_config(run: Path, words: list[str]) -> DictConfig:
    """Return the configuration of ``run`` with these ``words``, for a run of its own."""
    merged = OmegaConf.merge(read_config(run), QUIET, ON_CPU, OmegaConf.from_dotlist(words))
    assert isinstance(merged, DictConfig)
    return merged


def measure(config: DictConfig, folder: Path) -> dict[str, object]:
    """Return how near the edge full training and the adapter are where the run switches."""
    run = prepare(config, folder)
    with run.log:
        plain = copy.deepcopy(run.model).eval()
        rate = run.learner.set_lr(run.state.num_updates)
        switch(run)
    batches = first_batches(run, GRADIENTS)
    some = first_images(batches, IMAGES)
    both = {"full": full_training(run, plain), "adapter": adapter_training(run, plain)}
    found = {name: rate * sharpness(each, batches, some) for name, each in both.items()}
    scales = [value for name, value in both["adapter"].scales.items() if is_factor(name, "B")]
    return {
        "seed": run.config["seed"],
        "lr": rate,
        "factor_lr": round(math.exp(np.mean(np.log(scales))), 2),
        **{name: round(value, 1) for name, value in found.items()},
    }


def switch(run: Run) -> None:
    """Let the run switch at its present update."""
    if run.state.history:
        consider_switch(run)
    if run.state.switch_update is None:
        end_window(run)
    if run.state.switch_update is None:
        raise ValueError(f"the run does not switch at update {run.state.num_updates}")


def first_batches(run: Run, number: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first batches of the present epoch."""
    run.data.set_epoch(run.state.epoch)
    return list(islice(run.data.train, number))


def first_images(batches: list[tuple[Tensor, Tensor]], number: int) -> tuple[Tensor, Tensor]:
    """Return so many images of the ``batches`` with their labels."""
    images, labels = map(torch.cat, zip(*batches, strict=True))
    return images[:number], labels[:number]


def full_training(run: Run, plain: nn.Module) -> Training:
    """Return what trained before the switch: ``run.state.full_parameters`` of ``plain``."""
    tensors = {name: plain.get_parameter(name) for name in run.state.full_parameters}
    return Training(tensors, loss_of(run, plain), dict.fromkeys(tensors, 1.0))


def adapter_training(run: Run, plain: nn.Module) -> Training:
    """Return what trains after the switch; the loss is that of ``plain`` with W_res + s B A."""
    modules = adapted_modules(run.model)
    residuals = {name: each.residual().detach() for name, each in modules.items()}
    loss_of_plain = loss_of(run, plain)
    named = dict(run.model.named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    scales = {}
    for group in run.learner.optimizer.param_groups:
        scales |= {names[parameter]: group["lr_scale"] for parameter in group["params"]}

    def loss(tensors: Tensors, inputs: Tensor, labels: Tensor) -> Tensor:
        weights = {name: each for name, each in tensors.items() if not is_factor(name)}
        for name, module in modules.items():
            parts = []
            for part, (A, B, rows, scaling) in module.adapters().items():
                end = f".{part}" if part else ""
                A = tensors.get(f"{name}.lora_A{end}", A.detach())
                B = tensors.get(f"{name}.lora_B{end}", B.detach())
                parts.append(torch.addmm(residuals[name][rows], B, A, alpha=scaling))
            weights[f"{name}.weight"] = torch.cat(parts)
        return loss_of_plain(weights, inputs, labels)

    return Training({name: named[name] for name in scales}, loss, scales)


def loss_of(run: Run, plain: nn.Module) -> Loss:
    """Return the training loss of ``plain`` with some of its tensors replaced."""

    def loss(tensors: Tensors, inputs: Tensor, labels: Tensor) -> Tensor:
        return run.data.loss(functional_call(plain, dict(tensors), (inputs,)), labels)

    return loss


def sharpness(
    training: Training, batches: list[tuple[Tensor, Tensor]], some: tuple[Tensor, Tensor]
) -> float:
    """Return lambda_max(D^1/2 H D^1/2) of the loss on ``some`` images."""
    leaves = {name: each.detach().requires_grad_() for name, each in training.tensors.items()}
    squares = {name: torch.zeros_like(each) for name, each in leaves.items()}
    for inputs, labels in batches:
        loss = training.loss(leaves, inputs, labels)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for square, grad in zip(squares.values(), grads, strict=True):
            square.addcmul_(grad, grad, value=1 / len(batches))
    steps = {}
    for name, square in squares.items():
        moves = square > 0  # Adam leaves alone what has no gradient, such as A beside B = 0
        steps[name] = training.scales[name] * moves / (square.sqrt() + EPS)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        return largest_eigenvalue(lambda tensors: training.loss(tensors, *some), leaves, steps)


def largest_eigenvalue(loss: Callable[[Tensors], Tensor], at: Tensors, steps: Tensors) -> float:
    """Return lambda_max(D^1/2 H D^1/2) by Lanczos' iteration; ``steps`` are the diagonal of D."""
    leaves = list(at.values())
    grads = torch.autograd.grad(loss(at), leaves, create_graph=True)
    sizes = [leaf.numel() for leaf in leaves]
    roots = torch.cat([step.flatten() for step in steps.values()]).sqrt()

    def product(vector: np.ndarray) -> np.ndarray:
        scaled = roots * torch.from_numpy(vector).flatten().to(roots.dtype)
        parts = zip(grads, scaled.split(sizes), strict=True)
        along = torch.stack([(grad.flatten() * part).sum() for grad, part in parts]).sum()
        curved = torch.autograd.grad(along, leaves, retain_graph=True)
        return (roots * torch.cat([each.flatten() for each in curved])).double().numpy()

    start = (roots * torch.cat([grad.detach().flatten() for grad in grads])).double().numpy()
    operator = LinearOperator((len(roots),) * 2, matvec=product, dtype=np.float64)
    options = {"which": "LA", "tol": PRECISE, "ncv": 8, "return_eigenvectors": False}
    return float(eigsh(operator, k=1, v0=start, **options)[0])


if __name__ == "__main__":
    main()
