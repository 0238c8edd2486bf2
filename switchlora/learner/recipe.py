"""A recipe: the optimizer, schedule and precision of one phase."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.optim import SGDW, param_groups_weight_decay
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from switchlora.adapters import (
    FACTORS,
    AdaptedLinear,
    Adapter,
    Norms,
    adapted_modules,
    is_factor,
    trained_adapters,
)
from switchlora.errors import check_choice, check_range, is_number
from switchlora.learner.awaited import reads_late
from switchlora.learner.compiling import AUTO, CUDA_GRAPHS, Asked, launches_graphs
from switchlora.learner.lora_rite import LoRARite
from switchlora.learner.matched import Scales, matched_scales
from switchlora.learner.muon import Muon
from switchlora.learner.parts import InParts, in_parts
from switchlora.learner.projected import Projected

if TYPE_CHECKING:
    from switchlora.learner.learner import Learner


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MATCHED = "matched"
NO_FACTORS = Norms(0.0, 0.0)
FUSED = (Adam, AdamW)
"""optimizers whose fused form leaves a step out by itself"""
PROPORTIONAL = (SGD, SGDW)
"""optimizers whose steps are in proportion to the gradient"""
OF_THE_PRODUCT = (Muon, LoRARite)
"""optimizers whose steps of factors have the size of a step of the weight, whatever the split"""
RECOMPUTED = ("blocks", "gelu")
LONGEST_RAMP = 20


@dataclass(frozen=True)
class FactorRates:
    """Learning rates of factors, relative to that of the weights that they stand for.

    - ``factor_lr``: 'matched', or a number. See ``Recipe``.
    - ``of_B`` multiplies the rate of B alone.
    """

    factor_lr: float | str = MATCHED
    matched_step: float = 1.0
    of_B: float = 1.0

    def __post_init__(self) -> None:
        a_number = is_number(self.factor_lr) and float(self.factor_lr) > 0
        if self.factor_lr != MATCHED and not a_number:
            raise ValueError(
                f"factor_lr is '{self.factor_lr}': give {MATCHED}, or a number above 0 that "
                "multiplies the learning rate of the weights"
            )

    def __call__(
        self, module: AdaptedLinear, optimizer: Optimizer
    ) -> Iterator[tuple[nn.Parameter, float]]:
        """Yield the factors of ``module`` that train, each with its rate under ``optimizer``."""
        for part, adapter in module.adapters().items():
            scales = self._scales(adapter, module.start_norms.get(part, NO_FACTORS), optimizer)
            for factor, scale in zip((adapter.A, adapter.B), scales, strict=True):
                if factor.requires_grad:
                    yield cast(nn.Parameter, factor), scale

    def _scales(self, adapter: Adapter, norms: Norms, optimizer: Optimizer) -> Scales:
        if self.factor_lr != MATCHED:
            scale = float(self.factor_lr)
            return Scales(scale, scale * self.of_B)
        step = self.matched_step
        if isinstance(optimizer, OF_THE_PRODUCT):
            return Scales(step, step * self.of_B)
        if isinstance(optimizer, Projected):  # AdamW trains the factors
            step *= optimizer.step_size(len(adapter.B), adapter.A.shape[1])
        A, B = matched_scales(adapter, norms, isinstance(optimizer, PROPORTIONAL), step)
        return Scales(A, B * self.of_B)


@dataclass(frozen=True)
class Recipe:
    """How the trained tensors of one phase are optimised.

    - ``optimizer`` takes parameter groups.
    - ``scheduler`` takes an optimizer and ``t_initial``, the number of updates of the whole run.
      It returns a timm scheduler that counts updates.
    - ``refactoring`` is called with each new learner and may add hooks to the learner's optimizer.

    The learning rate of the factors is chosen by ``factor_lr``:

    - 'matched': each factor has a rate of its own. With it an update moves the effective weight
      ``matched_step`` times as far as an update of full training does. See ``matched_scales``.
    - a number: this many times the learning rate of the weights.

    Factors have their own weight decay ``factor_weight_decay``, which pulls the effective weight
    toward the residual weight.
    """

    optimizer: Callable[..., Optimizer]
    scheduler: Callable[..., Scheduler]
    weight_decay: float = 0.05
    decoupled_weight_decay: bool = True
    """whether the optimizer multiplies weights by 1 - lr * weight_decay, as AdamW does"""
    factor_weight_decay: float = 0.0
    factor_lr: float | str = MATCHED
    matched_step: float = 1.0
    factor_B_lr_scale: float = 1.0
    """multiplies the learning rate of lora_B alone (LoRA+; Hayou et al., arXiv 2402.12354)"""
    frobenius_decay: float = 0.0
    """lambda of the penalty lambda/2 ||s B A||_F^2, used instead of ``factor_weight_decay``"""
    refactoring: "Callable[[Learner], None] | None" = None
    rewarmup_updates: int | None = 0
    """length of a linear ramp of the learning rate, which starts when this recipe takes over.
    None: see ``ramp_updates``"""
    clip_grad: float | None = 1.0
    accumulation: int = 1
    """micro-batches per update; the batch and the number of updates stay the same"""
    lr_scale: float = 1.0
    """multiplies all learning rates of this recipe; other recipes of the run may use the same
    schedule without it"""
    precision: str = "fp32"
    """fp32, bf16, fp16, or auto: see ``precision_of``"""
    compile: Asked = None
    """arguments of torch.compile, or True for its defaults; None or False: the model stays eager;
    auto: see ``chosen_compiler``, graphs: see ``compile_of``"""
    activation_checkpointing: str | None = None
    """what the backward pass computes again instead of keeping it:
    - 'blocks': whole blocks
    - 'gelu': the inputs of adapted linears that come straight from a gelu; not with ``compile``
    - None: nothing"""
    before_ddp: Callable[[nn.Module], None] | None = None
    """is called with the model before DDP wraps it"""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, (AUTO, *PRECISIONS))
        check_range("accumulation", self.accumulation, 1)
        for name in ("lr_scale", "matched_step", "factor_B_lr_scale"):
            scale = getattr(self, name)
            if not scale > 0:
                raise ValueError(f"{name} is {scale}: give a number above 0")
        FactorRates(self.factor_lr)
        if self.rewarmup_updates is not None:
            check_range("rewarmup_updates", self.rewarmup_updates, 0)
        check_range("frobenius_decay", self.frobenius_decay, 0)
        named = self.compile in (AUTO, CUDA_GRAPHS)
        if not named and not isinstance(self.compile, Mapping | bool | None):
            raise ValueError(
                f"compile is '{self.compile}': give auto, true, false, graphs, or arguments of "
                "torch.compile in quotes, such as 'compile={mode: default}'"
            )
        if self.frobenius_decay and self.factor_weight_decay:
            raise ValueError(
                "frobenius_decay replaces weight decay on the factors: set factor_weight_decay=0"
            )
        if self.activation_checkpointing is not None:
            check_choice("activation_checkpointing", self.activation_checkpointing, RECOMPUTED)
        if self.activation_checkpointing == "gelu" and self.compiles:
            raise ValueError("activation_checkpointing=gelu does not go with compile=true")
        for name, plain in (("accumulation", 1), ("activation_checkpointing", None)):
            asked = getattr(self, name)
            if launches_graphs(self.compile) and asked != plain:
                raise ValueError(
                    f"compile=graphs does not go with {name}={asked}: a second pass of a block "
                    "would overwrite what the first one left; take compile=true"
                )

    def ramp_updates(self, start: int, total_updates: int) -> int:
        """Return the length of the ramp of a learner that takes over at update ``start``.

        A new optimizer has no moments. Its first steps have their full size in every entry, in
        directions that agree, and can undo what training reached. By default the ramp has
        ``LONGEST_RAMP`` updates, but no more than a tenth of those that are left. At the start of
        a run there is none: the schedule has its own.

        >>> recipe = Recipe(torch.optim.AdamW, Scheduler, rewarmup_updates=None)
        >>> recipe.ramp_updates(100, 1000), recipe.ramp_updates(100, 150)
        (20, 5)
        >>> recipe.ramp_updates(0, 1000)
        0
        """
        if self.rewarmup_updates is not None:
            return self.rewarmup_updates
        return min(LONGEST_RAMP, (total_updates - start) // 10) if start else 0

    @property
    def bare_optimizer(self) -> Optimizer:
        """What ``optimizer`` returns for a single number, to look at its class and its options."""
        return self.optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """The class of what ``optimizer`` returns."""
        return type(self.bare_optimizer)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile compiles the blocks of the model; not yet known for 'auto'."""
        return self.compile not in (None, False, AUTO)


