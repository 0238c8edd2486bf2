"""Compare the measured and the predicted bytes of everything that training holds.

The measurement reads this rank's live tensors. The prediction uses only the shapes of the model.
Both are made after the first update of a phase.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlora.adapters import adapted_modules, is_factor, parameter_sizes
from switchlora.cost import stepped, without_content
from switchlora.learner import (
    SavedTensors,
    autocast,
    held_bytes,
    is_sharded,
    local,
    loss_of,
    operands_within_update,
)
from switchlora.process import is_primary, one_line, world_size
from switchlora.run.messages import memory_metrics, memory_table
from switchlora.run.run import Run
from switchlora.run.state import Phase

Bytes = dict[str, int | None]  # bytes by part; None for a part that is not known


def record_memory(run: Run) -> None:
    """Record the bytes of the present phase in the state, the log and the terminal.

    All ranks measure. The primary rank also predicts, unless ``log.cost_model`` is off.
    """
    state, predicts = run.state, is_primary() and run.config["log"]["cost_model"]
    with run.stopwatch.paused():
        measured = measure_memory(run)
        predicted = predict_memory(run) if predicts else dict.fromkeys(measured)
        run.ledger.memory[state.phase] = {"measured": measured, "predicted": predicted}
        metrics = memory_metrics(measured, predicted)
        run.log.event("memory", state.num_updates, run.epoch, **metrics)
        if state.phase is not Phase.FULL:
            for line in memory_lines(run):
                run.log.line(line)


def memory_lines(run: Run) -> list[str]:
    """Return the memory table of the full and the latest phase, one line per row."""
    memory = {str(phase): found for phase, found in run.ledger.memory.items()}
    return memory_table(memory, model=run.device.type, reference=_reference_device(run))


def measure_memory(run: Run) -> Bytes:
    """Return the bytes of each part that this rank holds after an update.

    Gradients must still be in place. 'ddp_buckets' are the bytes of the gradients' storages beyond
    the gradients themselves. 'activations' are the bytes that autograd kept for the backward pass
    of one micro-batch.
    """
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    gradient_bytes = sum(local(gradient).nbytes for gradient in gradients)
    averaged = [] if run.ema is None else _tensors(run.ema.model)
    found = {
        "parameters": held_bytes(_tensors(run.model)),
        "gradients": gradient_bytes,
        "optimizer_state": held_bytes(_moments(run.learner.optimizer)),
        "ema": held_bytes(averaged),
        "monitor_reference": held_bytes(run.monitor.references.values()),
        "ddp_buckets": held_bytes(gradients) - gradient_bytes,
        "activations": run.learner.activation_bytes,
    }
    return {**found, "total": _total(run, found)}


def predict_memory(run: Run) -> Bytes:
    """Predict the same parts from shapes alone.

    The prediction makes three assumptions:
    - Training keeps no tensor that it no longer needs.
    - Gradients live in DDP's buckets and nowhere else, so 'ddp_buckets' is 0.
    - Every shard has the mean size over all ranks.

    A part that cannot be predicted is None.
    """
    model = run.learner.bones or run.model
    shards = world_size() if is_sharded(run.model) else 1
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    references = sum(target.weight(model).nbytes for target in run.monitor.targets.values())
    moments = _attempted(run, "the optimizer's state", lambda: predict_moments(run, model))
    found: Bytes = {
        "parameters": held_bytes(_tensors(model)) // shards,
        "gradients": trained // shards,
        "optimizer_state": None if moments is None else moments // shards,
        "ema": _plain_bytes(model) if run.ema else 0,
        "monitor_reference": references,
        "ddp_buckets": 0,
        "activations": _attempted(run, "activations", lambda: predict_activations(run, model)),
    }
    return {**found, "total": _total(run, found)}


def predict_moments(run: Run, model: nn.Module) -> int:
    """Return the bytes of the optimizer's state for ``model``.

    The optimizer makes one step on tensors without content (shapes only).
    """
    with without_content(model, run.device) as hollow:
        return held_bytes(_moments(stepped(hollow, run.recipe)))


def predict_activations(run: Run, model: nn.Module) -> int:
    """Return the bytes that autograd keeps for one micro-batch.

    They come from a forward pass on tensors without content (shapes only).
    """
    recipe, device = run.recipe, run.device
    inputs, labels = run.data.example(run.micro_batch)
    saved = SavedTensors()
    with without_content(model, device) as model:
        inputs = torch.empty_like(inputs, device=device)
        labels = torch.empty_like(labels, device=device)
        within = nullcontext() if is_sharded(run.model) else operands_within_update(model, recipe)
        with within, autocast(device.type, recipe.precision), saved:
            loss = loss_of(run.data.loss, model(inputs), labels)
        kept = saved.bytes_beside(model)
        del loss  # its graph kept the saved tensors alive until here
        return kept


def _attempted(run: Run, what: str, predict: Callable[[], int]) -> int | None:
    """Return ``predict()``; when it raises, log a line and return None.

    A model, loss or optimizer from outside may read tensor values, which do not exist here. That
    should not end the run.
    """
    try:
        return predict()
    except Exception as error:
        run.log.line(f"the bytes of {what} cannot be predicted: {one_line(error)}")
        return None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _moments(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield value


def _plain_bytes(model: nn.Module) -> int:
    """Return the bytes of ``model`` without its factors, with every weight kept whole.

    Floating-point tensors count at least 4 bytes an element, so that residual weights count as
    before their rounding to bf16. So do the numbers that codes stand for, and those of a weight
    that the factors replaced.
    """
    size, coded = 0, set()
    for name, module in adapted_modules(model).items():
        if module.weight is None:
            size += 4 * module.in_features * module.out_features
        elif module.coded is not None:
            coded.add(f"{name}.weight")
    numbers = parameter_sizes(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_factor(name):
            continue
        least = 4 if tensor.is_floating_point() or name in coded else 0
        size += numbers.get(name, tensor.numel()) * max(tensor.itemsize, least)
    return size


def _total(run: Run, found: Bytes) -> int | None:
    """Return the total on the model's device; None when any part is unknown.

    The monitor's reference counts only when it is on the same device.
    """
    total = 0
    for part, size in found.items():
        if part == "monitor_reference" and _reference_device(run) != run.device.type:
            continue
        if size is None:
            return None
        total += size
    return total


def _reference_device(run: Run) -> str:
    return torch.device(run.monitor.device).type
