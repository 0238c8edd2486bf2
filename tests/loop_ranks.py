"""What every rank of ``test_loop_ranks.py`` does: a plain loop, Accelerate, Lightning."""

import json
from pathlib import Path

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from conftest import tiny_vit
from ranks import spread
from switchlora import LowRankSwitch, UpdateNorm
from switchlora.adapters import merged_state_dict
from switchlora.integrations.lightning import LowRankSwitchCallback
from switchlora.policy import InRank, Restart
from switchlora.process import distributed, gather
from test_loop_again import TWO

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


OPTIONS = {"criterion": UpdateNorm(5.0, patience=1), "window": 6, "rank": 4, "ramp_updates": 4}
"""fires at the second measurement"""


def switching(model, optimizer, **options):
    return LowRankSwitch(model, optimizer, **OPTIONS | options)


def wrapped_in_ddp(model):
    return DistributedDataParallel(model) if distributed.world_size() > 1 else model


def plain_loop(**options):
    """In DistributedDataParallel, which is made anew after the switch."""
    model, optimizer = parts(seed=distributed.rank())
    wrapped = wrapped_in_ddp(model)
    switch = switching(model, optimizer, **options)
    for number in range(UPDATES):
        images, labels = batch(number)
        loss = LOSS(wrapped(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if switch.step(loss):
            wrapped = wrapped_in_ddp(model)
    return switch


def in_stages():
    """The same, in two stages."""
    return plain_loop(**TWO)


def changing_again():
    """The same, with a joint phase and restarts after it."""
    again = {"joint_epochs": 3, "restart": Restart(every_epochs=4), "updates_per_epoch": 1}
    return plain_loop(**again)


def growing():
    """The same, with ranks that grow in directions of the first process's gradients."""
    rule = InRank(every_updates=4, earliest=13, threshold=0.999, buffer=2, most=0.5)
    return plain_loop(growth=rule)


def accelerated(accumulate=1, until=UPDATES, keep=None, resume=None):
    """Under Accelerate, on any number of processes."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, plain_optimizer = parts()
    switch = switching(model, plain_optimizer)
    if resume:
        switch.load_state_dict(torch.load(resume / "switch.pt", weights_only=True))
    wrapped, optimizer = accelerator.prepare(model, plain_optimizer)
    if resume:
        accelerator.load_state(str(resume))
    for number in range(switch.num_updates, until):
        images, labels = batch(number)
        for rows in range(accumulate):
            with accelerator.accumulate(wrapped):
                loss = LOSS(wrapped(images[rows::accumulate]), labels[rows::accumulate])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if switch.step(loss):
                    wrapped = accelerator.prepare(model)
    if keep:
        accelerator.save_state(str(keep))
        torch.save(switch.state_dict(), keep / "switch.pt")
    return switch


class Lit(pl.LightningModule):
    """The same network in Lightning, called by the module's own forward; four epochs."""

    def __init__(self):
        super().__init__()
        self.net, self.optimizer = parts()

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, _):
        return LOSS(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer

    def train_dataloader(self):
        numbers = range(6 * self.current_epoch, 6 * self.current_epoch + 6)
        return DataLoader([batch(number) for number in numbers], batch_size=None)


def lightning_trainer(epochs):
    return pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=distributed.world_size(),
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LowRankSwitchCallback(**OPTIONS)],
    )


def in_lightning(folder):
    """In Lightning's Trainer, stopped after the switch and gone on with."""
    first = lightning_trainer(epochs=3)
    first.fit(Lit())
    first.save_checkpoint(Path(folder) / "lit.ckpt")
    again = lightning_trainer(epochs=4)
    again.fit(Lit(), ckpt_path=Path(folder) / "lit.ckpt", weights_only=True)
    (callback,) = (c for c in again.callbacks if isinstance(c, LowRankSwitchCallback))
    return callback.switch


def found_by(switch):
    """Facts of a loop, equal on all ranks or not."""
    facts = {
        "switched_at": switch.switched_at,
        "ranks": list(switch.ranks.values()),
        "history": [(m.num_updates, m.train_loss) for m in switch.history],
        "num_updates": switch.num_updates,
    }
    model = switch.model
    agree = all(other == facts for other in gather(facts))
    return {**facts, "agree": agree, "spread": spread(model.state_dict().values())}


def all_loops(folder):
    """Each loop on all ranks; what they found is left in ``folder``."""
    distributed.join()
    for loop in (plain_loop, in_stages, changing_again, growing, accelerated, in_lightning):
        switch = loop(folder) if loop is in_lightning else loop()
        found = found_by(switch)
        network = getattr(switch.model, "net", switch.model)
        if distributed.is_primary():
            name = f"{folder}/{loop.__name__}"
            Path(f"{name}.json").write_text(json.dumps(found))
            torch.save(merged_state_dict(network), f"{name}.pt")
    del switch, network
    distributed.leave()
