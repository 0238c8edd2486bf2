"""The lines that the page adds to timm's train.py, between the parts of timm around them."""

from types import SimpleNamespace

import pytest
import torch
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from conftest import tiny_vit
from switchlora import LowRankSwitch
from switchlora.adapters import adapted_modules, is_factor, merge
from switchlora.criteria import AtEpoch

EPOCHS, UPDATES = 4, 3
SECOND = {"criterion": AtEpoch(2), "updates_per_epoch": UPDATES, "window": UPDATES, "rank": 2}
"""switches after the second epoch"""


def train_one_epoch(epoch, model, optimizer, lr_scheduler, model_ema):
    """What timm's function of this name does; the mean loss."""
    losses = []
    for number in range(epoch * UPDATES, (epoch + 1) * UPDATES):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(8, 1, 8, 8, generator=generator)
        labels = torch.randint(0, 5, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        model_ema.update(model, step=number)
        optimizer.zero_grad()
        lr_scheduler.step_update(num_updates=number + 1, metric=loss.item())
        losses.append(loss.item())
    return {"loss": sum(losses) / len(losses)}


def run(epochs=EPOCHS, resume=None):
    """What timm's ``main`` does, in its order, with the switch."""
    torch.manual_seed(0)
    model = tiny_vit()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    switch = LowRankSwitch(model, optimizer, **SECOND)
    first = 0
    if resume:
        switch.load_state_dict(torch.load(f"{resume}.switch", weights_only=True))
        first = resume_checkpoint(model, str(resume), optimizer, log_info=False)
    model_ema = ModelEmaV3(model, decay=0.5)
    if resume:
        model_ema.module.load_state_dict(torch.load(resume)["state_dict_ema"])
    lr_scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=UPDATES)
    switch.schedulers.append(lr_scheduler)
    if first:
        lr_scheduler.step_update(first * UPDATES)
    for epoch in range(first, epochs):
        metrics = train_one_epoch(epoch, model, optimizer, lr_scheduler, model_ema)
        if switch.step(metrics["loss"]):
            model_ema = ModelEmaV3(model, decay=0.5)
    return SimpleNamespace(
        model=model, optimizer=optimizer, ema=model_ema.module, switch=switch, epochs=epochs
    )


def keep(found, path):
    """Write what timm's CheckpointSaver writes, and the switch's state beside it."""
    torch.save(
        {
            "epoch": found.epochs - 1,
            "state_dict": found.model.state_dict(),
            "optimizer": found.optimizer.state_dict(),
            "version": 2,
            "state_dict_ema": found.ema.state_dict(),
        },
        path,
    )
    torch.save(found.switch.state_dict(), f"{path}.switch")


@pytest.fixture(scope="module")
def whole():
    return run()


def test_timms_loop_goes_on_with_its_scheduler_and_a_new_average_of_weights(whole):
    assert whole.switch.switched_at == 6 and whole.switch.num_updates == 12
    assert len(adapted_modules(whole.model)) == 8
    factors = {n: p for n, p in whole.ema.named_parameters() if is_factor(n)}
    assert factors and all(p.abs().sum() > 0 for p in factors.values())


def test_an_average_of_adapters_merges_and_loads_elsewhere(whole):
    images = torch.randn(4, 1, 8, 8)
    expected = whole.ema(images)
    average = ModelEmaV3(whole.ema).module
    merge(average)
    plain = tiny_vit().eval()
    plain.load_state_dict(average.state_dict())
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("epochs", [1, 3])
def test_timms_loop_resumes_before_and_after_the_switch(whole, epochs, tmp_path):
    keep(run(epochs), tmp_path / "last.pth.tar")
    again = run(resume=tmp_path / "last.pth.tar")
    assert again.switch.switched_at == 6
    ours = [again.model.state_dict(), again.ema.state_dict()]
    theirs = [whole.model.state_dict(), whole.ema.state_dict()]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_an_average_from_before_the_switch_does_not_go_on(whole):
    average = ModelEmaV3(tiny_vit())
    with pytest.raises(RuntimeError):
        average.update(whole.model)
