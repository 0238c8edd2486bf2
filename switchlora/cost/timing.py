"""Measure how much faster factors are than their target, to see which targets stay dense."""

from collections.abc import Callable, Iterable, Mapping
from statistics import median
from timeit import Timer

import torch
from torch import Tensor, nn

from switchlora.adapters import Adapter, Target, factorized_linear
from switchlora.learner import autocast
from switchlora.models import eval_mode

ROUNDS = 7
SHORTEST = 2e-3
"""least seconds of a timed block; shorter steps are repeated in it"""


def measured_gains(
    model: nn.Module,
    targets: Mapping[str, Target],
    ranks: Mapping[str, int],
    example_inputs: Tensor,
    precision: str = "fp32",
) -> dict[str, float]:
    """Return, per target in ``ranks``, the seconds of the target over the seconds of its factors.

    Forward and backward pass are timed together. Cuttlefish (Wang et al., arXiv 2305.02538)
    factorises a layer only when this ratio is 1.5 or more. Fresh layers are timed. Their inputs
    have the shape and type that the target's module gets when ``model`` computes
    ``example_inputs``. Targets that are alike are timed once. The model and the global RNG stay
    as they are.
    """
    names = {targets[name].module for name in ranks}
    inputs = _inputs_of(model, names, example_inputs, precision)
    device = next(model.parameters()).device
    gains: dict[tuple, float] = {}
    found = {}
    for name, rank in ranks.items():
        module, rows = targets[name].module, targets[name].rows
        x, bias = inputs[module], model.get_submodule(module).bias is not None
        key = (x.shape, x.dtype, rows.stop - rows.start, rank, bias)
        if key not in gains:
            gains[key] = _gain(x, device, key[2], rank, bias, precision)
        found[name] = gains[key]
    return found


def linear_and_factors(
    inputs: int, outputs: int, rank: int, bias: bool = True, device: torch.device | None = None
) -> tuple[nn.Linear, nn.Linear]:
    """Return a fresh dense linear and a fresh factorised one of the same shape; both train."""
    linear = nn.Linear(inputs, outputs, bias, device=device)
    A = torch.randn(rank, inputs, device=device) / inputs**0.5
    B = torch.randn(outputs, rank, device=device) / rank**0.5
    return linear, factorized_linear(linear, {"": Adapter(A, B, slice(0, outputs), 1.0)})


def forward_and_backward(module: nn.Module, x: Tensor, precision: str) -> Callable[[], object]:
    """Return a step to be timed: the outputs, then the gradients of ``x`` and all parameters."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]

    def outputs() -> Tensor:
        with autocast(x.device.type, precision):
            return module(x)

    direction = torch.randn_like(outputs())
    return lambda: torch.autograd.grad(outputs(), wanted, direction)


def synchronised_clock() -> float:
    """Return the time in seconds, after the queued work of a GPU is done."""
    from torch.utils.benchmark import timer  # this import loads setuptools

    return timer()


def interleaved_seconds(
    steps: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = synchronised_clock,
) -> dict[str, list[float]]:
    """Time each of ``steps`` ``rounds`` times; return its seconds in each round.

    The steps take turns after a warm-up. Other work on the machine thus slows all of them alike.
    The default ``clock`` waits for the queued work of a GPU. ``time.process_time`` leaves out the
    time of other processes.
    """
    timers = {name: Timer(step, timer=clock) for name, step in steps.items()}
    repeats = {n: max(1, round(SHORTEST / min(t.repeat(2, 1)))) for n, t in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeats[name]) / repeats[name])
    return seconds


def _gain(
    x: Tensor, device: torch.device, outputs: int, rank: int, bias: bool, precision: str
) -> float:
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        dense, factors = linear_and_factors(x.shape[-1], outputs, rank, bias, device)
        filled = torch.randn(x.shape, device=device).to(x.dtype)
        steps = {
            "dense": forward_and_backward(dense, filled, precision),
            "factors": forward_and_backward(factors, filled, precision),
        }
        seconds = interleaved_seconds(steps)
    return median(seconds["dense"]) / median(seconds["factors"])


@torch.no_grad()
def _inputs_of(
    model: nn.Module, names: Iterable[str], example_inputs: Tensor, precision: str
) -> dict[str, Tensor]:
    """Return the input of each named module, as a tensor without content."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        return lambda _, inputs: found.update({name: inputs[0].to("meta")})

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    device = next(model.parameters()).device
    try:
        with eval_mode(model), autocast(device.type, precision):
            model(example_inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
