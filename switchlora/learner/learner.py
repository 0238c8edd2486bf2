"""The learner: a model with its optimizer, schedule and wrappers, rebuilt at each switch."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from switchlora.adapters import (
    AdaptedLinear,
    GuidedLinear,
    add_frobenius_decay,
    draw_dense,
    drop_skipped_gradients,
    guided_layers,
    hold_frozen_statistics,
    operands_kept,
    trained_adapters,
)
from switchlora.learner.awaited import Awaited
from switchlora.learner.compiling import CompiledBlocks, compile_of, made_compiled
from switchlora.learner.counters import FlopCounter, SavedTensors
from switchlora.learner.recipe import (
    Recipe,
    autocast,
    build_optimizer,
    check_goes_with_fsdp,
    loss_of,
    precision_of,
    skips_by_itself,
)
from switchlora.learner.sharding import gathered, is_sharded, shard, skeleton
from switchlora.process import full, mean_of_ranks, one_line, total, world_size

if TYPE_CHECKING:
    from switchlora.learner.reflora import FactorBalance

PARALLEL = ("ddp", "fsdp")
COMPRESSIONS = {"bf16": bf16_compress_hook}


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of one optimizer update.

    ``applied`` is False when the loss or the gradient was not finite.
    """

    loss: float
    """mean over the batch and all ranks"""
    grad_norm: float
    lr: float
    applied: bool
    overflow: bool = False
    """a finite loss with a scaled fp16 gradient that was too large: the scaler lowers its scale"""


Pending = Callable[[], StepOutcome]
"""waits for the outcome of an update whose step was launched, and returns it"""


