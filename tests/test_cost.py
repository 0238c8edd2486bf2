"""The cost model: traced operations and bytes, the machine's rates, the predictions from both."""

import copy
from collections import Counter
from functools import partial
from math import prod

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn

from conftest import tiny_vit
from switchlora.adapters import Factors, find_targets, inject, operands_kept
from switchlora.cost import (
    ADAMW_BYTES,
    Machine,
    break_even_rank,
    measure_machine,
    predict,
    speedup_parts,
    trace_update,
    warning,
)
from switchlora.learner import Recipe, SavedTensors, autocast

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
IMAGES = (8, 1, 8, 8)
MACHINE = Machine(product_rate=1e11, attention_rate=5e10, bandwidth=5e9, update_bandwidth=2e10)
TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def recipe(optimizer=ADAMW, **options):
    return Recipe(optimizer, lambda *_, **__: None, **options)


class Pixels(nn.Module):
    """Linears on the flattened images, with something between two of them."""

    def __init__(self, *widths, between=nn.Identity, bias=False):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        linears = [nn.Linear(i, o, bias=bias) for i, o in pairs]
        self.layers = nn.Sequential(*(m for linear in linears for m in (linear, between())))
        self.layers.pop(len(self.layers) - 1)

    def forward(self, images):
        return self.layers(images.flatten(1))


def adapted(model, rank, patterns=TARGETS):
    """``model`` with adapters of random factors; weights under them are frozen."""
    targets = find_targets(model, patterns)
    shapes = {name: target.weight(model).shape for name, target in targets.items()}
    factors = {
        n: Factors(torch.randn(rank, i), torch.randn(o, rank)) for n, (o, i) in shapes.items()
    }
    inject(model, targets, factors, lambda rank: 1.0)
    return model


def flops(trace, part=None, module=None):
    return sum(
        operation.flops
        for operation in trace.operations
        if part in (None, operation.part) and module in (None, operation.module)
    )


def test_flops_of_linears_are_those_of_their_products():
    trace = trace_update(Pixels(64, 32, 16), recipe(), IMAGES, 16)
    first, second = 2 * 8 * 64 * 32, 2 * 8 * 32 * 16
    assert flops(trace, "forward") == first + second
    assert flops(trace, "backward") == first + 2 * second  # the images need no gradient
    assert flops(trace, "optimizer") == 0


def test_freezing_a_weight_saves_exactly_its_weight_gradient():
    model = Pixels(64, 32, 24, 16)
    full = trace_update(model, recipe(), IMAGES, 16)
    model.layers[2].weight.requires_grad_(False)
    frozen = trace_update(model, recipe(), IMAGES, 16)
    passes = [
        Counter(op for op in trace.operations if op.part != "optimizer" and op.bytes)
        for trace in (full, frozen)
    ]
    (saved,) = (passes[0] - passes[1]).elements()
    assert saved.flops == 2 * 8 * 32 * 24 and saved.module == "layers.2"
    assert not passes[1] - passes[0]


def test_flops_of_an_adapter_count_its_products_in_place():
    model = adapted(Pixels(64, 64, 64), 4, [r"layers\.2"])
    model.layers[2].form = "split"
    trace = trace_update(model, recipe(), IMAGES, 64)
    assert flops(trace, "forward", "layers.2") == 2 * 8 * 64 * 64 + 2 * 8 * 4 * (64 + 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_small_model_are_those_counted_by_hand(precision):
    trace = trace_update(
        Pixels(64, 32, 5, between=nn.GELU), recipe(precision=precision), IMAGES, 5
    )
    size = 4 if precision == "fp32" else 2
    images, hidden, logits = 8 * 64, 8 * 32, 8 * 5
    weight = 0 if precision == "fp32" else 32 * 5  # autocast's copy; the first one's is not needed
    assert trace.memory["activations"] == sum(
        [
            size * (images + 2 * hidden + weight),  # what the products and the GELU read
            4 * 2 * logits,  # of the loss, in full precision: log-probabilities and labels
        ]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 3])
def test_activations_are_those_of_the_real_forward_pass(precision, rank, vit, images):
    model = adapted(vit, rank) if rank else vit
    labels = torch.zeros(8, 5)
    saved = SavedTensors()
    with saved, autocast("cpu", precision), operands_kept(model):
        loss = F.cross_entropy(model(images), labels)
    expected = saved.bytes_beside(model)
    trace = trace_update(model, recipe(precision=precision), IMAGES, 5)
    assert loss.requires_grad and trace.memory["activations"] == expected


