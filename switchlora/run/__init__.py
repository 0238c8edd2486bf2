"""What happens in one run, in order."""

from switchlora.run.finish import finish
from switchlora.run.memory import predict_memory, record_memory
from switchlora.run.messages import MEMORY_PARTS, eval_line
from switchlora.run.prepare import prepare
from switchlora.run.run import Run
from switchlora.run.saving import (
    faults_explained,
    how_to_go_on,
    leave_if_asked,
    save,
    save_or_leave,
)
from switchlora.run.state import Phase
from switchlora.run.transitions import watch_as_configured
from switchlora.run.windows import after_update, consider_switch, guide, look_after, note_loss

__all__ = [
    "MEMORY_PARTS",
    "Phase",
    "Run",
    "after_update",
    "consider_switch",
    "eval_line",
    "faults_explained",
    "finish",
    "guide",
    "how_to_go_on",
    "leave_if_asked",
    "look_after",
    "note_loss",
    "predict_memory",
    "prepare",
    "record_memory",
    "save",
    "save_or_leave",
    "watch_as_configured",
]
