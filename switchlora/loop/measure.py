"""Measure how the weights of a model move, in a loop of one's own."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from switchlora.adapters import DEFAULT_TARGETS, Target, find_targets
from switchlora.errors import check_patterns
from switchlora.loop.arguments import check_whole, named_as_arguments
from switchlora.monitor import Measurement, UpdateMonitor
from switchlora.process import gather, world_size

ALL_LINEAR = "all-linear"


class History(list[Measurement]):
    """The measurements so far, the last one at the end."""

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per measurement and target."""
        from pandas import DataFrame

        rows = []
        for measured in self:
            window = {name: getattr(measured, name) for name in ("num_updates", "train_loss")}
            for target, stats in measured.layers.items():
                norm = stats.relative_update_norm
                rows.append({**window, "target": target, "relative_update_norm": norm})
                rows[-1].update(asdict(stats))
        return DataFrame(rows)


class WeightUpdateMonitor:
    """Measures every ``window`` updates how far the weights of linears moved. It never switches.

    ``target_modules`` are regular expressions for the ends of the names of linears, or
    'all-linear'. That is all but the last one, those whose weight is frozen or has a
    parametrization, and ``out_proj`` of ``nn.MultiheadAttention``, whose weight torch reads
    itself. Copies of their weights at the start of a window are on the CPU.

    With several processes each of them calls ``step``. All get the same numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Sequence[str] = DEFAULT_TARGETS,
        window: int = 100,
        updates_per_epoch: int | None = None,
        split_qkv: bool = False,
    ) -> None:
        check_whole("window", window, 1)
        if updates_per_epoch is not None:
            check_whole("updates_per_epoch", updates_per_epoch, 1)
        self.model = unwrapped(model)
        self.patterns = patterns_of(self.model, target_modules)
        with named_as_arguments():
            targets = find_targets(self.model, self.patterns, split_qkv)
        self.monitor = UpdateMonitor(self.model, targets, window)
        self.updates_per_epoch = updates_per_epoch
        self.num_updates = 0
        self.history = History()
        self._losses: list[Tensor] = []

    def step(self, loss: Tensor | float = math.nan) -> dict[str, float]:
        """Count one update. Return the numbers of a measurement at a window's end, else nothing.

        ``loss`` is that of the update. It is read at the end of a window.
        """
        if not self.measured(loss):
            return {}
        self.monitor.start_window(self.num_updates)
        return self.log_dict()

    def measured(self, loss: Tensor | float, updates: int = 1) -> bool:
        """Count ``updates`` and measure at the end of a window. The caller starts the next one."""
        self.count(loss, updates)
        if not self.monitor.due(self.num_updates):
            return False
        for each in self._losses_of_all():
            self.monitor.observe(each)
        self._losses.clear()
        epoch = self.num_updates / self.updates_per_epoch if self.updates_per_epoch else math.nan
        self.history.append(self.monitor.measure(self.num_updates, epoch))
        return True

    def count(self, loss: Tensor | float, updates: int) -> None:
        """Count ``updates``, and keep the loss of the last one."""
        self.num_updates += updates
        self._losses.append(_one_number(loss))

    def window_loss(self) -> float:
        """Return the mean of the losses that were kept, and keep none of them any longer."""
        mean = fmean(self._losses_of_all())
        self._losses.clear()
        return mean

    def moved(self) -> bool:
        """Return whether a target's weight is not what it was at the start of the window."""
        for name, target in self.monitor.targets.items():
            weight = target.weight(self.model).detach().cpu()
            if not torch.equal(weight, self.monitor.references[name].cpu()):
                return True
        return False

    def log_dict(self) -> dict[str, float]:
        """Return the numbers of the last measurement for any logger, by name."""
        if not self.history:
            return {}
        last = self.history[-1]
        found = {}
        if math.isfinite(last.train_loss):  # some loops give none
            found["train/window_loss"] = last.train_loss
        for name, stats in last.layers.items():
            found[f"update_norm/{name}"] = stats.relative_update_norm
            found[f"update_stable_rank/{name}"] = stats.update_stable_rank
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs, as plain types and tensors."""
        return {
            "num_updates": self.num_updates,
            "history": [asdict(measured) for measured in self.history],
            "window_losses": [float(loss) for loss in self._losses],
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.num_updates = state["num_updates"]
        self.history = History(Measurement.from_plain(measured) for measured in state["history"])
        self._losses = [torch.tensor(loss) for loss in state["window_losses"]]
        self.monitor.load_state_dict(state["monitor"])

    def _losses_of_all(self) -> list[float]:
        """Return the losses of the window; with several processes the mean of each."""
        losses = torch.stack([loss.cpu().double() for loss in self._losses])
        return gather(float(losses.mean())) if world_size() > 1 else losses.tolist()


def norms_of(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, float]:
    """Return the norm of each target's weight now, by name; 0 for one that is not finite."""
    found = {}
    for name, target in targets.items():
        norm = float(torch.linalg.vector_norm(target.weight(model).double()))
        found[name] = norm if math.isfinite(norm) else 0.0
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the plain model; ValueError for a wrapper that must be made anew after the switch."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "the model is in DistributedDataParallel, which keeps buckets for the parameters that "
            "train when it is made: give the module inside (model.module), and wrap that again "
            "where step() returns True"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model is sharded, and a switch needs whole weights: use "
            "DistributedDataParallel, or train with the command switchlora"
        )
    inner = getattr(model, "_orig_mod", model)
    return unwrapped(inner) if inner is not model else model


def patterns_of(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Return regular expressions for the ends of the names of the targets."""
    if target_modules != ALL_LINEAR:
        patterns = [target_modules] if isinstance(target_modules, str) else target_modules
        check_patterns("target_modules", patterns)
        return list(patterns)
    linears = {name: each for name, each in model.named_modules() if takes_an_adapter(each)}
    if len(linears) < 2:
        raise ValueError(
            f"target_modules='all-linear' leaves out the last linear, and this model has "
            f"{len(linears)} nn.Linear in all: there is nothing to adapt"
        )
    found = [re.escape(name) for name in [*linears][:-1] if trains_as_a_whole(linears[name])]
    if not found:
        raise ValueError(
            "target_modules='all-linear' leaves out the last linear and what is frozen or has a "
            "parametrization, and no other linear is left: there is nothing to adapt"
        )
    return found


def takes_an_adapter(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear, and not one whose weight torch's attention reads."""
    return isinstance(module, nn.Linear) and not isinstance(
        module, NonDynamicallyQuantizableLinear
    )


def trains_as_a_whole(linear: nn.Module) -> bool:
    """Return whether the weight of ``linear`` is a parameter that trains."""
    weight = dict(linear.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.requires_grad


def _one_number(loss: Any) -> Tensor:
    """Return the loss as a tensor of one number. ValueError for another."""
    try:
        found = torch.as_tensor(loss).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the loss is {loss!r}: give a number, or a tensor of one") from error
    if found.numel() != 1:
        raise ValueError(f"the loss has the shape {tuple(found.shape)}: give the mean of it")
    return found.reshape(())
