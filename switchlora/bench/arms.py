"""The arms of the benchmark: a model changed in one way each, with a clock for its updates."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from switchlora.adapters import (
    DEFAULT_TARGETS,
    Target,
    adapted_modules,
    count_parameters,
    find_targets,
    inject,
    is_factor,
    is_quantised,
    kept_parameters,
    round_residual,
    scaling_one,
    train_only,
)
from switchlora.cost import clock_of
from switchlora.errors import check_choice, check_range
from switchlora.initializers import zero_b
from switchlora.learner import (
    Learner,
    Recipe,
    RefLoRA,
    RefLoRAS,
    autocast,
    build_learner,
    skeleton,
)
from switchlora.models import create_model
from switchlora.policy import RESIDUAL_DTYPES as BY_NAME
from switchlora.process import distributed

ARMS = (
    *("full", "adapter", "adapter-merged", "adapter-split", "adapter-B"),
    *("peft", "peft-nocast", "frozen"),
)
LEANER = {"adapter-gelu": "gelu", "adapter-B-blocks": "blocks"}
"""what these arms recompute in the backward pass (activation checkpointing); on demand only"""
REFACTORED: dict[str, Callable[[Learner], None]] = {
    "adapter-reflora": RefLoRA(warmup_updates=0),
    "adapter-reflora_s": RefLoRAS(warmup_updates=0),
}
ON_DEMAND = (*LEANER, *REFACTORED)
RESIDUAL_DTYPES = {"none": None, **BY_NAME}
UPDATES_FOR_PEAK = 2  # in the second update the optimizer's moments exist beside the activations
TOTAL_UPDATES = 10_000  # length of the schedule; no benchmark reaches its end
EVERYTHING = (".*",)


@dataclass(frozen=True)
class Cell:
    """The settings that all arms compared with each other share."""

    model: str
    precision: str
    rank: int
    batch: int = 16
    """images of one update, over all ranks"""
    accumulation: int = 1
    image_size: int = 224
    residual_dtype: str = "none"
    """dtype of frozen target weights; 'none' leaves them as they are"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """options of the model, passed to timm"""

    def __post_init__(self) -> None:
        check_choice("--precision", self.precision, ("fp32", "bf16"))
        check_choice("--residual-dtype", self.residual_dtype, tuple(RESIDUAL_DTYPES))
        check_range("--batch", self.batch, 1)
        check_range("--rank", self.rank, 1)
        check_range("--accumulation", self.accumulation, 1)
        check_range("--image-size", self.image_size, 1)
        parts = self.accumulation * distributed.world_size()
        if self.batch % parts:
            raise ValueError(
                f"--batch {self.batch} does not split into {self.accumulation} micro-batches on "
                f"each of {distributed.world_size()} processes: give a multiple of {parts}"
            )

    @property
    def share(self) -> int:
        """Number of images of one update on this rank."""
        return self.batch // distributed.world_size()

    def __str__(self) -> str:
        return f"{self.model} {self.precision} r{self.rank}"


class Clock:
    """Times the parts of a learner's update with hooks that exist only during the update.

    The parts are:
    - forward: the model and the loss.
    - optimizer: the optimizer's step.
    - backward: the rest. That is the backward pass, the exchange between ranks, the gradients'
      norm and their clipping, and RefLoRA.
    """

    def __init__(self, learner: Learner, device: torch.device) -> None:
        self.learner = learner
        self.loss = nn.CrossEntropyLoss()
        self._now = clock_of(device)

    def total(self, update: Callable[[], None]) -> dict[str, float]:
        """Run ``update`` and return the seconds of the whole, 'total'.

        The device is waited for before and after it alone.
        """
        begin = self._now()
        update()
        return {"total": self._now() - begin}

    def parts(self, update: Callable[[], None]) -> dict[str, float]:
        """Run ``update`` and return its seconds by part.

        On a GPU each part waits for the device. So nothing overlaps, and the parts add up to more
        than ``total``.
        """
        self._seconds = {"forward": 0.0, "optimizer": 0.0}
        hooks = self._hooks()
        whole = self.total(update)["total"]
        for hook in hooks:
            hook.remove()
        backward = whole - sum(self._seconds.values())
        return {"backward": backward, **self._seconds}

    def _hooks(self) -> list[RemovableHandle]:
        model = self.learner.forward
        optimizer = self.learner.optimizer
        assert isinstance(model, nn.Module)
        return [
            model.register_forward_pre_hook(self._start),
            self.loss.register_forward_hook(partial(self._stop, "forward")),
            optimizer.register_step_pre_hook(self._start),
            optimizer.register_step_post_hook(partial(self._stop, "optimizer")),
        ]

    def _start(self, *_: Any) -> None:
        self._mark = self._now()

    def _stop(self, part: str, *_: Any) -> None:
        self._seconds[part] += self._now() - self._mark


@dataclass
class Arm:
    """A learner, the one batch that it trains on, and its clock."""

    name: str
    learner: Learner
    images: Tensor
    labels: Tensor
    clock: Clock
    notes: list[str]
    """one line for each request that could not be met"""
    num_updates: int = 0

    @property
    def model(self) -> nn.Module:
        """The learner's plain model."""
        return self.learner.model

    def lap(self) -> dict[str, float]:
        """Make one more update and return its seconds. Its gradients are dropped afterwards."""
        return self._measured(self.clock.total)

    def lap_of_parts(self) -> dict[str, float]:
        """Make one more update and return the seconds of its parts."""
        return self._measured(self.clock.parts)

    def _measured(
        self, measure: Callable[[Callable[[], None]], dict[str, float]]
    ) -> dict[str, float]:
        seconds = measure(self.update)
        self.learner.optimizer.zero_grad(set_to_none=True)
        return seconds

    def update(self) -> None:
        """Make one more update. Raise ValueError when its loss is not finite."""
        outcome = self.learner.update(
            self.images, self.labels, self.clock.loss, num_updates=self.num_updates
        )
        self.num_updates += 1
        if not outcome.applied:
            raise ValueError(f"arm '{self.name}' makes no update: its loss is not finite")


