"""Many runs: jobs of a multirun, and the full phase that they share."""

from switchlora.sweep.jobs import (
    JOB,
    JOB_PATIENCE,
    Sweep,
    failed,
    follow_parent,
    is_job,
    job_folder,
    job_values,
    objectives,
    readable,
    run_job,
    told,
)
from switchlora.sweep.trunk import Trunk, first_firing, give_back, trunk_key
from switchlora.sweep.trunklog import TrunkLog

__all__ = [
    "JOB",
    "JOB_PATIENCE",
    "Sweep",
    "Trunk",
    "TrunkLog",
    "failed",
    "first_firing",
    "follow_parent",
    "give_back",
    "is_job",
    "job_folder",
    "job_values",
    "objectives",
    "readable",
    "run_job",
    "told",
    "trunk_key",
]
