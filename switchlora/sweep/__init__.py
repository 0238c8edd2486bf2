"""Sweeps of many runs: the jobs of a multirun, and the full phase that they share."""

from switchlora.sweep.jobs import (
    JOB as JOB,
    JOB_PATIENCE as JOB_PATIENCE,
    Sweep as Sweep,
    failed as failed,
    follow_parent as follow_parent,
    is_empty as is_empty,
    is_job as is_job,
    job_folder as job_folder,
    job_values as job_values,
    objectives as objectives,
    quoted as quoted,
    readable as readable,
    run_job as run_job,
    told as told,
    words_for_yamls as words_for_yamls,
)
from switchlora.sweep.trunk import (
    Trunk as Trunk,
    first_firing as first_firing,
    give_back as give_back,
    trunk_key as trunk_key,
)
from switchlora.sweep.trunklog import TrunkLog as TrunkLog
