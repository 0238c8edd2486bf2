"""The files of a run: checkpoints, events, exports for other libraries, and provenance."""

from switchlora.storage.background import Background as Background
from switchlora.storage.before import (
    BEFORE as BEFORE,
    Before as Before,
    read_before as read_before,
    save_before as save_before,
    weights_of as weights_of,
)
from switchlora.storage.checkpoint import (
    FORMAT as FORMAT,
    STATE as STATE,
    SUMS as SUMS,
    content_checked as content_checked,
    load as load,
    load_model as load_model,
    read as read,
)
from switchlora.storage.events import (
    METRICS as METRICS,
    Placed as Placed,
    event_of as event_of,
    family_medians as family_medians,
    measurement_metrics as measurement_metrics,
    measurement_of as measurement_of,
    placed_measurement as placed_measurement,
    read_events as read_events,
    read_history as read_history,
    read_placed as read_placed,
    window_metrics as window_metrics,
)
from switchlora.storage.export import (
    ADAPTER as ADAPTER,
    PEFT_PREFIX as PEFT_PREFIX,
    merged_for_peft as merged_for_peft,
    save_adapter as save_adapter,
    save_merged as save_merged,
    save_tensors as save_tensors,
)
from switchlora.storage.files import (
    check_folder as check_folder,
    is_regular as is_regular,
    output_file as output_file,
    output_folder as output_folder,
    sha256_of as sha256_of,
    sync as sync,
    write_whole as write_whole,
)
from switchlora.storage.hub import (
    name_of_data as name_of_data,
    save_hub_layout as save_hub_layout,
)
from switchlora.storage.mlflow_log import MLflow as MLflow
from switchlora.storage.peft import load_adapter as load_adapter
from switchlora.storage.provenance import (
    KERNEL_LIMITS as KERNEL_LIMITS,
    code_digest as code_digest,
    cpu_name as cpu_name,
    environment as environment,
    machine as machine,
    machine_line as machine_line,
    versions as versions,
)
from switchlora.storage.reading import (
    FileDamaged as FileDamaged,
    content_of as content_of,
    parse_json as parse_json,
)
from switchlora.storage.records import (
    TRUNK_KEY as TRUNK_KEY,
    Record as Record,
    check_alike as check_alike,
    find_records as find_records,
    is_run as is_run,
    read_config as read_config,
    read_record as read_record,
    read_summary as read_summary,
    warn as warn,
)
from switchlora.storage.resume import (
    AUTO as AUTO,
    Found as Found,
    find as find,
    finished_summary as finished_summary,
)
from switchlora.storage.retention import (
    FOLDER as FOLDER,
    SaveSchedule as SaveSchedule,
    find_all as find_all,
    thin as thin,
    updates_of as updates_of,
)
from switchlora.storage.runlog import (
    CONFIG as CONFIG,
    SUMMARY as SUMMARY,
    FolderLock as FolderLock,
    NoLocks as NoLocks,
    RunLog as RunLog,
    locked as locked,
)
from switchlora.storage.saved import Saved as Saved, load_saved as load_saved
from switchlora.storage.sinks import RunInfo as RunInfo, Sink as Sink
from switchlora.storage.tensorboard_log import TensorBoard as TensorBoard
from switchlora.storage.tensors import (
    learner_state as learner_state,
    load_tensors as load_tensors,
    random_states as random_states,
    set_random_states as set_random_states,
)
from switchlora.storage.unused import unused_removed as unused_removed
from switchlora.storage.wandb_log import (
    BY_ENVIRONMENT as BY_ENVIRONMENT,
    PROJECT as PROJECT,
    WandbLog as WandbLog,
    begin_wandb as begin_wandb,
    check_login as check_login,
    online_or_offline as online_or_offline,
    wandb_mode as wandb_mode,
    wandb_options as wandb_options,
)