@dataclass
class Learner:
    """A model with its optimizer, schedule and wrappers, rebuilt when the trained tensors change.

    Build it with ``build_learner``.
    """

    model: nn.Module
    """the plain module, or the sharded one"""
    forward: Callable[[Tensor], Tensor]
    """the model, or its wrapper by DDP"""
    optimizer: Optimizer
    scheduler: Scheduler
    recipe: Recipe
    start: int
    """update at which this learner took over"""
    total_updates: int = 0
    """updates of the whole run"""
    ramp_updates: int = 0
    """length of the ramp of the learning rate after ``start``"""
    since: int = 0
    """updates since ``start``, not counting the present one"""
    scaler: GradScaler | None = None
    """scales the loss in fp16; None in other precisions"""
    bones: nn.Module | None = field(default=None, repr=False)
    """the ``skeleton`` of a sharded model, from which ``plain`` makes a plain copy"""
    guided: list[GuidedLinear] = field(default_factory=list, repr=False)
    """the layers that draw in each micro-batch whether they evaluate their dense product"""
    compiled: CompiledBlocks | None = field(default=None, repr=False)
    """what runs in the place of the model's blocks in an update; None: the blocks themselves"""
    compiler_fault: str | None = None
    """why the compiler could not compile the blocks, until it is told"""
    used: bool = False
    """whether it has made an update"""
    activation_bytes: int | None = None
    """bytes that autograd kept for the backward pass of the first micro-batch, without parameters;
    None before that, and where blocks are compiled"""
    flops: int | None = None
    """FLOPs of this rank's first update, counting products and attention; None before that, and
    where blocks are compiled"""
    refactored_from: int | None = None
    """update from which pairs of factors are refactored; None before that"""
    balance_then: "FactorBalance | None" = None
    """how balanced the pairs were before that update, until it is told"""
    _batch_loss: Tensor | None = field(default=None, repr=False)
    """the loss of ``backward``, until ``step``"""

    def update(
        self, inputs: Tensor, labels: Tensor, loss_fn: nn.Module, num_updates: int
    ) -> StepOutcome:
        """Make one optimizer update on a batch of inputs (B, ...) with labels (B, ...).

        Labels are what ``loss_fn`` expects: classes, or their probabilities after Mixup.

        The batch is this rank's share. It is split into ``accumulation`` micro-batches. Ranks
        exchange gradients after the last one. Gradients stay in place afterwards, unscaled and
        clipped, for the monitor to read.
        """
        self.backward(inputs, labels, loss_fn, num_updates)
        return self.step(num_updates)()

    def backward(
        self, inputs: Tensor, labels: Tensor, loss_fn: nn.Module, num_updates: int
    ) -> None:
        """Compute the gradients of an update, its first half. The arguments are its own."""
        passes = partial(self._passes, inputs, labels, loss_fn, num_updates)
        if self.compiled is None or self.used:
            self._batch_loss = passes()
        else:
            self._batch_loss = self._first_compiled(passes)
        self.used = True

    def step(self, num_updates: int) -> Pending:
        """Make the optimizer's step on the gradients of ``backward``, unless they are not finite.

        Where ``decides_on_device``, the step is launched and the host goes on: call what is
        returned before the next step, but after the next ``backward``.
        """
        lr = self.set_lr(num_updates)
        loss, self._batch_loss = self._batch_loss, None
        assert loss is not None, "step comes after backward"
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.recipe.frobenius_decay:
            add_frobenius_decay(trained_adapters(self.model), self.recipe.frobenius_decay)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = full(get_total_norm(gradients))
        if self.decides_on_device:
            return self._step_by_device(loss, norm, lr)
        outcome = self._step_by_host(loss, norm, lr)
        return lambda: outcome

    @cached_property
    def decides_on_device(self) -> bool:
        """Whether the device finds out for itself if a step is applied, so that nobody waits.

        That takes an optimizer that skips a step by itself. Draws of guided layers and hooks of a
        refactoring follow the number of applied updates, so the host must know it in time.
        """
        if self.scaler is not None or self.guided or self.recipe.refactoring is not None:
            return False
        return skips_by_itself(self.optimizer) and not is_sharded(self.model)

    def _passes(
        self, inputs: Tensor, labels: Tensor, loss_fn: nn.Module, num_updates: int
    ) -> Tensor:
        """Do what ``backward`` says, and return the batch's mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        operands = operands_within_update(self.model, self.recipe)
        compiled = nullcontext() if self.compiled is None else self.compiled.in_use()
        with operands, compiled, self._flops_counted(), self._strides_not_warned_of():
            return self._accumulate(inputs, labels, loss_fn, num_updates)

    def _first_compiled(self, passes: Callable[[], Tensor]) -> Tensor:
        """Return what ``passes`` return. If they fail, do them again without the compiler.

        An error that is not the compiler's is raised then.
        """
        generators = [torch.default_generator]
        if self._device.type == "cuda":
            generators.append(torch.cuda.default_generators[self._device.index])
        before = [generator.get_state() for generator in generators]
        try:
            return passes()
        except Exception as error:
            self.compiled, self.compiler_fault = None, one_line(error)
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        return passes()

    def _accumulate(
        self, inputs: Tensor, labels: Tensor, loss_fn: nn.Module, num_updates: int
    ) -> Tensor:
        """Return the batch's mean loss; its gradients are those of the trained parameters."""
        loss = torch.zeros((), device=self._device)
        input_parts = inputs.chunk(self.recipe.accumulation)
        label_parts = labels.chunk(self.recipe.accumulation)
        last = input_parts[-1]
        for number, (part, label) in enumerate(zip(input_parts, label_parts, strict=True)):
            draw_dense(self.guided, num_updates, number)
            with self._exchange(now=part is last):
                part_loss = self._loss(part, label, loss_fn)
                weighted = part_loss * (len(part) / len(inputs))
                self._scaled(weighted).backward()
            loss += weighted.detach()
        drop_skipped_gradients(self.guided, len(input_parts))
        return loss

    def _loss(self, inputs: Tensor, labels: Tensor, loss_fn: nn.Module) -> Tensor:
        with autocast(self._device.type, self.recipe.precision), self._activations_counted():
            outputs = self.forward(inputs.to(self._device, non_blocking=True))
            return loss_of(loss_fn, outputs, labels.to(self._device, non_blocking=True))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set_lr(self, num_updates: int) -> float:
        """Set and return the learning rate of this update, a function of the update counter alone.

        The returned value is without a group's ``lr_scale``.
        """
        self.scheduler.step_update(num_updates)
        self.since = num_updates - self.start
        ramp = min(1.0, (self.since + 1) / max(1, self.ramp_updates))
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] *= ramp * self.recipe.lr_scale
        return groups[0]["lr"] / groups[0]["lr_scale"]

    @property
    def num_updates(self) -> int:
        """Number of updates of the run before the present one."""
        return self.start + self.since

    def decay(self, lr: float) -> float:
        """Return lr * weight decay of one update; 0 if the optimizer's decay is not decoupled."""
        return lr * self.recipe.weight_decay if self.recipe.decoupled_weight_decay else 0.0

    def plain(self) -> nn.Module:
        """Return the plain model: the live one, or a copy on the CPU if the model is sharded."""
        return self.model if self.bones is None else gathered(self.model, self.bones)

    @property
    def precision(self) -> str:
        """The precision of its products: fp32, bf16 or fp16."""
        return self.recipe.precision

    def put_back(self) -> None:
        """Set activation checkpointing again, after a change of the model that was undone."""
        set_checkpointing(self.model, self.recipe.activation_checkpointing)

    @contextmanager
    def _activations_counted(self) -> Iterator[None]:
        if self.activation_bytes is not None or self.compiled is not None:
            yield
            return
        saved = SavedTensors()
        with saved:
            yield
        self.activation_bytes = saved.bytes_beside(self.model)

    @contextmanager
    def _flops_counted(self) -> Iterator[None]:
        if self.flops is not None or self.compiled is not None:
            yield
            return
        with FlopCounter() as counter:
            yield
        self.flops = counter.total

    @contextmanager
    def _strides_not_warned_of(self) -> Iterator[None]:
        """Silence what DDP says, at its first update, of gradients that it has to copy."""
        if self.used or self._ddp() is None:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            yield

    def _exchange(self, now: bool) -> AbstractContextManager:
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(now)  # type: ignore[operator]
        ddp = self._ddp()
        return nullcontext() if now or ddp is None else ddp.no_sync()

    def _ddp(self) -> DistributedDataParallel | None:
        return self.forward if isinstance(self.forward, DistributedDataParallel) else None

    def _step_by_host(self, loss: Tensor, norm: Tensor, lr: float) -> StepOutcome:
        own_loss, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        mean_loss = total([own_loss])[0] / world_size()
        finite_loss = math.isfinite(mean_loss)
        applied = finite_loss and math.isfinite(norm_value)
        if applied:
            self._clip(norm)
            self.optimizer.step()
        overflow = self._scale_lowered() and finite_loss
        return StepOutcome(mean_loss, norm_value, lr, applied, overflow)

    def _step_by_device(self, loss: Tensor, norm: Tensor, lr: float) -> Pending:
        mean_loss = mean_of_ranks(loss)
        applied = mean_loss.isfinite() & norm.isfinite()
        self._clip(norm)
        self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        awaited = Awaited(torch.stack([mean_loss, norm.double(), applied.double()]))
        return partial(_outcome, awaited, lr)

    def _clip(self, norm: Tensor) -> None:
        if self.recipe.clip_grad is not None:
            clip_grads_with_norm_(self.model.parameters(), self.recipe.clip_grad, norm)

    def _scale_lowered(self) -> bool:
        """Update the loss scale; return whether it fell and can fall again."""
        if self.scaler is None:
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        return 1 < self.scaler.get_scale() < before


