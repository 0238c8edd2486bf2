"""Time steps in turns, and measure in this way how much faster factors are than their target.

In a round each step is timed once. Other work on the machine thus slows all steps alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from random import Random
from statistics import median
from time import perf_counter, process_time
from timeit import Timer
from typing import TypeVar

import torch
from torch import Tensor, nn

from switchlora.adapters import Adapter, Target, factorized_linear
from switchlora.learner import autocast
from switchlora.models import eval_mode

T = TypeVar("T")
Step = Callable[[], object]
Clock = Callable[[], float]
MakesFactors = Callable[[nn.Linear, Mapping[str, Adapter]], nn.Linear]
ROUNDS = 7
SHORTEST = 2e-3
"""least seconds of a timed block; shorter steps are repeated in it"""


def clock_of(device: torch.device) -> Clock:
    """Return a clock, in seconds, that waits for the queued work of ``device`` at each reading."""
    if device.type != "cuda":
        return perf_counter

    def synchronised_clock() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return synchronised_clock


def work_clock_of(device: torch.device) -> tuple[str, Clock]:
    """Return the name and the clock of the time that other processes disturb least.

    - On a CPU: 'processor'. The time of other processes is left out.
    - Elsewhere: 'wall', with ``clock_of(device)``.
    """
    if device.type == "cpu":
        return "processor", process_time
    return "wall", clock_of(device)


def seconds_of(step: Step, clock: Clock, repeats: int = 1) -> float:
    """Return the seconds of one call of ``step``, the mean of ``repeats`` calls in a row.

    The garbage collector rests meanwhile.
    """
    return Timer(step, timer=clock).timeit(repeats) / repeats


def take_turns(
    laps: Mapping[str, Callable[[], T]],
    warmup: int,
    shuffle: bool = False,
) -> Iterator[dict[str, T]]:
    """Yield what each of ``laps`` returns, by name, round after round without end.

    In a round each lap is called once, in the order of ``laps``. With ``shuffle`` the order is
    random. It then depends on the number of the round alone, so that all ranks have the same one.
    The first ``warmup`` rounds are made but not yielded.
    """
    for number in count():
        names = list(laps)
        if shuffle:
            names = Random(number).sample(names, len(names))
        found = {name: laps[name]() for name in names}
        if number >= warmup:
            yield found


def by_name(rounds: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """Return what each name got in the ``rounds``, one entry per round."""
    found: dict[str, list[T]] = {}
    for laps in rounds:
        for name, value in laps.items():
            found.setdefault(name, []).append(value)
    return found


def interleaved_seconds(
    steps: Mapping[str, Step],
    rounds: int,
    clock: Clock,
) -> dict[str, list[float]]:
    """Time each of ``steps`` in each of ``rounds``; return its seconds, one entry per round.

    A step is called twice as a warm-up, which also tells how often a block repeats it.
    """
    laps = {}
    for name, step in steps.items():
        warmup = [seconds_of(step, clock) for _ in range(2)]
        repeats = max(1, round(SHORTEST / min(warmup)))
        laps[name] = partial(seconds_of, step, clock, repeats)
    return by_name(islice(take_turns(laps, warmup=0), rounds))


def measured_gains(
    model: nn.Module,
    targets: Mapping[str, Target],
    ranks: Mapping[str, int],
    example_inputs: Tensor,
    precision: str = "fp32",
    make: MakesFactors = factorized_linear,
) -> dict[str, float]:
    """Return, per target in ``ranks``, the seconds of the target over the seconds of its factors.

    Forward and backward pass are timed together. Cuttlefish (Wang et al., arXiv 2305.02538)
    factorises a layer only when this ratio is 1.5 or more. Fresh layers are timed. Their inputs
    have the shape and type that the target's module gets when ``model`` computes
    ``example_inputs``. Targets that are alike are timed once. The model and the global RNG stay
    as they are. ``make`` makes the layer with factors.
    """
    names = {targets[name].module for name in ranks}
    inputs = _inputs_of(model, names, example_inputs, precision)
    device = next(model.parameters()).device
    gains: dict[tuple, float] = {}
    found = {}
    for name, rank in ranks.items():
        target = targets[name]
        x = inputs[target.module]
        outputs = target.rows.stop - target.rows.start
        bias = model.get_submodule(target.module).bias is not None
        key = (x.shape, x.dtype, outputs, rank, bias)
        if key not in gains:
            gains[key] = _gain(x, device, outputs, rank, bias, precision, make)
        found[name] = gains[key]
    return found


def linear_and_factors(
    inputs: int,
    outputs: int,
    rank: int,
    bias: bool = True,
    device: torch.device | None = None,
    make: MakesFactors = factorized_linear,
) -> tuple[nn.Linear, nn.Linear]:
    """Return a fresh dense linear and a fresh one of factors of the same shape; both train."""
    linear = nn.Linear(inputs, outputs, bias, device=device)
    A = torch.randn(rank, inputs, device=device) / inputs**0.5
    B = torch.randn(outputs, rank, device=device) / rank**0.5
    adapter = Adapter(A, B, slice(0, outputs), 1.0)
    return linear, make(linear, {"": adapter})


def forward_and_backward(module: nn.Module, x: Tensor, precision: str) -> Step:
    """Return a step to be timed: the outputs, then the gradients of ``x`` and all parameters."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]

    def outputs() -> Tensor:
        with autocast(x.device.type, precision):
            return module(x)

    direction = torch.randn_like(outputs())
    return lambda: torch.autograd.grad(outputs(), wanted, direction)


def _gain(
    x: Tensor,
    device: torch.device,
    outputs: int,
    rank: int,
    bias: bool,
    precision: str,
    make: MakesFactors,
) -> float:
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(generators), torch.enable_grad():
        dense, factors = linear_and_factors(x.shape[-1], outputs, rank, bias, device, make)
        filled = torch.randn(x.shape, device=device).to(x.dtype)
        steps = {
            "dense": forward_and_backward(dense, filled, precision),
            "factors": forward_and_backward(factors, filled, precision),
        }
        seconds = interleaved_seconds(steps, ROUNDS, clock_of(device))
    return median(seconds["dense"]) / median(seconds["factors"])


@torch.no_grad()
def _inputs_of(
    model: nn.Module,
    names: Iterable[str],
    example_inputs: Tensor,
    precision: str,
) -> dict[str, Tensor]:
    """Return the input of each named module, as a tensor without content."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = inputs[0].to("meta")

    hooks = []
    for name in names:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(partial(note, name)))
    device = next(model.parameters()).device
    try:
        with eval_mode(model), autocast(device.type, precision):
            model(example_inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