def device_of_benchmark() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def base_model(cell: Cell) -> nn.Module:
    """Build the plain model that every arm of ``cell`` starts from, in training mode."""
    torch.manual_seed(0)
    options = {"img_size": cell.image_size, **cell.options}
    return create_model(cell.model, **options).to(device_of_benchmark()).train()


def bench_recipe(cell: Cell, name: str = "full") -> Recipe:
    """Return the recipe of an arm: AdamW, a cosine schedule, gradients clipped to norm 1.

    The arm's ``name`` decides on activation checkpointing and refactoring.
    """
    scheduler = partial(
        CosineLRScheduler, t_in_epochs=False, warmup_t=100, warmup_lr_init=1e-6, lr_min=1e-5
    )
    return Recipe(
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        scheduler=scheduler,
        clip_grad=1.0,
        accumulation=cell.accumulation,
        precision=cell.precision,
        activation_checkpointing=LEANER.get(name),
        refactoring=REFACTORED.get(name),
    )


def images_shape(cell: Cell) -> tuple[int, int, int, int]:
    """Return the shape (B, C, H, W) of this rank's batch."""
    channels = cell.options.get("in_chans", 3)
    return cell.share, channels, cell.image_size, cell.image_size


def class_count(model: nn.Module) -> int:
    """Return the number of classes of a timm model."""
    count = model.num_classes
    assert isinstance(count, int)
    return count


def make_arm(name: str, model: nn.Module, cell: Cell) -> Arm:
    """Build the arm ``name`` of ``cell`` from a plain ``model``, which is changed in place."""
    notes = become(name, model, cell)
    device = device_of_benchmark()
    generator = torch.Generator().manual_seed(distributed.rank())
    images = torch.randn(images_shape(cell), generator=generator)
    labels = torch.randint(class_count(model), (len(images),), generator=generator)
    learner = build_learner(model, bench_recipe(cell, name), TOTAL_UPDATES)
    clock = Clock(learner, device)
    return Arm(name, learner, images.to(device), labels.to(device), clock, notes)


