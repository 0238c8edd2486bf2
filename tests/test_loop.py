"""The switch in a loop that is not ours: the same optimizer and schedulers go on."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

from conf_yamls import composed
from conftest import tiny_vit
from runs import BY_DATE, SHORT
from switchlora import LowRankSwitch, UpdateNorm, WeightUpdateMonitor
from switchlora.adapters import (
    adapted_modules,
    cola_linear,
    core_linear,
    factorized_linear,
    guided_linear,
    is_factor,
    merged_state_dict,
    switched_linear,
)
from switchlora.criteria import AtEpoch, Verdict
from switchlora.learner import Muon, autocast, in_parts
from switchlora.policy import Refresh, Restart
from switchlora.ranks import Fixed
from switchlora.run import prepare
from switchlora.train import train_and_finish

UPDATES = 24
LOSS = nn.CrossEntropyLoss()


def batch(number):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 5, (16,), generator=generator)


def at(update):
    """A criterion that fires at the first measurement from ``update`` on."""
    return AtEpoch(update)


SOON = {"criterion": at(2), "updates_per_epoch": 1, "window": 2, "rank": 2}
"""switches after two updates"""


def run_bare(model, optimizer, switch, updates):
    """A loop without a scheduler."""
    for number in range(updates):
        images, labels = batch(number)
        optimizer.zero_grad()
        LOSS(model(images), labels).backward()
        optimizer.step()
        switch.step()


class Loop:
    """A plain loop: model, AdamW, a scheduler, and the switch."""

    def __init__(self, scheduler=None, optimizer=None, **options):
        torch.manual_seed(0)
        self.model = tiny_vit()
        make = optimizer or (lambda params: torch.optim.AdamW(params, lr=1e-3))
        self.optimizer = make(self.model.parameters())
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        options = {"window": 6, "criterion": at(12), "updates_per_epoch": 1, "rank": 2} | options
        self.switch = LowRankSwitch(self.model, self.optimizer, self.scheduler, **options)
        self.fired = []
        self.losses = []

    def run(self, until=UPDATES):
        while self.switch.num_updates < until:
            number = self.switch.num_updates
            images, labels = batch(number)
            loss = LOSS(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.advance(number + 1, loss)
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
            if self.switch.step(loss):
                self.fired.append(number + 1)
        return self

    def advance(self, number, loss):
        if isinstance(self.scheduler, CosineLRScheduler):
            self.scheduler.step_update(number)
        elif isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss.detach())
        elif self.scheduler is not None:
            self.scheduler.step()

    def factors(self):
        return {n: p for n, p in self.model.named_parameters() if is_factor(n)}

    def trained_factors(self):
        return {n: p for n, p in self.factors().items() if p.requires_grad}


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_switch_fires_once_and_the_same_optimizer_trains_the_factors():
    loop = Loop()
    groups = loop.optimizer.param_groups
    first = groups[0]
    loop.run(12)
    assert loop.fired == [12] and loop.switch.switched_at == 12
    assert loop.optimizer.param_groups is groups and groups[0] is first
    held = {p for group in groups for p in group["params"]}
    assert held == {p for p in loop.model.parameters() if p.requires_grad}
    assert set(loop.optimizer.state) <= held and loop.optimizer.state[loop.model.head.weight]
    before = {n: p.detach().clone() for n, p in loop.factors().items()}
    frozen = {n: m.weight.clone() for n, m in adapted_modules(loop.model).items()}
    loop.run()
    assert loop.fired == [12]
    assert all(torch.equal(p, before[n]) == is_factor(n, "A") for n, p in loop.factors().items())
    assert all(torch.equal(m.weight, frozen[n]) for n, m in adapted_modules(loop.model).items())


def test_it_measures_as_a_criterion_asks_and_says_what_it_found(capsys):
    reports = []
    loop = Loop(criterion=UpdateNorm(5.0, patience=1), on_switch=reports.append, rank=0.5).run()
    assert loop.fired == [12]
    assert [m.num_updates for m in loop.switch.history] == [6, 12]
    expected = sum(loop.losses[6:12]) / 6
    assert loop.switch.history[-1].train_loss == pytest.approx(expected, rel=1e-5)
    assert loop.switch.verdict.fires and reports[0].ranks == loop.switch.ranks
    numbers = loop.switch.log_dict()
    assert numbers["switch/switched"] == 1.0 and "update_norm/blocks.0.mlp.fc1" in numbers
    loop.switch.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: ")


def test_it_measures_alone_too():
    torch.manual_seed(0)
    model = tiny_vit()
    monitor = WeightUpdateMonitor(model, ["fc1"], window=2)
    assert monitor.step(1.0) == {}
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    numbers = monitor.step(3.0)
    assert numbers["train/window_loss"] == 2.0
    assert numbers["update_norm/blocks.0.mlp.fc1"] == pytest.approx(1 / 3)
    assert numbers["update_norm/blocks.1.mlp.fc1"] == 0.0
    pytest.importorskip("pandas")
    table = monitor.history.to_pandas()
    assert len(table) == 2 and table.update_norm.max() > 0


def test_a_ramp_ends_beside_hooks_of_ones_own():
    loop, rates = Loop(ramp_updates=3), []
    loop.run(12)
    for register in (
        loop.optimizer.register_step_pre_hook,
        loop.optimizer.register_step_post_hook,
    ):
        register(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    loop.run(16)
    assert rates == pytest.approx([1e-3 / 3, 1e-3, 2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda n: 1 / (n + 1)),
    "lambdas": lambda o: LambdaLR(o, [lambda n: 1 / (n + 1)] * len(o.param_groups)),
    "cosine": lambda o: CosineAnnealingLR(o, UPDATES),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "one cycle": lambda o: OneCycleLR(o, 1e-3, total_steps=UPDATES + 1),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.9),
    "chained": lambda o: ChainedScheduler([LinearLR(o), ExponentialLR(o, 0.9)], optimizer=o),
    "averaging": lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=UPDATES - 4),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, UPDATES)], [4]),
    "timm": lambda o: CosineLRScheduler(o, UPDATES, t_in_epochs=False, warmup_t=3),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on_and_factors_keep_their_multiple_of_the_rate(kind):
    loop = Loop(SCHEDULERS[kind], factor_lr=3, ramp_updates=0).run()
    old, new = loop.optimizer.param_groups
    assert loop.fired == [12]
    assert new["lr"] == pytest.approx(3 * old["lr"], rel=1e-6)
    alone = Loop(SCHEDULERS[kind], criterion=at(99)).run()
    if kind != "plateau":  # which reads the losses
        assert old["lr"] == pytest.approx(alone.optimizer.param_groups[0]["lr"], rel=1e-6)


def test_a_scheduler_of_ones_own_is_told_by_a_function():
    told = []
    loop = Loop()
    loop.switch.schedulers = [told.append]
    loop.run()
    (groups,) = told
    assert [group.like for group in groups] == [0] * len(groups)
    with pytest.raises(ValueError, match="neither torch's nor timm's"):
        LowRankSwitch(loop.model, loop.optimizer, object())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_goes_on(kind):
    loop = Loop(optimizer=OPTIMIZERS[kind]).run()
    assert loop.fired == [12] and all(map(torch.isfinite, map(torch.tensor, loop.losses)))
    assert all(p.abs().sum() > 0 for p in loop.factors().values())


@pytest.mark.parametrize("trained", ["AB", "B"])
def test_muon_goes_on_with_the_pairs_of_factors(trained):
    torch.manual_seed(0)
    model = tiny_vit()
    optimizer = Muon(in_parts(model, [{"params": list(model.parameters())}]), lr=1e-3)
    switch = LowRankSwitch(model, optimizer, train_factors=list(trained), **SOON)
    run_bare(model, optimizer, switch, 5)
    factors = {p for n, p in model.named_parameters() if is_factor(n, trained)}
    parts = [set(g["params"]) for g in optimizer.param_groups if g["part"] == "factors"]
    assert set.union(*parts) == factors and all(p.abs().sum() > 0 for p in factors)


def test_groups_of_the_loop_keep_their_settings_and_what_was_frozen_stays_frozen():
    torch.manual_seed(0)
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    blocks = list(model.blocks.parameters())
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in map(id, blocks)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": blocks, "lr": 5e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    switch = LowRankSwitch(model, optimizer, ramp_updates=0, factor_lr=2, **SOON)
    run_bare(model, optimizer, switch, 4)
    assert switch.switched and not model.pos_embed.requires_grad
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.01, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-4, 1e-3]


def test_what_fails_leaves_model_optimizer_and_schedulers_as_they_were(monkeypatch):
    loop = Loop(SCHEDULERS["cosine"]).run(11)
    before = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))
    names = trained(loop.model)

    def broken(model, batch):
        output = model(batch)
        return output + 1 if adapted_modules(model) else output

    loop.switch._inputs._given = broken
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.optimizer.step()
        loop.switch.step(1.0)
    assert "undone" in str(caught[0].message) and not loop.switch.switched
    after = (loop.model.state_dict(), loop.optimizer.state_dict())
    assert trained(loop.model) == names and not adapted_modules(loop.model)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert loop.scheduler.base_lrs == [1e-3]


@pytest.mark.parametrize("stop", [8, 12, 17])
def test_a_loop_that_stops_anywhere_and_loads_its_states_ends_the_same(stop):
    whole = Loop(SCHEDULERS["lambda"]).run()
    first = Loop(SCHEDULERS["lambda"]).run(stop)
    parts = ("switch", "model", "optimizer", "scheduler")
    saved = copy.deepcopy({part: getattr(first, part).state_dict() for part in parts})
    again = Loop(SCHEDULERS["lambda"])
    for part in parts:
        getattr(again, part).load_state_dict(saved[part])
    again.run()
    assert (again.fired or [12]) == whole.fired and again.switch.ranks == whole.switch.ranks
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_after_a_switch_rates_rise_again_beside_the_scheduler():
    loop = Loop(SCHEDULERS["cosine"], ramp_updates=4).run(12)
    seen = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    outside = []
    for update in range(13, 19):
        outside.append(loop.optimizer.param_groups[0]["lr"])
        loop.run(update)
    shares = [inside / rate for inside, rate in zip(seen, outside, strict=True)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("failing", [0, 2])
def test_a_step_that_raises_an_error_in_the_ramp_lowers_no_rate_for_good(failing):
    loop = Loop(ramp_updates=3, factor_lr=1).run(12 + failing)
    with pytest.raises(ZeroDivisionError):
        loop.optimizer.step(lambda: 1 / 0)
    loop.run(16)
    assert [group["lr"] for group in loop.optimizer.param_groups] == [1e-3, 1e-3]


def test_models_that_return_more_than_logits_switch_too():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = tiny_vit()

        def forward(self, pixels, labels=None):
            logits = self.vit(pixels)
            return {"loss": LOSS(logits, labels), "logits": logits}

    asked = []

    def forward(model, batch):
        asked.append(sorted(batch))
        return model(**batch)["logits"]

    for function in (None, forward):
        torch.manual_seed(0)
        model = Wrapped()
        optimizer = torch.optim.AdamW(model.parameters())
        switch = LowRankSwitch(model, optimizer, forward=function, **SOON)
        for number in range(2):
            images, labels = batch(number)
            optimizer.zero_grad()
            model(pixels=images, labels=labels)["loss"].backward()
            optimizer.step()
            fired = switch.step()
        assert fired and switch.report.drift <= 1e-5
    assert asked[0] == ["labels", "pixels"]


class Bypassed(nn.Module):
    """A model that reads the weight of a linear itself."""

    def __init__(self):
        super().__init__()
        self.fc1, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.fc1.weight).relu())


def test_what_cannot_work_is_refused_in_words():
    model = Bypassed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = LowRankSwitch(model, optimizer, target_modules=["fc1"], rank=2)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(ValueError, match="never called.*target_modules"):
        switch.step(1.0)
    with pytest.raises(ValueError, match="optimizer does not train the weight of fc1"):
        LowRankSwitch(model, torch.optim.SGD(model.head.parameters()), target_modules=["fc1"])
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    with pytest.raises(ValueError, match="give the module inside"):
        LowRankSwitch(wrapped, optimizer)
    silent = LowRankSwitch(model, optimizer, target_modules="all-linear", rank=2)
    assert list(silent.watch.monitor.targets) == ["fc1"]
    with pytest.raises(ValueError, match="was not called"):
        silent.step(1.0)


MISTAKES = [
    ({"criterion": at(1)}, "give updates_per_epoch"),
    ({"joint_epochs": 1.0}, "joint_epochs counts epochs: give updates_per_epoch"),
    ({"restart": Restart()}, "restart counts epochs: give updates_per_epoch"),
    ({"restart": Restart(init="svd")}, "restart.init is 'svd': give a function"),
    *(({name: "block"}, f"{name} is 'block': give a") for name in ("stages", "restart", "growth")),
    ({"criterion": UpdateNorm}, "such as UpdateNorm"),
    ({"criterion": lambda history: True}, "criterion returned True: return a Verdict"),
    ({"rank": 0.0001}, "rank.share=0.0001 is too small: .* parameters more"),
    ({"rank": 5000}, "rank=5000 does not fit .* give 1 to"),
    ({"rank": Fixed(64)}, "rank=64 does not fit .* give 1 to 32"),
    *(({"rank": rank}, "rank is .*give at least 1") for rank in (0, -3)),
    *(({"rank": rank}, "give a number of at least 1, a share") for rank in (True, "8", None, 1j)),
    *(({"factor_lr": rate}, "factor_lr is .* above 0") for rate in ("fast", -1, 0, True)),
    *(({"window": size}, "window is .*at least 1") for size in (0, -1, 1.5, "9", True)),
    *(({"updates_per_epoch": count}, "updates_per_epoch is .*at least 1") for count in (0, 2.5)),
    *(({"ramp_updates": count}, "ramp_updates is .*at least 0") for count in (-1, 0.5)),
    ({"factor_weight_decay": -1}, "factor_weight_decay is -1: give at least 0"),
    ({"init": "svd"}, "init is 'svd'"),
    ({"on_switch": 3}, "on_switch is 3: give a function"),
    ({"forward": "logits"}, "forward is 'logits': give a function"),
    ({"targets": ["fc1"]}, "no argument targets"),
    ({"factors_lr": 3}, "no argument factors_lr"),
    *(({"target_modules": wrong}, "target_modules") for wrong in (3, [3], [], ["("])),
    ({"target_modules": ["nope"]}, "'nope' matches no linear layer"),
    ({"keep": ["nope"]}, "keep 'nope' matches no parameter"),
    ({"train_factors": ["C"]}, "^train_factors is"),
]


@pytest.mark.parametrize("options, says", MISTAKES)
def test_an_argument_that_cannot_work_is_refused_at_once_by_its_name(options, says):
    model = tiny_vit()
    with pytest.raises(ValueError, match=says) as refused:
        LowRankSwitch(model, torch.optim.AdamW(model.parameters()), **options)
    assert "switch." not in str(refused.value) and "switch/" not in str(refused.value)


@pytest.mark.parametrize(
    "model, optimizer, says",
    [
        (3, torch.optim.SGD, "model is a int: give an nn.Module"),
        (None, lambda parameters: 3, "optimizer is a int: give an optimizer"),
        (None, list, "optimizer is a list"),
        (None, torch.optim.LBFGS, "LBFGS takes one group"),
    ],
)
def test_what_is_no_model_or_no_optimizer_for_it_is_refused(model, optimizer, says):
    vit = tiny_vit()
    with pytest.raises(ValueError, match=says):
        LowRankSwitch(model or vit, optimizer(vit.parameters()))


@pytest.mark.parametrize("loss", [torch.ones(3), "low", None, [1.0, 2.0], torch.ones(0)])
def test_a_loss_that_is_not_one_number_is_refused_at_once(loss):
    monitor = WeightUpdateMonitor(tiny_vit())
    with pytest.raises(ValueError, match="give a number|give the mean"):
        monitor.step(loss)
    assert monitor.step(torch.ones(1, 1)) == {}


def test_a_loss_that_a_loop_overwrites_counts_with_its_value_at_the_step():
    monitor, buffer = WeightUpdateMonitor(tiny_vit(), window=2), torch.zeros(())
    for loss in (1.0, 3.0):
        numbers = monitor.step(buffer.fill_(loss))
    assert numbers["train/window_loss"] == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_switches_trains_and_resumes_in_it(dtype):
    def loop(updates, saved=None):
        torch.manual_seed(0)
        model = tiny_vit().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        switch = LowRankSwitch(model, optimizer, **SOON)
        if saved:
            for part, state in zip((switch, model, optimizer), saved, strict=True):
                part.load_state_dict(state)
        for number in range(switch.num_updates, updates):
            images, labels = batch(number)
            LOSS(model(images.to(dtype)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            switch.step(1.0)
        return model, copy.deepcopy(
            [switch.state_dict(), model.state_dict(), optimizer.state_dict()]
        )

    whole, _ = loop(6)
    assert {p.dtype for p in whole.parameters()} == {dtype} and adapted_modules(whole)
    resumed, _ = loop(6, loop(4)[1])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_all_linear_leaves_out_what_torchs_attention_reads_and_needs_a_second_linear():
    block = nn.TransformerEncoderLayer(16, 2, 32)
    model = nn.Sequential(block, nn.Linear(16, 5))
    names = list(WeightUpdateMonitor(model, "all-linear").monitor.targets)
    assert names == ["0.linear1", "0.linear2"]
    with pytest.raises(ValueError, match="has 1 nn.Linear in all: there is nothing to adapt"):
        WeightUpdateMonitor(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(16, 5)), "all-linear")


def test_what_is_saved_before_a_switch_holds_the_model_and_says_so(tmp_path):
    model = tiny_vit()
    switch = LowRankSwitch(model, torch.optim.AdamW(model.parameters()))
    with pytest.warns(
        UserWarning, match="has no adapter now, so .*residual.safetensors holds all"
    ):
        switch.save_pretrained(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "residual.safetensors"), model.state_dict())


def test_a_criterion_that_fires_at_its_first_measurement_and_ranks_that_need_one_go_together():
    def at_once(history):
        return Verdict(True, {}, "at once")

    model = tiny_vit()
    LowRankSwitch(model, torch.optim.AdamW(model.parameters()), criterion=at_once, rank=0.3)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"remove_weight_decay": True}, "remove_weight_decay"),
        ({"least_gain": 1.1, "adapter": factorized_linear}, "least_gain"),
        ({"restart": Refresh(), "adapter": core_linear, "train_factors": ["B"]}, "Refresh"),
        ({"joint_epochs": 1.0, "adapter": guided_linear}, "kind guided"),
        ({"adapter": cola_linear}, "kind cola"),
        ({"adapter": switched_linear}, "kind switchlora"),
    ],
)
def test_what_needs_a_run_or_begins_anew_is_refused_at_once(options, says):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"does not go with .*{says}"):
        LowRankSwitch(model, optimizer, target_modules="all-linear", rank=2, **options)


def test_merged_and_saved_it_computes_what_the_loop_trained(tmp_path):
    loop = Loop().run()
    images, _ = batch(99)
    with torch.no_grad():
        expected = loop.model.eval()(images)
        loop.switch.save_pretrained(tmp_path)
        merged = loop.switch.merge_and_unload()
        assert not adapted_modules(merged)
        torch.testing.assert_close(merged(images), expected, rtol=0, atol=1e-5)
    peft = pytest.importorskip("peft")
    base = tiny_vit()
    base.load_state_dict(load_file(tmp_path / "residual.safetensors"))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)


AGAIN = ("stages", "split_qkv", "restart", "joint_epochs")
TEN = ("data.train_size=320", "full.scheduler.warmup_t=5", "monitor.window=5")
"""10 updates an epoch"""
RESTART = ("switch/restart=relora", "switch.restart.every_epochs=0.6")
STAGES = (
    *("switch/stages=by_margin", "switch.stages.interval=5", "switch/criterion=update_norm"),
    *("switch.criterion.patience=1", "switch.criterion.fraction=0.6"),
)


OF_EACH = ("checksum", "seconds", "drift", "reason")
"""what differs between two runs that do the same, by a bit or by the time"""


def assert_alike(one, other):
    """That two nested values are the same, numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - OF_EACH:
            assert_alike(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right)
    else:
        is_float = isinstance(one, float)
        assert one == (
            pytest.approx(other, rel=1e-2, abs=1e-3, nan_ok=True) if is_float else other
        )