def _outcome(awaited: Awaited, lr: float) -> StepOutcome:
    loss, norm, applied = awaited.read()
    return StepOutcome(loss, norm, lr, bool(applied))


def operands_within_update(model: nn.Module, recipe: Recipe) -> AbstractContextManager:
    """Return the context that keeps effective weights from the forward to the backward pass.

    It does nothing for sharded models and checkpointed blocks, which form them again.
    """
    if is_sharded(model) or recipe.activation_checkpointing == "blocks":
        return nullcontext()
    return operands_kept(model)


def build_learner(
    model: nn.Module,
    recipe: Recipe,
    total_updates: int,
    start: int = 0,
    parallel: str = "ddp",
    scaler: GradScaler | None = None,
    device: torch.device | None = None,
    compress: str | None = None,
) -> Learner:
    """Build an optimizer, a schedule and wrappers for the tensors of ``model`` that train now.

    ``model`` is plain. With several processes, ``parallel`` says how they work together:

    - 'ddp': DDP averages gradients, which travel in ``compress``, such as 'bf16', if given.
    - 'fsdp': the model is sharded in place, onto ``device``.

    ``scaler`` is the loss scaler of the previous learner. The new one starts from its scale.
    """
    device = device or next(model.parameters()).device
    recomputed = recipe.activation_checkpointing
    recipe = replace(
        recipe,
        precision=precision_of(recipe.precision, device),
        compile=compile_of(recipe.compile, device, recomputed, recipe.accumulation),
    )
    set_checkpointing(model, recomputed)
    hold_frozen_statistics(model)
    bones = None
    if parallel == "fsdp":
        check_goes_with_fsdp(recipe)
        bones = skeleton(model)
        model = shard(model, device, recipe.precision)
    optimizer = build_optimizer(model, recipe)
    learner = Learner(
        model,
        forward=_wrapped(model, recipe, compress),
        optimizer=optimizer,
        scheduler=recipe.scheduler(optimizer, t_initial=total_updates),
        recipe=recipe,
        start=start,
        total_updates=total_updates,
        ramp_updates=recipe.ramp_updates(start, total_updates),
        scaler=_scaler(model, recipe, scaler),
        bones=bones,
        guided=guided_layers(model),
        compiled=made_compiled(model, recipe.compile),
    )
    if recipe.refactoring is not None:
        recipe.refactoring(learner)
    return learner


