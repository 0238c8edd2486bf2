"""Turn a run into the content of a checkpoint, and back.

``state_of`` and ``restore`` mirror each other. ``restore_parts`` must be called before the learner
is built, because the model needs its adapters and the monitor needs its window first.
"""

import json
from collections.abc import Mapping
from math import fsum
from typing import Any

from pydantic import TypeAdapter
from timm.utils import random_seed
from torch import nn

from switchlora.adapters import adapter_layout, inject_empty, merged_state_dict, train_only
from switchlora.learner import is_sharded
from switchlora.monitor import UpdateMonitor
from switchlora.process import distributed
from switchlora.run.run import Run
from switchlora.run.state import Ledger, TrainState
from switchlora.storage import (
    Found,
    content_checked,
    learner_state,
    load_tensors,
    random_states,
    set_random_states,
)
from switchlora.switching import trained_tensors


def state_of(run: Run) -> dict[str, Any]:
    """Return everything that the run needs to go on exactly, including the learner's tensors.

    All ranks must call it.
    """
    return {
        "config": run.config,
        "data": distributed.from_primary(run.data.digest),
        "train": {**run.state.state_dict(), **run.ledger.state_dict()},
        "adapters": adapter_layout(run.model),
        "start": run.learner.start,
        "monitor": run.monitor.state_dict(),
        "ema": run.ema and run.ema.state_dict(),
        "stopwatch": run.stopwatch.state_dict(),
        "log": run.log.position(),
        "skipped": sorted(run.all_skipped()),
        "random": distributed.gather(random_states()),
        **learner_state(run.learner),
    }


def check_state(state: Mapping[str, Any]) -> None:
    """Raise an error unless the plain values of a checkpoint have the types of this version."""
    json.dumps(state["config"])  # plain values alone
    text = json.dumps(state["train"])
    for kind in (TrainState, Ledger):
        TypeAdapter(kind).validate_json(text, strict=True)
        kind().load_state_dict(state["train"])
    for numbers in (state["monitor"]["losses"], state["stopwatch"]["laps"]):
        fsum(numbers)
    fsum(state["monitor"]["initial_stable_ranks"].values())
    "".join(_skipped(state))
    now = random_states()
    try:
        for states in state["random"]:
            set_random_states(states)
    finally:
        set_random_states(now)


def restore_parts(
    found: Found | None, model: nn.Module, monitor: UpdateMonitor
) -> tuple[TrainState, Ledger]:
    """Restore what must be in place before the learner is built; return the state and the record.

    ``model`` gets the saved adapters (without their weights) and the flags of what trains.
    ``monitor`` gets its window and references. Without a checkpoint (``found`` is None) nothing
    changes and both are new.
    """
    state, ledger = TrainState(), Ledger()
    if found is None:
        return state, ledger
    state.load_state_dict(found.state["train"])
    ledger.load_state_dict(found.state["train"])
    if found.branches:
        ledger.branched_from = str(found.path)
    inject_empty(model, found.state["adapters"])
    train_only(model, set(found.state["trained"]), factors=())  # factors are among the names
    with content_checked(found.path, told=ValueError):
        monitor.load_state_dict(found.state["monitor"])
    return state, ledger


def restore(run: Run, found: Found) -> None:
    """Load tensors, times and random states of ``found`` into the run, and log its position."""
    saved = found.state
    run.starts_elsewhere = found.foreign
    with content_checked(found.path):
        lines = [*found.lines, *load_tensors(found.path, saved, run.learner, found.branches)]
        if run.ema is not None:
            run.ema.load_state_dict(saved["ema"] or merged_state_dict(run.model))
        run.stopwatch.load_state_dict(saved["stopwatch"])
        run.saves.done(run.state.num_updates)
        _set_random_states(saved["random"], run.config["seed"] + run.state.num_updates)
    if not found.branches:  # it may have other data
        run.skipped.update(_skipped(saved))
    for line in lines:
        run.log.line(line)
    run.log.line(
        f"resumed from {found.path}: {run.state.phase} phase, update {run.state.num_updates}"
    )
    if distributed.world_size() > 1 and not is_sharded(run.model):
        same = distributed.agreed_checksum(trained_tensors(run.model))
        run.log.line(distributed.agreement_line(same))


def _skipped(state: Mapping[str, Any]) -> list[str]:
    """Return the images that the run had skipped; earlier versions did not save them."""
    return state.get("skipped", [])


def _set_random_states(states: list[dict[str, Any]], seed: int) -> None:
    """Restore this rank's random generators.

    A rank that the saved run did not have is seeded anew from ``seed``.
    """
    if distributed.rank() < len(states):
        set_random_states(states[distributed.rank()])
    else:
        random_seed(seed, distributed.rank())