def plain_loop(config, folder, **others):
    """The run of a config in a loop of one's own: its switch, model and changes."""
    run = prepare(config, folder)
    model, optimizer, scheduler = run.model, run.learner.optimizer, run.learner.scheduler
    switch = LowRankSwitch(
        *(model, optimizer, scheduler),
        criterion=run.policy.criterion,
        rank=run.policy.rank,
        init=run.policy.init,
        window=run.window,
        updates_per_epoch=len(run.data.train),
        ramp_updates=5,
        **{name: getattr(run.policy, name) for name in AGAIN},
        **others,
    )
    changes = []
    for epoch in range(config.epochs):
        run.data.set_epoch(epoch)
        for images, labels in run.data.train:
            scheduler.step_update(switch.num_updates)
            optimizer.zero_grad()
            with autocast("cpu", run.learner.precision):
                loss = run.data.loss(model(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if switch.step(loss):
                changes.append(switch.num_updates)
    return switch, model, changes


@pytest.mark.parametrize(
    "words, times",
    [
        ((*TEN, "switch.criterion.patience=1", "switch.criterion.fraction=0.99"), 1),
        ((*TEN, "switch/init=update_svd", *BY_DATE, "full.precision=bf16"), 1),
        ((*TEN, *STAGES), 2),
        ((*TEN, *STAGES, "switch.split_qkv=true"), 2),
        ((*TEN, *BY_DATE, *RESTART, "switch/init=balanced"), 3),
        ((*TEN, *BY_DATE, "switch.joint_epochs=0.5"), 2),
        ((*TEN, *BY_DATE, *RESTART, "switch.joint_epochs=0.4"), 3),
    ],
    ids=["criterion", "date", "stages", "slices", "restart", "joint", "joint and restart"],
)
def test_a_plain_loop_makes_the_run_of_our_trainer(words, times, tmp_path):
    config = composed(*SHORT, "adapter.rewarmup_updates=5", *words)
    run = prepare(config, tmp_path / "ours")
    ours = train_and_finish(run)
    switch, model, changes = plain_loop(config, tmp_path / "theirs")
    assert changes == [change["num_updates"] for change in ours["transitions"]]
    assert len(changes) == times
    assert switch.switched_at == ours["switch"]["num_updates"]
    assert switch.ranks == ours["switch"]["ranks"]
    expected = load_file(tmp_path / "ours" / "model.safetensors")
    torch.testing.assert_close(merged_state_dict(model), expected, rtol=1e-3, atol=2e-5)
    theirs = switch._state.state_dict()
    assert theirs.pop("losses") == [], "they are a guard's"
    left = run.state.state_dict()
    assert_alike({name: left[name] for name in theirs}, theirs)


ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def test_the_blocks_of_the_page_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    here = {}
    for block in blocks("docs/your_loop.md"):
        exec(block, here)  # noqa: S102
    assert here["switch"].switched and capsys.readouterr().out.count("trainable params") == 1


def test_each_test_that_the_table_of_the_page_names_exists():
    page = (ROOT / "docs/your_loop.md").read_text()
    named = re.findall(r"^\d+\. `(test_\w+)`$", page, re.M)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) == 16 and all(f"def {name}(" in tests for name in named)


def test_the_example_of_the_readme_switches_and_has_twelve_lines_at_most(capsys):
    (block,) = blocks("README.md")
    assert len(block.splitlines()) <= 12
    torch.manual_seed(0)
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, 420)
    loader = (batch(number % 20) for number in range(420))
    names = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    exec(block, {**names, "loss_fn": LOSS})  # noqa: S102
    assert capsys.readouterr().out.count("trainable params") == 1