def test_accumulation_holds_the_activations_of_one_micro_batch():
    whole, halves = (
        trace_update(Pixels(64, 32, 5), recipe(accumulation=n), IMAGES, 5) for n in (1, 2)
    )
    inputs = 8 * 64 * 4 + 8 * 5 * 4  # halves of the images and labels are views of all of them
    assert halves.memory["activations"] - inputs == (whole.memory["activations"] - inputs) / 2
    assert flops(halves) == flops(whole)


@pytest.mark.parametrize(
    "optimizer,moments,counters",
    [
        (ADAMW, 2, 4),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1, 0),
        (partial(torch.optim.SGD, lr=0.1), 0, 0),
        (partial(timm.optim.Lion, lr=1e-4), 1, 0),
    ],
)
def test_optimizer_state_is_the_moments_of_what_trains(optimizer, moments, counters, vit):
    vit.patch_embed.requires_grad_(False)
    trained = [p for p in vit.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    trace = trace_update(vit, recipe(optimizer), IMAGES, 5)
    assert trace.memory["optimizer_state"] == moments * size + counters * len(trained)
    assert trace.memory["gradients"] == trace.trainable_bytes == size
    assert trace.memory["parameters"] == sum(p.nbytes for p in vit.parameters())


def test_adamw_moves_the_bytes_that_the_closed_form_assumes():
    trace = trace_update(Pixels(64, 512, 512), recipe(), IMAGES, 512)
    moved = sum(op.bytes for op in trace.operations if op.part == "optimizer")
    assert moved == pytest.approx(ADAMW_BYTES * (64 * 512 + 512 * 512), rel=0.2)


def test_peak_is_what_stays_and_the_activations_with_little_beside():
    trace = trace_update(tiny_vit(embed_dim=64), recipe(), (64, 1, 8, 8), 5)
    memory = trace.memory
    stays = memory["parameters"] + memory["optimizer_state"]
    assert stays + memory["activations"] < trace.peak_bytes < 1.2 * sum(memory.values())
    step = trace_update(tiny_vit(embed_dim=64), recipe(), (1, 1, 8, 8), 5)
    assert step.peak_bytes >= stays + memory["gradients"]


def test_tracing_touches_neither_the_model_nor_random_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 5))
    model.train()
    model(torch.randn(IMAGES)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    generator = torch.get_rng_state()
    trace_update(model, recipe(), IMAGES, 5)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert type(model[3].weight) is nn.Parameter


def test_a_model_in_training_drops_what_one_in_evaluation_does_not():
    model = tiny_vit(proj_drop_rate=0.5)
    training, evaluating = (
        trace_update(model.train(mode), recipe(), IMAGES, 5).memory["activations"]
        for mode in (True, False)
    )
    assert training > evaluating


def test_each_operation_belongs_to_its_innermost_module(vit):
    trace = trace_update(vit, recipe(), IMAGES, 5)
    assert {op.module for op in trace.operations} <= {name for name, _ in vit.named_modules()}
    fc1 = 2 * 8 * 5 * 32 * 128  # four patches and the class token
    assert flops(trace, "forward", "blocks.1.mlp.fc1") == fc1
    assert flops(trace, "backward", "blocks.1.mlp.fc1") == 2 * fc1
    by_name = {(op.name, op.part): op.module for op in trace.operations}
    assert by_name["aten.gelu_backward", "backward"] == "blocks.0.mlp.act"
    assert {op.module for op in trace.operations if op.part == "optimizer"} == {""}


def test_checkpointing_trades_activations_for_a_second_forward_pass(vit):
    plain = trace_update(vit, recipe(), IMAGES, 5)
    vit.set_grad_checkpointing(True)
    again = trace_update(vit, recipe(), IMAGES, 5)
    assert again.memory["activations"] < plain.memory["activations"] / 2
    assert again.peak_bytes < plain.peak_bytes
    fc1 = flops(plain, "forward", "blocks.1.mlp.fc1")
    assert flops(again, "backward", "blocks.1.mlp.fc1") == 3 * fc1


def test_a_prediction_is_the_sum_of_its_operations(vit):
    trace = trace_update(vit, recipe(), IMAGES, 5)
    machine = Machine(1.0, 1.0, 1.0)
    found = predict(trace, machine)
    assert found.optimizer == sum(op.bytes for op in trace.operations if op.part == "optimizer")
    assert found.forward == sum(
        max(op.flops, op.bytes) for op in trace.operations if op.part == "forward"
    )
    assert sum(found.modules.values()) == pytest.approx(found.forward + found.backward)
    assert found.communication == 0


def test_several_ranks_also_exchange_what_trains(vit):
    trace = trace_update(vit, recipe(), IMAGES, 5)
    with pytest.raises(ValueError, match="measured in one process, not in 2"):
        predict(trace, MACHINE, world_size=2)
    machine = Machine(1e11, 5e10, 5e9, all_reduce=1e6)
    alone, two = (predict(trace, machine, world_size=n) for n in (1, 2))
    assert two.total - alone.total == pytest.approx(trace.trainable_bytes / 1e6)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("factors", [("A", "B"), ("B",)])
def test_the_break_even_rank_falls_with_fewer_tokens_where_the_optimizer_is_free(
    itemsize, factors
):
    machine = Machine(1e11, 5e10, 5e9, update_bandwidth=1e15)
    ranks = [
        break_even_rank(tokens, 384, 1536, itemsize, machine, factors)
        for tokens in (16384, 1024, 64)
    ]
    assert 384 > ranks[0] > ranks[1] > ranks[2] > 0


def test_what_the_optimizer_saves_lets_larger_ranks_pay():
    fast, slow = (
        break_even_rank(64, 384, 1536, 4, Machine(1e11, 5e10, 5e9, update_bandwidth=bandwidth))
        for bandwidth in (1e15, 1e10)
    )
    assert slow > fast


def test_the_break_even_rank_falls_with_slower_narrow_products():
    fast, slow = (
        break_even_rank(3152, 384, 1536, 4, Machine(1e11, 1e11, rate, update_bandwidth=2e10))
        for rate in (1e10, 1e9)
    )
    assert fast > slow
    assert break_even_rank(64, 16, 16, 4, Machine(1e15, 1e15, 1e9, latency=1e-3)) == 0


def test_a_slow_exchange_lets_larger_ranks_pay():
    machine = Machine(1e11, 1e11, 1e10, all_reduce=1e8)
    one, two = (break_even_rank(3152, 384, 384, 4, machine, world_size=n) for n in (1, 2))
    assert two > one


@pytest.mark.parametrize("batch", [32, 2048])
def test_the_break_even_rank_is_where_traced_updates_take_equally_long(batch):
    images, width = (batch, 1, 16, 16), 256
    found = break_even_rank(batch, width, width, 4, MACHINE)
    full = predict(trace_update(Pixels(width, width, width), recipe(), images, width), MACHINE)
    below, above = (
        predict(trace_update(model, recipe(), images, width), MACHINE).total
        for model in (
            adapted(Pixels(width, width, width), int(share * found), [r"layers\.2"])
            for share in (0.8, 1.25)
        )
    )
    assert below < full.total < above


def phases(width, rank, world_size=1):
    images, model = (32, 1, 32, 32), tiny_vit(img_size=32, embed_dim=width, depth=1)
    machine = Machine(1e11, 5e10, 5e9, all_reduce=1e9, latency=5e-5)
    return [
        predict(trace_update(m, recipe(), images, 5), machine, world_size)
        for m in (model, adapted(copy.deepcopy(model), rank))
    ]


def test_the_parts_of_a_speed_up_multiply_to_the_whole():
    full, adapter = phases(256, 4, world_size=2)
    parts = speedup_parts(full, adapter)
    assert list(parts) == ["arithmetic", "optimizer", "communication"]
    assert prod(parts.values()) == pytest.approx(full.total / adapter.total)
    assert parts["communication"] > 1
    assert speedup_parts(*phases(256, 4))["communication"] == pytest.approx(1)


def test_a_warning_says_when_the_adapter_phase_will_not_be_faster():
    assert "will not be faster" in warning(*phases(32, 8))
    assert warning(*phases(512, 8)) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_this_machine_is_measured_in_plausible_figures(precision):
    machine = measure_machine(torch.device("cpu"), precision)
    assert 1e8 < machine.attention_rate < 1e15 and 1e8 < machine.product_rate < 1e15
    assert 1e7 < machine.bandwidth < 1e13 and 1e7 < machine.update_bandwidth < 1e13
    assert 0 < machine.latency < 0.1 and machine.all_reduce is None
