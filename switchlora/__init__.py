"""Training that starts with all parameters and finishes with a low-rank adapter.

The names below serve a loop of one's own; everything else has a room, such as
``switchlora.criteria``. A name is imported when it is first used.

- ``LowRankSwitch``: measures, decides and switches in a loop of one's own
- ``WeightUpdateMonitor``: measures there, and never switches
- ``UpdateNorm``: the default criterion; others are in ``switchlora.criteria``
- ``SwitchPolicy``: what a switch is made of: targets, criterion, ranks, start
- ``UpdateMonitor``: measures how the weights of the targets move
- ``Scene``, ``switch``: switches the model of a training, all or nothing
- ``Recipe``, ``build_learner``: optimizer and schedule of a phase, and what trains with them
- ``load_model``: a model with its adapters, from a checkpoint
- ``load_adapter``: a LoRA adapter in PEFT's format, put on a plain model
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchlora.criteria import UpdateNorm as UpdateNorm
    from switchlora.learner import Recipe as Recipe, build_learner as build_learner
    from switchlora.loop import (
        LowRankSwitch as LowRankSwitch,
        WeightUpdateMonitor as WeightUpdateMonitor,
    )
    from switchlora.monitor import UpdateMonitor as UpdateMonitor
    from switchlora.policy import SwitchPolicy as SwitchPolicy
    from switchlora.storage import load_adapter as load_adapter, load_model as load_model
    from switchlora.switching import Scene as Scene, switch as switch

__version__ = "0.1.0"
ROOMS = {
    "LowRankSwitch": "loop",
    "WeightUpdateMonitor": "loop",
    "UpdateNorm": "criteria",
    "SwitchPolicy": "policy",
    "UpdateMonitor": "monitor",
    "Scene": "switching",
    "switch": "switching",
    "Recipe": "learner",
    "build_learner": "learner",
    "load_model": "storage",
    "load_adapter": "storage",
}
__all__ = [*ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; AttributeError for any other."""
    if name not in ROOMS:
        raise AttributeError(f"module 'switchlora' has no attribute '{name}'")
    return getattr(import_module(f"switchlora.{ROOMS[name]}"), name)
