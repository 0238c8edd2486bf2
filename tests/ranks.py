"""What every rank of ``test_distributed.py`` does: one run, then a look around."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

import switchlora.run.transitions
import switchlora.switching.changes
from conf_yamls import build, composed
from runs import SHORT
from starts import program
from switchlora.config import as_plain
from switchlora.learner import Learner
from switchlora.process import distributed
from switchlora.process.schema import not_yet_there
from switchlora.run import agree_on_data, agree_on_settings, finish, prepare
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


def make_folder_late(folder):
    """Whether the folder was new, where rank 1 is the first to look for it and to make it."""
    if distributed.is_primary():
        time.sleep(0.2)
    found = not_yet_there(folder)
    folder.mkdir(exist_ok=True)
    return found == [folder]


def look_around(folder):
    """How the helpers behave on this rank."""
    return {
        "new folder": make_folder_late(folder / "late"),
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
    found = _look(folder, *overrides)
    if distributed.is_primary():
        (Path(folder) / "ranks.json").write_text(json.dumps(found))
    distributed.leave()


def _look(folder, *overrides):
    switchlora.run.transitions.predicted_update = lambda run: None
    run = prepare(composed(*SHORT, *overrides), Path(folder))
    with run.log:
        fit(run)
        finish(run, "finished")
    plain = run.learner.plain()
    return {
        "spread": spread(plain.state_dict().values()),
        "differ": [n for n, tensor in plain.state_dict().items() if spread([tensor])],
        "trained": len(trained_tensors(plain)),
        "ranks": distributed.gather(look_around(Path(folder))),
        "local": sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel() for p in run.model.parameters()
        ),
        "total": sum(p.numel() for p in run.model.parameters()),
    }


def run_with_a_broken_switch(folder, *overrides):
    """The same where the first switch fails on rank 1."""
    break_the_first_switch()
    run_and_look(folder, *overrides)


def program_with_own_words(own, *words):
    """``switchlora *words`` where rank 1 was given the word ``own`` too."""
    extra = (own,) if os.environ["RANK"] == "1" else ()
    program(*words, *extra)


def program_with_a_changed_weight(number, *words):
    """``switchlora *words`` where the memory of rank 1 flips a bit before an update."""
    update = Learner.update

    def spoiled(self, images, targets, loss_fn, num_updates):
        if num_updates + 1 == int(number) and distributed.rank() == 1:
            weight = self.model.get_parameter("blocks.1.mlp.fc1.weight").data
            weight.view(torch.int32)[0, 0] ^= 1
        return update(self, images, targets, loss_fn, num_updates)

    Learner.update = spoiled
    program(*words)


def program_with_other_factors(*words):
    """``switchlora *words`` where the switch gives rank 1 other factors."""
    inject = switchlora.switching.changes.inject

    def spoiled(model, *arguments):
        found = inject(model, *arguments)
        if distributed.rank() == 1:
            for parameter in model.parameters():
                parameter.data.mul_(1 + 1e-6)
        return found

    switchlora.switching.changes.inject = spoiled
    program(*words)


def compare_settings(folder, *words):
    """What rank 0 hears when rank 1 has the same words and one of these beside them."""
    distributed.join()
    heard = {}
    for word in words:
        own = (word,) if distributed.rank() == 1 else ()
        config = as_plain(composed(*SHORT, *own))
        heard[word] = raised(lambda config=config: agree_on_settings(config))
    for what, own in (("same data", ()), ("other data", ("data.train_size=320",))):
        data = build(composed(*SHORT, *(own if distributed.rank() == 1 else ())).data)
        heard[what] = raised(lambda data=data: agree_on_data(data))
    if distributed.is_primary():
        (Path(folder) / "heard.json").write_text(json.dumps(heard))
    distributed.leave()
