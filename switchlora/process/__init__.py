"""The process that runs: its fellows, its signals, its end."""

from switchlora.process.distributed import (
    agreed_checksum,
    any_rank,
    from_primary,
    full,
    is_primary,
    like,
    lost_rank,
    together,
    total,
    world_size,
)
from switchlora.process.exits import (
    DIED,
    FAILURE,
    USER_ERRORS,
    ended_worker,
    exit_with_one_line,
    one_line,
)
from switchlora.process.signals import Interruption

__all__ = [
    "DIED",
    "FAILURE",
    "Interruption",
    "USER_ERRORS",
    "agreed_checksum",
    "any_rank",
    "ended_worker",
    "exit_with_one_line",
    "from_primary",
    "full",
    "is_primary",
    "like",
    "lost_rank",
    "one_line",
    "together",
    "total",
    "world_size",
]
