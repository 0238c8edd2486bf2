"""Bugs of published code, to compare with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from switchlora.errors import check_patterns
from switchlora.names import matching


@dataclass(frozen=True)
class Unreduced:
    """Let DDP leave the gradients of some parameters alone, so that ranks drift apart.

    PreLoRA's public code (arXiv 2509.21619) does so. It builds DDP before the tensors beside the
    adapters train. ``patterns`` are regular expressions, searched in the names of the parameters
    that train.
    """

    patterns: Sequence[str]

    def __post_init__(self) -> None:
        check_patterns("Unreduced", self.patterns)

    def __call__(self, model: nn.Module) -> None:
        """Mark the parameters of ``model``. ValueError for a pattern that finds nothing."""
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        found = matching(self.patterns, trained, "Unreduced pattern", "parameter", re.search)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, found)
