"""What stays: checkpoints, events, files for others, and where numbers come from."""

from switchlora.storage.checkpoint import FORMAT, STATE, SUMS, load, load_model, read
from switchlora.storage.events import (
    METRICS,
    as_record,
    family_medians,
    measurement_metrics,
    measurement_of,
    read_events,
    window_metrics,
)
from switchlora.storage.export import PEFT_PREFIX, save_adapter, save_merged
from switchlora.storage.provenance import (
    KERNEL_LIMITS,
    code_digest,
    cpu_name,
    environment,
    machine,
    machine_line,
)
from switchlora.storage.records import (
    TRUNK_KEY,
    Record,
    check_alike,
    find_records,
    is_run,
    read_record,
)
from switchlora.storage.resume import AUTO, Found, find, finished_summary
from switchlora.storage.retention import FOLDER, SaveSchedule, find_all, thin, updates_of
from switchlora.storage.runlog import CONFIG, SUMMARY, FolderLock, RunLog, locked
from switchlora.storage.tensors import (
    learner_state,
    load_tensors,
    random_states,
    set_random_states,
)

__all__ = [
    "AUTO",
    "CONFIG",
    "FOLDER",
    "FORMAT",
    "FolderLock",
    "Found",
    "KERNEL_LIMITS",
    "METRICS",
    "PEFT_PREFIX",
    "Record",
    "RunLog",
    "STATE",
    "SUMMARY",
    "SUMS",
    "SaveSchedule",
    "TRUNK_KEY",
    "as_record",
    "check_alike",
    "code_digest",
    "cpu_name",
    "environment",
    "family_medians",
    "find",
    "find_all",
    "find_records",
    "finished_summary",
    "is_run",
    "learner_state",
    "load",
    "load_model",
    "load_tensors",
    "locked",
    "machine",
    "machine_line",
    "measurement_metrics",
    "measurement_of",
    "random_states",
    "read",
    "read_events",
    "read_record",
    "save_adapter",
    "save_merged",
    "set_random_states",
    "thin",
    "updates_of",
    "window_metrics",
]
