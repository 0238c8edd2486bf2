"""Models, optimizers and loops in which a switch could go wrong without a word."""

import io
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import switchlora.loop.measure
from conftest import tiny_vit
from pretended import DEVICE, on_pretended
from switchlora import LowRankSwitch
from switchlora.adapters import adapted_modules, is_factor, merge
from switchlora.criteria import AtEpoch, LossPlateau
from switchlora.initializers import gaussian

LOSS = nn.CrossEntropyLoss()
SOON = {"criterion": AtEpoch(2), "updates_per_epoch": 1, "window": 2, "rank": 2}
"""switches after two updates"""


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def images_and_labels(number, size=8, channels=1, images=8):
    generator = torch.Generator().manual_seed(number)
    shape = (images, channels, size, size)
    labels = torch.randint(0, 5, (images,), generator=generator)
    return torch.randn(shape, generator=generator), labels


def update(model, optimizer, number=0, **sizes):
    """One update of a plain loop; its loss."""
    images, labels = images_and_labels(number, **sizes)
    optimizer.zero_grad()
    loss = LOSS(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss


def switched(model, updates=4, sizes=None, **options):
    """The switch in a plain loop over ``model``."""
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON | options)
    for number in range(updates):
        switch.step(update(model, optimizer, number, **sizes or {}))
    return switch