def precision_of(asked: str, device: torch.device) -> str:
    """Return the precision of products on ``device``.

    'auto' is bf16 on CUDA where the hardware has it, else fp32. Any other precision is itself.
    """
    if asked != AUTO:
        return asked
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def autocast(device_type: str, precision: str) -> AbstractContextManager:
    """Return the context of a precision: autocast for bf16 and fp16, an empty context for fp32."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def loss_of(
    loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor
) -> Tensor:
    """Return the loss of ``outputs`` (B, ...), computed in at least float32.

    CUDA's autocast leaves the log-probabilities of a cross entropy in 16 bits.
    """
    exact = torch.promote_types(outputs.dtype, torch.float32)
    return loss_fn(outputs.to(exact), labels)


def check_goes_with_fsdp(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that needs whole factors, or DDP."""
    kind = recipe.optimizer_class
    if issubclass(kind, InParts):
        raise ValueError(f"{kind.__name__} does not go with system.parallel=fsdp: use ddp")
    for name in ("refactoring", "frobenius_decay", "before_ddp"):
        if getattr(recipe, name):
            raise ValueError(f"adapter.{name} does not go with system.parallel=fsdp: use ddp")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups of the trained parameters.

    Weights are split by timm's rule into a group with and a group without decay. Factors have
    groups of their own; sparse entries of adapters count as weights without decay.
    """
    groups = _groups_beside_factors(model, recipe.weight_decay)
    for lr_scale, factors in sorted(_factors_by_scale(model, recipe).items()):
        decay = recipe.factor_weight_decay
        groups.append({"params": factors, "weight_decay": decay, "lr_scale": lr_scale})
    if issubclass(recipe.optimizer_class, InParts):
        groups = in_parts(model, groups)
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Build the recipe's optimizer of the parameters of ``model`` that train.

    On CUDA Adam and AdamW are one kernel, unless the recipe says which form they have.
    """
    groups = parameter_groups(model, recipe)
    form = {"fused": True} if _on_lone_device(groups) and _may_be_fused(recipe.optimizer) else {}
    optimizer = recipe.optimizer(groups, **form)
    if isinstance(optimizer, InParts):
        optimizer.pair(trained_adapters(model))
    return optimizer


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Return whether a step is left out where the tensor ``optimizer.found_inf`` is 1.

    It is so for the fused Adam and AdamW, on a device that works while the host goes on.
    """
    groups = optimizer.param_groups
    fused = type(optimizer) in FUSED and all(group["fused"] for group in groups)
    return fused and _on_lone_device(groups)


def _may_be_fused(optimizer: Callable[..., Optimizer]) -> bool:
    given = getattr(optimizer, "keywords", {})
    asked = {"fused", "foreach", "differentiable"}.intersection(given)
    return getattr(optimizer, "func", optimizer) in FUSED and not asked


def _on_lone_device(groups: Iterable[Mapping[str, Any]]) -> bool:
    devices = {parameter.device for group in groups for parameter in group["params"]}
    return bool(devices) and all(map(reads_late, devices))


def _groups_beside_factors(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    no_weight_decay: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", set)
    skip = set(no_weight_decay())
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skip)
    factors = {id(p) for name, p in model.named_parameters() if is_factor(name, FACTORS)}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in factors]
        group["lr_scale"] = 1.0
    return groups


def _factors_by_scale(model: nn.Module, recipe: Recipe) -> dict[float, list[nn.Parameter]]:
    """Return the factors that train, by their learning rate relative to that of the weights."""
    found: dict[float, list[nn.Parameter]] = {}
    rates = FactorRates(recipe.factor_lr, recipe.matched_step, recipe.factor_B_lr_scale)
    optimizer = recipe.bare_optimizer
    for module in adapted_modules(model).values():
        for factor, scale in rates(module, optimizer):
            found.setdefault(scale, []).append(factor)
    return found
