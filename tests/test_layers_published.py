"""Layers and schedules of published methods against their papers' equations."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretended import DEVICE, on_pretended
from runs import assert_same_but_for_memory, make_run, make_run_in_parts
from switchlora.adapters import (
    Adapter,
    cola_linear,
    count_parameters,
    merged_state_dict,
    plain_parameters,
    sltrain_linear,
    switched_linear,
)
from switchlora.cost import trace_batch
from switchlora.initializers import gaussian, switchlora
from switchlora.learner import FlopCounter, Recipe, SwitchLoRA, build_learner
from switchlora.learner.recipe import parameter_groups
from switchlora.policy import InRank
from switchlora.policy.growth import explained_variance, singular_values
from switchlora.storage import (
    BEFORE,
    find_all,
    load_model,
    load_saved,
    read_events,
    save_merged,
)
from switchlora.switching.changes import widened

TEN = (
    *("data.train_size=320", "full.scheduler.warmup_t=5", "monitor.window=5", "max_updates=14"),
    *("epochs=3", "adapter.rewarmup_updates=2", "data.eval_size=32"),
)
"""10 updates an epoch"""
FIVE = ("max_updates=5", "monitor.window=2", "adapter.precision=bf16")
INPUTS, OUTPUTS, RANK = 6, 12, 3
FACTORIES = {"cola": cola_linear, "sltrain": partial(sltrain_linear, share=0.2)}
LAYERS = {**FACTORIES, "switchlora": switched_linear}
EARLY = (
    *("switch.growth.every_updates=4", "switch.growth.earliest=0"),
    *("switch.growth.buffer=4", "switch.rank.rank=6"),
)
THERE = f"system.device={DEVICE}"
METHODS = {
    "cola": ("+method=cola",),
    "sltrain": ("+method=sltrain", "ema=0.9"),
    "switchlora": ("+method=switchlora", "adapter.refactoring.interval=10"),
    "inrank": ("+method=inrank", *EARLY),
}


def recipe(**options):
    return Recipe(partial(torch.optim.AdamW, lr=1e-3), lambda *_, **__: None, **options)


def layer(kind, dtype=torch.float32, scaling=2.0, **options):
    """A plain linear, and the layer of a kind in its place."""
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    A, B = torch.randn(RANK, INPUTS, dtype=dtype), torch.randn(OUTPUTS, RANK, dtype=dtype)
    adapter = Adapter(A, B, slice(0, OUTPUTS), scaling)
    return linear, LAYERS[kind](linear, {"": adapter}, **options)


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", FACTORIES)
def test_gradients_pass_gradcheck(kind):
    _, module = layer(kind, torch.float64)
    x = torch.randn(2, 4, INPUTS, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def outputs(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *values))


@pytest.mark.parametrize("kind", FACTORIES)
def test_under_autocast_products_are_narrow_and_gradients_are_not(kind):
    _, module = layer(kind)
    x = torch.randn(5, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(x)
    assert outputs.dtype == torch.bfloat16
    assert torch.allclose(outputs.float(), module(x), atol=0.3)
    outputs.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", FACTORIES)
def test_it_compiles_without_graph_breaks(kind):
    _, module = layer(kind)
    compiled, x = torch.compile(module, backend="eager", fullgraph=True), torch.randn(5, INPUTS)
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("kind", FACTORIES)
def test_the_cost_model_counts_what_a_pass_runs(kind, vit, images):
    model = vit
    for name in ("blocks.0.mlp.fc1", "blocks.1.attn.qkv"):
        linear = model.get_submodule(name)
        A, B = torch.randn(RANK, linear.in_features), torch.randn(linear.out_features, RANK)
        adapter = Adapter(A, B, slice(0, linear.out_features), 1.0)
        model.set_submodule(name, FACTORIES[kind](linear, {"": adapter}))
    labels = torch.zeros(len(images), dtype=torch.long)
    traced = trace_batch(model, recipe(), images, labels, F.cross_entropy)
    with FlopCounter() as counter:
        F.cross_entropy(model(images), labels).backward()
    passes = [each.flops for each in traced.operations if each.part != "optimizer"]
    assert sum(passes) == counter.total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("measured_together")
def test_a_run_stopped_on_another_device_goes_on_to_the_bits_of_a_whole_run(
    method, tmp_path, at_update
):
    words = (*TEN, *METHODS[method], "model.depth=1", "data.train_size=160", "max_updates=9")
    make_run(tmp_path / "whole", *words)
    with on_pretended():
        make_run_in_parts(tmp_path / "stopped", at_update, [6], THERE, *words)
    assert_same_but_for_memory(tmp_path / "whole", tmp_path / "stopped")


# CoLA


def test_cola_is_b_silu_a_x_and_keeps_no_weight():
    linear, module = layer("cola")
    x = torch.randn(5, 7, INPUTS)
    low = x @ module.lora_A.mT
    wanted = 2.0 * (low * torch.sigmoid(low)) @ module.lora_B.mT + linear.bias
    assert torch.allclose(module(x), wanted, atol=1e-5)
    assert set(module.state_dict()) == {"bias", "lora_A", "lora_B"} == trained(module)


def test_cola_has_r_in_plus_out_parameters_and_3_times_2_t_of_that_flops():
    _, module = layer("cola")
    model, x = nn.Sequential(nn.Linear(INPUTS, INPUTS), module), torch.randn(5, 7, INPUTS)
    size = RANK * (INPUTS + OUTPUTS)
    assert count_parameters(module) == size + OUTPUTS
    assert plain_parameters(module) == INPUTS * OUTPUTS + OUTPUTS
    with FlopCounter() as counter:
        model(x).sum().backward()
    assert counter.total == 6 * 35 * size + 4 * 35 * INPUTS**2


def test_colas_start_gives_b_a_entries_of_variance_1_by_in_plus_out():
    torch.manual_seed(0)
    A, B = gaussian(torch.empty(300, 200), torch.empty(300, 200), 50)
    assert A.std().item() == pytest.approx(B.std().item(), rel=0.05)
    assert (B @ A).std().item() == pytest.approx(500**-0.5, rel=0.05)


def test_no_weight_stands_for_cola():
    _, module = layer("cola")
    with pytest.raises(ValueError, match="no matrix to merge"):
        module.merged()


def test_a_run_of_cola_leaves_a_checkpoint_that_rebuilds_it_and_no_merged_model(tmp_path, capsys):
    summary = make_run(tmp_path, *TEN, "+method=cola", "model.depth=2", *FIVE)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == [BEFORE]
    assert "are no matrix that timm or PEFT could load" in capsys.readouterr().out
    model = load_model(find_all(tmp_path)[0])
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    phase = summary["phases"]["adapter"]
    assert factors == 2 * 8 * (32 + 96 + 2 * 32 + 32 + 2 * 128 + 32)
    assert count_parameters(model) == phase["trainable_parameters"]
    assert summary["cost"]["train_flops"] == 5 * phase["flops_per_update"]
    with pytest.raises(ValueError, match="no matrix to merge"):
        save_merged(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "words, says",
    [
        (("switch/criterion=at_epoch",), "use switch/criterion=at_start"),
        (("ema=0.9",), "ema works on weights"),
        (("adapter/refactoring=reflora",), "adapter.refactoring works on weights"),
        (("switch/restart=relora",), "does not go with switch.restart"),
    ],
)
def test_what_cola_cannot_do_is_refused_before_the_first_update(words, says, tmp_path):
    with pytest.raises(Exception, match=says):
        make_run(tmp_path, *TEN, "+method=cola", *words)


# SLTrain


def dense_weight(module):
    """s B A + S with the matrix S written out, entry by entry."""
    weight = module.scaling * module.lora_B @ module.lora_A
    for place, value in zip(module.lora_S_index.tolist(), module.lora_S, strict=True):
        row, column = divmod(place, INPUTS)
        one = torch.zeros(OUTPUTS, INPUTS)
        one[row, column] = 1.0
        weight = weight + value * one
    return weight


def test_sltrain_is_s_b_a_plus_s_in_values_gradients_and_merged():
    linear, module = layer("sltrain")
    x = torch.randn(5, 7, INPUTS)
    wanted = F.linear(x, dense_weight(module), linear.bias)
    assert torch.allclose(module(x), wanted, atol=1e-5)
    assert torch.allclose(module.merged(), dense_weight(module), atol=1e-6)
    names, values = zip(*module.named_parameters(), strict=True)
    assert set(names) == trained(module) == {"bias", "lora_A", "lora_B", "lora_S"}
    found = torch.autograd.grad(module(x).square().sum(), values)
    for mine, theirs in zip(
        found, torch.autograd.grad(wanted.square().sum(), values), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_sltrains_support_is_uniform_fixed_by_a_and_its_values_begin_as_a_linears():
    A, B = torch.randn(2, 100), torch.zeros(80, 2)
    made = []
    for start in (A, A.clone(), A + 1):
        adapter = Adapter(start, B.clone(), slice(0, 80), 1.0)
        made.append(sltrain_linear(nn.Linear(100, 80), {"": adapter}))
    one, same, other = (module.lora_S_index for module in made)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one.unique()) == int(0.03 * 8000) and one.max() < 8000
    assert one.double().mean().item() == pytest.approx(4000, rel=0.15)
    values = made[0].lora_S
    assert values.abs().max() <= 0.1 and values.std().item() == pytest.approx(
        0.1 / 3**0.5, rel=0.1
    )


def test_sltrain_has_the_papers_parameters_and_forms_the_weight_in_both_passes():
    _, module = layer("sltrain")
    entries = int(0.2 * INPUTS * OUTPUTS)
    assert count_parameters(module) == RANK * (INPUTS + OUTPUTS) + entries + OUTPUTS
    assert plain_parameters(module) == INPUTS * OUTPUTS + OUTPUTS
    model, x = nn.Sequential(nn.Linear(INPUTS, INPUTS), module), torch.randn(5, 7, INPUTS)
    with FlopCounter() as counter:
        model(x).sum().backward()
    weight = INPUTS * OUTPUTS
    assert counter.total == (6 * 35 + 8 * RANK) * weight + 4 * 35 * INPUTS**2


def test_sltrain_keeps_no_weight_from_the_forward_to_the_backward_pass():
    _, module = layer("sltrain")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.shape) or x, lambda x: x
    ):
        module(torch.randn(5, INPUTS))
    assert (OUTPUTS, INPUTS) not in map(tuple, kept)


def test_sltrains_entries_train_at_the_rate_of_weights_without_decay():
    _, module = layer("sltrain")
    groups = parameter_groups(nn.Sequential(module), recipe())
    (group,) = (g for g in groups if any(p is module.lora_S for p in g["params"]))
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 0.0)


def test_a_run_of_sltrain_rebuilds_merges_and_exports(tmp_path):
    summary = make_run(tmp_path, *TEN, "+method=sltrain", "model.depth=2", *FIVE)
    model = load_model(find_all(tmp_path)[0])
    names = [name for name, _ in model.named_parameters() if "lora_S" in name]
    phase = summary["phases"]["adapter"]
    assert len(names) == 8 and count_parameters(model) == phase["trainable_parameters"]
    assert summary["cost"]["train_flops"] == 5 * phase["flops_per_update"]
    x = torch.randn(4, 1, 8, 8)
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "adapter"):
        assert torch.allclose(load_saved(path).model.eval()(x), model(x), atol=1e-4), path
    assert not any("lora" in name for name in merged_state_dict(model))


# SwitchLoRA


def test_a_switch_trades_a_vector_for_a_waiting_one_and_keeps_the_function():
    _, module = layer("switchlora", torch.float64)
    weight, A, B = (x.detach().clone() for x in (module.merged(), module.lora_A, module.lora_B))
    pools = module.lora_pool_A.clone(), module.lora_pool_B.clone()
    assert (module.switch_A(4, num_updates=7), module.switch_B(4, num_updates=7)) == (1, 2)
    assert torch.allclose(module.merged(), weight, atol=1e-12)
    assert torch.equal(module.lora_A[1], pools[0][1]) and torch.equal(module.lora_pool_A[1], A[1])
    assert torch.equal(module.lora_B[:, 2], pools[1][1])
    assert torch.equal(module.lora_pool_B[1], B[:, 2])
    reset = module.lora_pool_resets == 7
    assert reset.tolist() == [[False, False, True], [False, True, False]]
    assert trained(module) == {"bias", "lora_A", "lora_B"}


class WrittenOut:
    """SwitchLoRA's algorithm for one layer as the paper has it, with a counter for each vector."""

    def __init__(self, module):
        self.W = module.weight.detach().clone()
        self.scaling = module.scaling
        vectors = module.lora_A.detach(), module.lora_B.detach().mT
        self.vectors = [rows.clone() for rows in vectors]
        self.pools = [module.lora_pool_A.clone(), module.lora_pool_B.clone()]
        self.m = [torch.zeros_like(rows) for rows in self.vectors]
        self.v = [torch.zeros_like(rows) for rows in self.vectors]
        self.k = [torch.zeros(len(rows), 1, dtype=rows.dtype) for rows in self.vectors]
        self.frozen = [torch.zeros(len(rows), 1, dtype=int) for rows in self.vectors]

    def product(self):
        A, B = self.vectors
        return self.scaling * B.mT @ A

    def switch(self, number):
        for side in (0, 1):
            rank, waiting = len(self.vectors[side]), len(self.pools[side])
            row, place = (number + side * (rank // 2)) % rank, number % waiting
            whole = self.W + self.product()
            old = self.vectors[side][row].clone()
            self.vectors[side][row] = self.pools[side][place]
            self.pools[side][place] = old
            self.W = whole - self.product()
            self.m[1 - side][row] = self.v[1 - side][row] = self.k[1 - side][row] = 0
            self.frozen[1 - side][row] = 5

    def step(self, gradients, lr):
        for side, gradient in enumerate(gradients):
            gradient = gradient * (self.frozen[side] == 0)
            self.frozen[side] = (self.frozen[side] - 1).clamp(min=0)
            self.k[side] += 1
            self.m[side] = 0.9 * self.m[side] + 0.1 * gradient
            self.v[side] = 0.999 * self.v[side] + 0.001 * gradient**2
            first = self.m[side] / (1 - 0.9 ** self.k[side])
            second = self.v[side] / (1 - 0.999 ** self.k[side])
            self.vectors[side] -= lr * first / (second.sqrt() + 1e-8)


def test_training_follows_the_algorithm_written_out_update_by_update():
    _, module = layer("switchlora", torch.float64)
    how = SwitchLoRA(interval=10)
    learner = build_learner(nn.Sequential(module), recipe(refactoring=how), total_updates=400)
    wanted, switches = WrittenOut(module), 0
    for learner.since in range(60):
        gradients = torch.randn(RANK, INPUTS).double(), torch.randn(RANK, OUTPUTS).double()
        module.lora_A.grad, module.lora_B.grad = gradients[0].clone(), gradients[1].mT.clone()
        while switches < how.switched(RANK, learner.since + 1, 400):
            wanted.switch(switches)
            switches += 1
        wanted.step(gradients, lr=1e-3)
        learner.optimizer.step()
        moved = torch.allclose(module.lora_A, wanted.vectors[0], rtol=0, atol=1e-7)
        assert moved and torch.allclose(module.lora_B.mT, wanted.vectors[1], rtol=0, atol=1e-7)
        assert torch.allclose(module.weight, wanted.W, rtol=0, atol=1e-6)
    assert switches > 2 * RANK


def test_switches_become_rarer_as_an_exponential_that_is_0_3_after_a_tenth_of_the_run():
    how = SwitchLoRA(interval=40, ratio=0.1)
    rank, total = 4000, 10_000
    rates = [how.switched(rank, t + 10, total) - how.switched(rank, t, total) for t in (0, 1000)]
    assert rates[0] == pytest.approx(10 * rank / 40, rel=0.01)
    assert rates[1] == pytest.approx(0.3 * rates[0], rel=0.01)


def test_switchloras_start_is_as_large_as_a_linears_own():
    torch.manual_seed(0)
    A, B = switchlora(torch.empty(400, 300), torch.empty(400, 300), 64)
    assert ((B @ A) / 64).std().item() == pytest.approx((3 * 300) ** -0.5, rel=0.05)


def test_a_run_of_switchlora_switches_and_leaves_a_merged_model(tmp_path):
    make_run(tmp_path, *TEN, "+method=switchlora", *FIVE, "adapter.refactoring.interval=10")
    model = load_model(find_all(tmp_path)[0])
    resets = model.get_parameter("blocks.0.mlp.fc1.lora_pool_resets")
    assert (resets >= 0).any()
    x = torch.randn(4, 1, 8, 8)
    for path in (tmp_path / "model.safetensors", tmp_path / "adapter"):
        assert torch.allclose(load_saved(path).model.eval()(x), model(x), atol=1e-4), path


# InRank


def diagonal(values, size=20):
    """An adapter of which the product has these singular values."""
    A = torch.linalg.qr(torch.randn(size, len(values))).Q.mT
    B = torch.linalg.qr(torch.randn(2 * size, len(values))).Q * torch.tensor(values)
    return Adapter(A, B, slice(0, 2 * size), 1.0)


def test_the_explained_variance_is_that_of_all_singular_values_of_b_a():
    adapter = diagonal([5.0, 3.0, 2.0, 0.5])
    s = np.linalg.svd((adapter.B @ adapter.A).numpy(), compute_uv=False)
    assert np.allclose(singular_values(adapter).numpy(), s, atol=1e-5) and len(s) == 20
    for modes in range(5):
        rest = np.where(np.arange(20) < modes, 0, s)
        wanted = 1 - rest.var(ddof=1) / s.var(ddof=1)
        assert explained_variance(singular_values(adapter), modes) == pytest.approx(
            wanted, abs=1e-5
        )


@pytest.mark.parametrize(
    "values, rank",
    [
        ([9.0, 8.0, 0.1, 0.1], 4),  # two modes explain it
        ([9.0, 8.0, 7.0, 0.1], 5),  # a third one is needed
        ([9.0, 8.9, 8.8, 8.7], 5),  # the last that a look may ask for
        ([0.0, 0.0, 0.0, 0.0], 4),  # nothing has moved
        ([9.0, 8.9, 8.8, 8.7, 8.6, 8.5, 8.4, 8.3, 8.2, 8.1], 10),  # half of the full rank
    ],
)
def test_a_rank_grows_to_the_modes_that_explain_the_product_and_the_buffer(values, rank):
    assert InRank(buffer=2, threshold=0.9).rank(diagonal(values)) == rank


def test_a_run_of_inrank_grows_keeps_its_function_and_counts_every_segment(tmp_path):
    words = (*TEN, "+method=inrank", *EARLY, "max_updates=10", "adapter.precision=bf16")
    summary = make_run(tmp_path, *words)
    first, *grown = summary["transitions"]
    assert first["kind"] == "switch" and {each["kind"] for each in grown} == {"grow"}
    for each in grown:
        assert each["drift"] < 1e-5 and each["trainable_after"] > each["trainable_before"]
        assert each["moments_carried"] > 0 and max(each["ranks"].values()) <= 32
    flops = [segment["flops_per_update"] for segment in summary["segments"]]
    ends = [segment["until"] for segment in summary["segments"]]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    made = [(n, f) for n, f in zip(lengths, flops, strict=True) if n]
    assert summary["cost"]["train_flops"] == sum(n * f for n, f in made) and len(made) > 1
    assert sum(each["num_updates"] for each in summary["phases"].values()) == 10


def test_ranks_grow_within_an_epoch_and_no_batch_comes_twice_or_is_mixed_otherwise(tmp_path):
    words = (*TEN, "+method=inrank", *EARLY, "max_updates=12", "data.mixup_alpha=0.8")
    often = ("checkpoint.every_updates=1", "checkpoint.keep=99")
    make_run(tmp_path / "whole", *words, *often)
    make_run(tmp_path / "workers", *words, *often, "system.workers=1")
    (path,) = [p for p in find_all(tmp_path / "whole") if p.name == "update-00000009"]
    make_run(tmp_path / "resumed", *words, f"resume={path}")
    whole, *others = (
        [event["train/loss"] for event in read_events(tmp_path / name, "train")]
        for name in ("whole", "workers", "resumed")
    )
    assert len(whole) == 12 and all(losses == whole for losses in others)


def test_moments_of_single_entries_grow_with_their_factors_and_those_in_a_basis_are_left():
    A, B = torch.randn(4, INPUTS), torch.randn(OUTPUTS, 4)
    adapters = {"fc": {"": Adapter(A, B, slice(0, OUTPUTS), 1.0)}}
    of_A = {"step": torch.tensor(3.0), "exp_avg": torch.randn(RANK, INPUTS)}
    of_B = {"step": 3, "rotated_exp_avg": torch.randn(OUTPUTS, RANK)}
    head = {"step": 3, "exp_avg": torch.randn(2, 2)}
    moments = {"fc.lora_A": of_A, "fc.lora_B": of_B, "head.weight": head}
    found = widened(moments, adapters)
    assert found["head.weight"] is head and set(found) == {"head.weight", "fc.lora_A"}
    grown = found["fc.lora_A"]["exp_avg"]
    assert torch.equal(grown[:RANK], of_A["exp_avg"]) and not grown[RANK:].any()
    assert found["fc.lora_A"]["step"] == 3 and grown.shape == A.shape


@pytest.mark.parametrize(
    "words, says",
    [
        (("+method=switchlora", "switch.split_qkv=true"), "does not go with switch.split_qkv"),
        (("+method=switchlora", "switch.joint_epochs=1"), "does not go with switch.joint_epochs"),
        (("+method=switchlora", "adapter.refactoring=null"), "give both or neither"),
        (("+method=switchlora", "switch/growth=inrank"), "does not go with switch.growth"),
        (("+method=lora", "adapter/refactoring=switchlora"), "give both or neither"),
        (("+method=switchlora", "recipe@adapter=lora_rite"), "LoRA-RITE does not"),
        (("+method=cola", "recipe@adapter=lora_rite"), "lora_rite works on weights"),
        (("+method=inrank", "switch/restart=relora"), "does not go with switch.restart"),
        (("+method=sltrain", "switch/criterion=at_epoch"), "use switch/criterion=at_start"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_update(words, says, tmp_path):
    with pytest.raises(Exception, match=says):
        make_run(tmp_path, *TEN, *words)