def _wrapped(model: nn.Module, recipe: Recipe, compress: str | None) -> nn.Module:
    if world_size() == 1 or is_sharded(model):
        return model
    if recipe.before_ddp is not None:
        recipe.before_ddp(model)
    alike = recipe.accumulation == 1 and not guided_layers(model)  # are all its backward passes
    wrapper = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=alike)
    if compress is not None:
        _compress(wrapper, compress)
    return wrapper


def _compress(wrapper: DistributedDataParallel, how: str) -> None:
    """Let gradients travel in fewer bytes; ValueError on a CPU, where that serves nobody."""
    device = next(wrapper.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"system.compress={how} is for GPUs, and this run trains on a {device}")
    wrapper.register_comm_hook(None, COMPRESSIONS[how])


def set_checkpointing(
    model: nn.Module, what: str | None, key: str = "full.activation_checkpointing"
) -> None:
    """Set what ``model`` computes again in the backward pass: 'blocks', 'gelu' or nothing.

    ValueError that names ``key`` for 'blocks' if the model cannot checkpoint its blocks.
    """
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.recompute_gelu = what == "gelu"
    try:
        model.set_grad_checkpointing(what == "blocks")  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        if what == "blocks":
            raise ValueError(
                f"{key}=blocks: {type(model).__name__} knows no "
                "checkpointing of its blocks, as most of timm's models do"
            ) from error


def _scaler(model: nn.Module, recipe: Recipe, earlier: GradScaler | None) -> GradScaler | None:
    if recipe.precision != "fp16":
        return None
    if is_sharded(model):
        raise ValueError("full.precision=fp16 does not go with system.parallel=fsdp: use bf16")
    scaler = GradScaler(next(model.parameters()).device.type)
    if earlier is not None:
        scaler.load_state_dict(earlier.state_dict())
    return scaler
