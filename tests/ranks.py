"""What every rank of ``test_distributed.py`` does: one run, then a look around."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

import switchlora.run.transitions
import switchlora.switching.changes
from conf_yamls import composed
from runs import SHORT
from switchlora.process import distributed
from switchlora.run import finish, prepare
from switchlora.switching import trained_tensors
from switchlora.train import fit


def spread(tensors):
    """The largest difference of an element between two ranks."""
    worst = 0.0
    for tensor in tensors:
        most, least = tensor.detach().clone(), tensor.detach().clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        worst = max(worst, float((most - least).abs().max()))
    return worst


def raised(block):
    """The message of what ``block`` raises, '' if nothing."""
    try:
        block()
    except Exception as error:
        return str(error)
    return ""


def fail_on(number):
    if distributed.rank() == number:
        raise ValueError(f"broken on rank {number}")


def in_step(block):
    with distributed.together():
        block()


def look_around():
    """How the helpers behave on this rank."""
    return {
        "sum": distributed.total([1.0, distributed.rank()]),
        "any": distributed.any_rank(distributed.rank() == 1, False),
        "primary": distributed.from_primary(distributed.rank),
        "primary fails": raised(lambda: distributed.from_primary(lambda: fail_on(0))),
        "one fails": raised(lambda: in_step(lambda: fail_on(1))),
        "all well": raised(lambda: in_step(lambda: fail_on(-1))),
        "same": distributed.agreed_checksum({"x": torch.ones(3, 1)}),
        "different": raised(
            lambda: distributed.agreed_checksum({"x": torch.full((2,), distributed.rank())})
        ),
    }


def break_the_first_switch():
    """Let the injection fail once, on rank 1 only."""
    inject = switchlora.switching.changes.inject

    def failing(*arguments):
        switchlora.switching.changes.inject = inject
        fail_on(1)
        return inject(*arguments)

    switchlora.switching.changes.inject = failing


def run_and_look(folder, *overrides):
    """Make a run in ``folder`` and leave what this group of ranks found in ``ranks.json``.

    No seconds are predicted, since that would take some.
    """
    distributed.join()
    switchlora.run.transitions.predicted_update = lambda run: None
    run = prepare(composed(*SHORT, *overrides), Path(folder))
    with run.log:
        fit(run)
        finish(run, "finished")
    plain = run.learner.plain()
    found = {
        "spread": spread(plain.state_dict().values()),
        "differ": [n for n, tensor in plain.state_dict().items() if spread([tensor])],
        "trained": len(trained_tensors(plain)),
        "ranks": distributed.gather(look_around()),
        "local": sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel() for p in run.model.parameters()
        ),
        "total": sum(p.numel() for p in run.model.parameters()),
    }
    if distributed.is_primary():
        (Path(folder) / "ranks.json").write_text(json.dumps(found))
    distributed.leave()


def run_with_a_broken_switch(folder, *overrides):
    """The same where the first switch fails on rank 1."""
    break_the_first_switch()
    run_and_look(folder, *overrides)