def become(name: str, model: nn.Module, cell: Cell) -> list[str]:
    """Give ``model`` the adapters and the trained tensors of the arm ``name``.

    Return a line for each request that could not be met.
    """
    check_choice("--arms", name, (*ARMS, *ON_DEMAND))
    targets = find_targets(model, DEFAULT_TARGETS)
    if name == "frozen":
        freeze(model, targets)
    elif name.startswith("peft"):
        add_peft(model, targets, cell.rank)
        leave_inputs_as_they_are(model, casts=name == "peft")
    elif name != "full":
        add_adapters(model, targets, cell.rank)
    for module_name, module in adapted_modules(model).items():
        if name in ("adapter-merged", "adapter-split"):
            module.form = name.removeprefix("adapter-")
        elif name.startswith("adapter-B"):
            model.get_parameter(f"{module_name}.lora_A").requires_grad_(False)
    dtype = RESIDUAL_DTYPES[cell.residual_dtype]
    if dtype is None:
        return []
    return (
        quantise(model, dtype) if is_quantised(dtype) else cast_frozen_weights(model, cell, dtype)
    )


def add_adapters(model: nn.Module, targets: Mapping[str, Target], rank: int) -> None:
    """Put this package's adapters on ``targets``, starting at B = 0.

    The factors train, and so do all parameters except the targets' weights.
    """
    factors = {}
    for name, target in targets.items():
        weight = target.weight(model)
        factors[name] = zero_b(weight, weight, rank)
    inject(model, targets, factors, scaling_one)
    freeze(model, targets)


def freeze(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Freeze the weights of ``targets``. Factors and all other parameters train."""
    modules = [target.module for target in targets.values()]
    train_only(model, kept_parameters(model, modules, EVERYTHING))


def add_peft(model: nn.Module, targets: Mapping[str, Target], rank: int) -> None:
    """Put PEFT's LoRA on the same ``targets`` as ``add_adapters``.

    Raise ValueError when PEFT is not installed, or when the trained tensors do not have the same
    shapes as with ``add_adapters``.
    """
    if find_spec("peft") is None:
        raise ValueError("PEFT is not installed: pip install peft, or leave peft out of --arms")
    from peft import LoraConfig, inject_adapter_in_model

    ours = skeleton(model)
    add_adapters(ours, targets, rank)
    freeze(model, targets)
    others = {id(p) for p in model.parameters() if p.requires_grad}
    modules = [target.module for target in targets.values()]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=modules)
    inject_adapter_in_model(config, model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in others or is_factor(parameter_name))
    check_same_shapes_train(ours, model)


def leave_inputs_as_they_are(model: nn.Module, casts: bool) -> None:
    """Let PEFT's layers cast their inputs to the type of the factors, or not.

    Under autocast the cast to float32 is for nothing: the product casts it back.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = casts  # type: ignore[assignment]


def check_same_shapes_train(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise ValueError unless both models train the same number of tensors of each shape.

    Names may differ.
    """
    if trained_shapes(ours) != trained_shapes(theirs):
        raise ValueError(
            f"PEFT would train {count_parameters(theirs, trainable=True):,} parameters, our "
            f"adapter trains {count_parameters(ours, trainable=True):,}: no fair comparison, "
            "leave peft out of --arms"
        )


def trained_shapes(model: nn.Module) -> Counter[tuple[int, ...]]:
    """Count the trained tensors of each shape."""
    return Counter(tuple(p.shape) for p in model.parameters() if p.requires_grad)


def cast_frozen_weights(model: nn.Module, cell: Cell, dtype: torch.dtype) -> list[str]:
    """Cast the frozen weights of linears to ``dtype``.

    When the model does not run then, restore the weights and return a line that says so.
    """
    linears = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            linears.append(module)
    weights = [linear.weight for linear in linears]
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    try:
        probe(model, cell)
    except RuntimeError as error:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight
        why = str(error).splitlines()[0]
        return [f"frozen weights stay {weights[0].dtype}, {dtype} does not run: {why}"]
    return []


def quantise(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Quantise the residual weights of adapters. Return a line if there are none."""
    modules = adapted_modules(model)
    for module in modules.values():
        round_residual(module, dtype)
    return [] if modules else ["its weights stay: only adapters of this package quantise theirs"]


def probe(model: nn.Module, cell: Cell) -> None:
    """Run forward and backward on one image, and drop the gradients."""
    image = torch.zeros(1, *images_shape(cell)[1:], device=device_of_benchmark())
    with autocast(image.device.type, cell.precision):
        model(image).sum().backward()
    model.zero_grad(set_to_none=True)
