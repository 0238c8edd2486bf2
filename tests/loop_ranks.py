"""What every rank of ``test_loop_ranks.py`` does: a plain loop, and one under Accelerate."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import tiny_vit
from ranks import spread
from switchlora import LowRankSwitch, UpdateNorm
from switchlora.adapters import merged_state_dict
from switchlora.process import distributed, gather

UPDATES = 24
LOSS = nn.CrossEntropyLoss()


def batch(number):
    """This rank's share of a batch."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 5, (16,), generator=generator)
    mine = slice(distributed.rank(), None, distributed.world_size())
    return images[mine], labels[mine]


def parts(seed=0):
    """A model and its optimizer."""
    torch.manual_seed(seed)
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer


def switching(model, optimizer):
    criterion = UpdateNorm(5.0, patience=1)
    return LowRankSwitch(model, optimizer, criterion=criterion, window=6, rank=4, ramp_updates=4)


def plain_loop():
    """In DistributedDataParallel, which is made anew after the switch."""
    model, optimizer = parts(seed=distributed.rank())
    wrapped = DistributedDataParallel(model)
    switch = switching(model, optimizer)
    for number in range(UPDATES):
        images, labels = batch(number)
        loss = LOSS(wrapped(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if switch.step(loss):
            wrapped = DistributedDataParallel(model)
    return switch


def accelerated(accumulate=1):
    """Under Accelerate, on any number of processes."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, plain_optimizer = parts()
    switch = switching(model, plain_optimizer)
    wrapped, optimizer = accelerator.prepare(model, plain_optimizer)
    for number in range(UPDATES):
        images, labels = batch(number)
        for rows in range(accumulate):
            with accelerator.accumulate(wrapped):
                loss = LOSS(wrapped(images[rows::accumulate]), labels[rows::accumulate])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if switch.step(loss):
                    wrapped = accelerator.prepare(model)
    return switch


def found_by(switch):
    """Facts of a loop, equal on all ranks or not."""
    facts = {
        "switched_at": switch.switched_at,
        "ranks": switch.ranks,
        "history": [(m.num_updates, m.train_loss) for m in switch.history],
        "num_updates": switch.num_updates,
    }
    model = switch.model
    agree = all(other == facts for other in gather(facts))
    return {**facts, "agree": agree, "spread": spread(model.state_dict().values())}


def two_loops(folder):
    """Both loops on all ranks; what they found is left in ``folder``."""
    distributed.join()
    found = {}
    for loop in (plain_loop, accelerated):
        switch = loop()
        found[loop.__name__] = found_by(switch)
        if distributed.is_primary():
            torch.save(merged_state_dict(switch.model), Path(folder) / f"{loop.__name__}.pt")
    if distributed.is_primary():
        (Path(folder) / "ranks.json").write_text(json.dumps(found))
    del switch
    distributed.leave()