class Encoder(nn.Module):
    """A transformer of torch's own layers, over rows of pixels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.layer(images.squeeze(1)).mean(1))


def test_the_fast_path_of_torchs_encoder_computes_with_the_adapters(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)
    torch.manual_seed(0)
    model = Encoder()
    switched(model, target_modules=["linear1", "linear2"], factor_lr=100.0)
    images, _ = images_and_labels(99)
    with torch.no_grad():  # where torch would take it
        evaluated = model.eval()(images)
    merge(model)
    torch.testing.assert_close(evaluated, model(images), rtol=0, atol=1e-5)


def test_a_saved_model_computes_with_the_adapters_in_a_process_that_made_none(monkeypatch):
    torch.manual_seed(0)
    model = Encoder()
    switched(model, target_modules=["linear1", "linear2"], factor_lr=100.0)
    saved, images = io.BytesIO(), images_and_labels(99)[0]
    torch.save(model.eval(), saved)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    with torch.no_grad():  # where torch would take the fast path
        evaluated = loaded(images)
    merge(model)
    torch.testing.assert_close(evaluated, model(images), rtol=0, atol=1e-5)


def test_torchs_attention_reads_the_weight_of_its_output_so_a_target_there_is_refused():
    says = r"layer.self_attn.out_proj, are never called: .*leave them out of target_modules"
    with pytest.raises(ValueError, match=says):
        switched(Encoder(), target_modules=["out_proj", "linear1"])


READ_QKV = {
    "eva02_tiny_patch14_224": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "beit_base_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", READ_QKV)
def test_attention_that_reads_the_weight_of_qkv_is_refused_there_and_switches_elsewhere(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=16, num_classes=5, **READ_QKV[name])
    sizes = {"size": 16, "channels": 3}
    with pytest.raises(ValueError, match="attn.qkv, are never called"):
        switched(model, target_modules="all-linear", sizes=sizes)
    switch = switched(model, target_modules=["attn.proj"], sizes=sizes)
    assert switch.switched and set(switch.ranks) == {"blocks.0.attn.proj", "blocks.1.attn.proj"}


def test_a_weight_that_two_modules_share_is_refused():
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match="fc1.*shared with another module"):
        switched(model)


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_a_compiled_model_switches_and_computes_with_the_adapters(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    called = model
    if how == "wrapper":
        called = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    switch = switched(called, target_modules="all-linear")
    assert switch.switched and set(adapted_modules(model)) == {"1"}
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if is_factor(n))
    images, _ = images_and_labels(99)
    torch.testing.assert_close(called(images), model.forward(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [lambda o: LambdaLR(o, lambda n: 1 / (n + 1)), lambda o: CosineAnnealingLR(o, 20)]
)
def test_a_scheduler_that_was_stepped_before_goes_on_from_there(kind):
    def rates(switches):
        model = tiny_vit()
        optimizer = sgd(model)
        scheduler = kind(optimizer)
        for number in range(5):
            update(model, optimizer, number)
            scheduler.step()
        options = SOON if switches else SOON | {"criterion": AtEpoch(99)}
        switch = LowRankSwitch(model, optimizer, scheduler, factor_lr=3, ramp_updates=0, **options)
        for number in range(4):
            update(model, optimizer, number)
            scheduler.step()
            switch.step()
        return [group["lr"] for group in optimizer.param_groups]

    (alone,) = rates(switches=False)
    assert rates(switches=True) == pytest.approx([alone, 3 * alone])


def test_step_after_every_micro_batch_counts_updates():
    model = tiny_vit()
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON)
    fired = []
    for number in range(12):
        images, labels = images_and_labels(number)
        (LOSS(model(images), labels) / 3).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        if switch.step(float(number)):
            fired.append(number)
    assert fired == [5] and switch.num_updates == 4
    assert switch.history[0].train_loss == 2.5  # of the six micro-batches


def test_step_after_every_epoch_counts_its_updates():
    model = tiny_vit()
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON)
    for epoch in range(2):
        for number in range(3):
            update(model, optimizer, number)
        assert switch.step() == (epoch == 0)
    assert switch.switched_at == 3 and switch.num_updates == 6


@pytest.mark.parametrize("fused", [False, True])
def test_updates_that_a_grad_scaler_skips_do_not_count(fused):
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    switch = LowRankSwitch(model, optimizer, **SOON)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for number in range(6):
        images, labels = images_and_labels(number)
        optimizer.zero_grad()
        scaler.scale(LOSS(model(images), labels)).backward()
        if number in (0, 2):
            model.head.bias.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        switch.step()
        counts.append(switch.num_updates)
    assert counts == [0, 1, 1, 2, 3, 4] and switch.switched_at == 2


def test_the_optimizer_of_another_object_is_refused():
    """It would never be counted, and the switch would never fire."""
    model = tiny_vit()
    switch = LowRankSwitch(model, sgd(model), **SOON)
    another = sgd(model)
    switch.step(update(model, another))
    with pytest.raises(ValueError, match="weights have moved in 2 calls.*made no update"):
        switch.step(update(model, another))


@pytest.mark.parametrize("options", [{"criterion": AtEpoch(9)}, {"joint_epochs": 9}])
def test_an_optimizer_that_is_made_anew_before_the_last_change_is_refused(options):
    model = flat_net()
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON | {"target_modules": ["1"]} | options)
    for _ in range(3):
        switch.step(update(model, optimizer))
    another = sgd(model)
    for _ in range(3):
        switch.step(update(model, another))
    with pytest.raises(ValueError, match="weights have moved in 4 calls.*made no update"):
        switch.step(update(model, another))


def test_weights_and_losses_that_are_not_finite_do_not_switch():
    model = tiny_vit()
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON)
    update(model, optimizer)
    switch.step(math.nan)
    update(model, optimizer)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = math.inf
    assert not switch.step(math.nan)
    assert switch.verdict.reason == "what is measured of blocks.0.mlp.fc1 is not finite"
    model = tiny_vit()
    optimizer = sgd(model)
    by_loss = LowRankSwitch(model, optimizer, **SOON | {"criterion": LossPlateau(patience=1)})
    for number in range(6):
        update(model, optimizer, number)
        assert not by_loss.step(math.nan)
    assert "not finite" in by_loss.verdict.reason


def test_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setattr(switchlora.loop.measure, "DTensor", nn.Parameter)
    with pytest.raises(ValueError, match="the model is sharded"):
        switched(tiny_vit())


def test_a_model_that_moves_to_another_device_afterwards_switches_there():
    with on_pretended():
        model = tiny_vit(depth=1)
        optimizer = sgd(model)
        switch = LowRankSwitch(model, optimizer, **SOON)
        model.to(DEVICE)
        for number in range(3):
            images, labels = images_and_labels(number)
            optimizer.zero_grad()
            LOSS(model(images.to(DEVICE)), labels.to(DEVICE)).backward()
            optimizer.step()
            switch.step()
        assert switch.switched and {p.device for p in model.parameters()} == {DEVICE}


def flat_net(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *layers, nn.Linear(32, 5))


class Masked(nn.Sequential):
    """A model that hides some of its inputs at random, in evaluation too."""

    def forward(self, images):
        return super().forward(images * (torch.rand_like(images) > 0.5))


def test_a_model_that_draws_in_evaluation_too_switches_and_its_draws_go_on():
    torch.manual_seed(0)
    model = Masked(*flat_net())
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, target_modules="all-linear", **SOON)
    for number in range(2):
        loss = update(model, optimizer, number)
        drawn = torch.get_rng_state()
        fired = switch.step(loss)
        assert torch.equal(torch.get_rng_state(), drawn)
    assert fired


@pytest.mark.filterwarnings("ignore:the switch failed and was undone")
def test_a_switch_that_is_undone_leaves_each_module_its_mode():
    model = flat_net(nn.BatchNorm1d(32), nn.Linear(32, 32), nn.BatchNorm1d(32))
    held, runs = model[2].eval(), model[4].requires_grad_(False)

    def init(weight, update, rank):
        if rank > 1:  # later than the trial of the start
            raise RuntimeError("no factors today")
        return gaussian(weight, update, rank)

    switch = switched(model, target_modules="all-linear", init=init)
    assert switch.failures and not held.training and runs.training


def test_all_linear_leaves_out_what_is_frozen_or_made_of_other_weights():
    layers = [nn.Linear(32, 32) for _ in range(5)]
    layers[0].requires_grad_(False)
    parametrizations.weight_norm(layers[1])
    parametrizations.spectral_norm(layers[2])
    prune.l1_unstructured(layers[3], "weight", 0.5)
    model = flat_net(*layers)
    model[-1].requires_grad_(False)
    frozen = layers[0].weight.clone()
    switch = switched(model, target_modules="all-linear")
    assert set(switch.ranks) == {"1", "6"} and torch.equal(layers[0].weight, frozen)
    assert not layers[0].weight.requires_grad
    with pytest.raises(ValueError, match="no other linear is left: there is nothing to adapt"):
        switched(flat_net().requires_grad_(False), target_modules="all-linear")


NO_TARGETS = [
    (lambda linear: linear.requires_grad_(False), r"^1\.weight does not train: leave 1 out"),
    (parametrizations.weight_norm, r"^1\.weight is no parameter, .*: remove that"),
    (parametrizations.spectral_norm, r"^1\.weight is no parameter, .*: remove that"),
    (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), r"^1\.weight is no parameter"),
]


@pytest.mark.parametrize("change, says", NO_TARGETS)
def test_a_target_whose_weight_is_no_parameter_or_does_not_train_is_refused(change, says):
    model = flat_net()
    change(model[1])
    with pytest.raises(ValueError, match=says):
        LowRankSwitch(model, sgd(model), target_modules=["1"], rank=2)


def test_a_step_in_inference_mode_is_refused():
    model = flat_net()
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, target_modules=["1"], rank=2)
    loss = update(model, optimizer)
    with torch.inference_mode(), pytest.raises(ValueError, match="call it outside"):
        switch.step(loss)


@pytest.mark.parametrize("part", [nn.Linear(32, 32), nn.LayerNorm(32)])
def test_what_the_loop_had_frozen_at_the_switch_trains_when_the_loop_lets_it(part):
    model = flat_net(part.requires_grad_(False))
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON, target_modules=["1"])
    for number in range(3):
        switch.step(update(model, optimizer, number))
    part.requires_grad_(True)
    before = part.weight.clone()
    update(model, optimizer, 3)
    assert switch.switched and not torch.equal(part.weight, before)


def test_a_step_where_the_loop_has_frozen_the_model_is_refused():
    model = flat_net()
    optimizer = sgd(model)
    switch = LowRankSwitch(model, optimizer, **SOON, target_modules=["1"])
    with pytest.raises(ValueError, match=r"no parameter of the model trains where step\(\)"):
        for number in range(3):
            loss = update(model.requires_grad_(True), optimizer, number)
            model.requires_grad_(False)
            switch.step(loss)
