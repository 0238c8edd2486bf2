"""Factorised and self-guided linears against the dense functions that they stand for."""

import io
import math
import time
from dataclasses import replace
from functools import partial
from statistics import median

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conf_yamls import build, composed
from switchlora.adapters import (
    KINDS,
    Adapter,
    LowRankLinear,
    cosine_mix,
    draw_dense,
    factorized_linear,
    guided_layers,
    guided_linear,
    made_class,
    rebuilt,
    set_mix,
    settled,
    skipped_flops,
)
from switchlora.cost import interleaved_seconds, linear_and_factors
from switchlora.learner import FlopCounter, build_learner


def make(factory, scaling=2.0, dtype=torch.float32, **options):
    torch.manual_seed(0)
    linear = nn.Linear(6, 12, dtype=dtype)
    A, B = torch.randn(3, 6, dtype=dtype), torch.randn(12, 3, dtype=dtype)
    return linear, factory(linear, {"": Adapter(A, B, slice(0, 12), scaling)}, **options)


def low_rank(module, x):
    """s B A x + b with the product formed."""
    product = module.scaling * module.lora_B @ module.lora_A
    return F.linear(x, product, module.bias)


def moved(module):
    """A guided linear whose W has left its start."""
    with torch.no_grad():
        module.weight.add_(torch.randn_like(module.weight))
    return module


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_a_factorised_linear_is_the_product_of_its_factors_and_keeps_no_weight():
    linear, module = make(factorized_linear)
    x = torch.randn(5, 7, 6)
    assert torch.allclose(module(x), low_rank(module, x), atol=1e-5)
    assert set(module.state_dict()) == {"bias", "lora_A", "lora_B"} == trained(module)
    assert module.bias is linear.bias and module.weight is None


@pytest.mark.parametrize("factory", [factorized_linear, guided_linear])
def test_gradients_of_all_that_trains_pass_gradcheck(factory):
    _, module = make(factory, dtype=torch.float64)
    module.mix = 0.3
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def outputs(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *values))


def test_guided_is_the_dense_function_at_a_1_and_the_low_rank_one_at_a_0():
    module, x = moved(make(guided_linear)[1]), torch.randn(5, 6)
    module.mix = 1.0
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    module.mix = 0.0
    assert torch.allclose(module(x), low_rank(module, x), atol=1e-5)
    assert torch.equal(module(x), settled(module)(x))


def test_guided_in_between_is_a_w_x_plus_1_minus_a_s_b_a_x_plus_b():
    module, x = moved(make(guided_linear)[1]), torch.randn(5, 6)
    module.mix = 0.3
    dense = F.linear(x, module.weight, module.bias)
    assert torch.allclose(module(x), 0.3 * dense + 0.7 * low_rank(module, x), atol=1e-5)


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_guided_starts_with_the_same_function_at_every_a(mix):
    _, module = make(guided_linear)
    module.mix, x = mix, torch.randn(5, 6)
    assert torch.allclose(module(x), low_rank(module, x), atol=1e-5)
    assert trained(module) == {"weight", "bias", "lora_A", "lora_B"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if made_class(KINDS[kind]).has_weight])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_merged_weight_gives_the_same_function(kind, mix):
    _, module = make(KINDS[kind])
    if kind == "guided":
        moved(module).mix = mix
    x = torch.randn(5, 6)
    assert torch.allclose(module(x), F.linear(x, module.merged(), module.bias), atol=1e-5)
    assert module.merged().dtype == torch.float32 and not module.merged().requires_grad


def test_cosine_mix_falls_from_one_over_a_half_to_zero():
    assert [cosine_mix(t) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert cosine_mix(1 / 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert cosine_mix(2) == 0 and cosine_mix(-1) == 1


def test_a_stochastic_layer_evaluates_w_x_in_a_share_a_of_the_micro_batches():
    _, module = make(guided_linear, stochastic=True)
    set_mix(module, 0.3)
    done = 0
    for num_updates in range(1000):
        for micro_batch in range(2):
            draw_dense([module], num_updates, micro_batch)
            done += not module.skips_dense()
    assert done / 2000 == pytest.approx(0.3, abs=0.03)


def test_draws_differ_between_layers_and_micro_batches_and_repeat_for_an_update():
    model = nn.Sequential(*(make(guided_linear, stochastic=True)[1] for _ in range(24)))
    set_mix(model, 0.5)
    draws = []
    for place in ((7, 0), (7, 1), (8, 0), (7, 0)):
        draw_dense(guided_layers(model), *place)
        draws.append([layer.drawn_dense for layer in model])
    assert draws[0] == draws[3] != draws[1] != draws[2] != draws[0]
    assert all(0 < sum(each) < 24 for each in draws)


def skips(module, micro_batches, *wanted):
    """The first update that leaves W x out in as many of its micro-batches as ``wanted`` has."""
    for num_updates in range(1000):
        for number in range(micro_batches):
            draw_dense([module], num_updates, number)
        if module.skipped in wanted:
            return num_updates
    raise AssertionError(f"no update skips {wanted} of {micro_batches}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_weight_that_every_micro_batch_skipped_is_left_alone_by_adamw(precision):
    """A zero gradient would decay it, and its momentum would move it on."""
    module = moved(make(guided_linear, stochastic=True)[1])
    options = {"accumulation": 3, "precision": precision}
    recipe = replace(build(composed().full), **options)
    learner = build_learner(nn.Sequential(module), recipe, 2000)
    set_mix(module, 0.5)
    batch = (torch.randn(6, 6), torch.randint(12, (6,)), nn.CrossEntropyLoss())
    for skipped, moves in ((0, True), (2, True), (3, False)):
        before = module.weight.detach().clone()
        learner.update(*batch, num_updates=skips(module, 3, skipped))
        assert (module.weight.grad is not None) == moves
        assert torch.equal(module.weight, before) != moves
        assert module.lora_A.grad.any()


def skipping(module):
    """A stochastic layer in an update in which it leaves W x out."""
    module.mix, module.drawn_dense = 0.4, False
    return module


def test_where_w_x_is_left_out_the_factors_compute_alone_and_w_gets_a_zero_gradient():
    module, x = skipping(moved(make(guided_linear, stochastic=True)[1])), torch.randn(5, 6)
    assert torch.equal(module(x), settled(module)(x))
    module(x).square().sum().backward()
    assert not module.weight.grad.any() and module.lora_A.grad.any()


def test_evaluation_never_leaves_w_x_out():
    module, x = skipping(moved(make(guided_linear, stochastic=True)[1])).eval(), torch.randn(5, 6)
    dense = F.linear(x, module.weight, module.bias)
    assert torch.allclose(module(x), 0.4 * dense + 0.6 * low_rank(module, x), atol=1e-5)


def test_skipped_flops_are_what_a_pass_without_w_x_runs_less():
    _, module = make(guided_linear, stochastic=True)
    model, x = nn.Sequential(nn.Linear(6, 6), module), torch.randn(5, 7, 6)
    counts = []
    for module.drawn_dense in (True, False):
        module.skipped = int(module.skips_dense())
        with FlopCounter() as counter:
            model(x).sum().backward()
        counts.append((counter.total, skipped_flops(model)))
    (whole, none), (less, skipped) = counts
    assert none == 0 and whole - less == skipped == 6 * 35 * 6 * 12


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_goes_on_through_updates_that_leave_w_x_out(process_group):
    _, module = make(guided_linear, stochastic=True)
    wrapped, x = DistributedDataParallel(nn.Sequential(module)), torch.randn(5, 6)
    for module.drawn_dense in (False, True, False):
        wrapped.zero_grad()
        wrapped(x).sum().backward()
        assert module.weight.grad is not None


def test_a_settled_layer_has_the_same_parameters_without_w():
    _, module = make(guided_linear)
    module.eval().dropout = 0.1
    alone = settled(module)
    assert isinstance(alone, LowRankLinear) and alone.dropout == 0.1 and not alone.training
    kept = {n: p for n, p in module.named_parameters() if n != "weight"}
    assert all(p is kept.pop(n) for n, p in alone.named_parameters()) and not kept


@pytest.mark.parametrize("factory, rank", [(factorized_linear, 0), (guided_linear, 2)])
def test_row_slices_that_it_cannot_hold_are_refused_with_the_key_to_change(factory, rank):
    q = Adapter(torch.zeros(rank, 6), torch.zeros(4, rank), slice(0, 4), 1.0)
    with pytest.raises(ValueError, match=r"switch\.split_qkv"):
        factory(nn.Linear(6, 12), {"q": q})


def make_sliced(bias=True):
    """A factorised qkv: a product for each of q, k and v, of ranks 1, 2 and 3."""
    torch.manual_seed(0)
    linear, adapters = nn.Linear(6, 12, bias=bias), {}
    for number, part in enumerate("qkv"):
        A, B = torch.randn(number + 1, 6), torch.randn(4, number + 1)
        adapters[part] = Adapter(A, B, slice(4 * number, 4 * number + 4), 2.0 + number)
    return linear, adapters, factorized_linear(linear, adapters)


@pytest.mark.parametrize("bias", [True, False])
def test_a_factorised_qkv_is_the_products_of_its_slices_and_keeps_no_weight(bias):
    linear, adapters, module = make_sliced(bias)
    products = [a.scaling * a.B @ a.A for a in adapters.values()]
    x = torch.randn(5, 7, 6, requires_grad=True)
    expected = F.linear(x, torch.cat(products), linear.bias)
    assert torch.allclose(module(x), expected, atol=1e-5)
    assert torch.allclose(module.merged(), torch.cat(products), atol=1e-6)
    (mine,) = torch.autograd.grad(module(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(mine, theirs, atol=1e-3)
    factors = {f"lora_{f}.{part}" for f in "AB" for part in "qkv"}
    assert set(module.state_dict()) == trained(module) == factors | ({"bias"} if bias else set())


def test_a_factorised_qkv_is_rebuilt_from_its_settings_compiles_and_rounds_as_a_linear():
    linear, adapters, module = make_sliced()
    empty = {n: a._replace(A=a.A * 0, B=a.B * 0) for n, a in adapters.items()}
    again, x = rebuilt(nn.Linear(6, 12), empty, **module.settings()), torch.randn(5, 6)
    again.load_state_dict(module.state_dict())
    compiled = torch.compile(again, backend="eager", fullgraph=True)
    assert torch.equal(again(x), module(x)) and torch.allclose(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(x)
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_factory_says_what_it_makes_before_it_makes_any(kind):
    factory = KINDS[kind]
    _, module = make(factory)
    for asked in (factory, partial(factory)):
        assert made_class(asked).kind == module.kind == kind
        assert (
            made_class(asked).keeps_residual
            == module.keeps_residual
            == (kind in ("lora", "switchlora"))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_settings_and_a_state_dict_rebuild_every_kind(kind):
    options = {"stochastic": True} if kind == "guided" else {}
    _, module = make(KINDS[kind], **options)
    module.dropout = 0.2
    if kind == "guided":
        moved(module).mix = 0.3
    saved = io.BytesIO()
    torch.save((module.settings(), module.state_dict()), saved)
    saved.seek(0)
    settings, state = torch.load(saved)
    empty = {"": Adapter(torch.zeros(3, 6), torch.zeros(12, 3), slice(0, 12), module.scaling)}
    again, x = rebuilt(nn.Linear(6, 12), empty, **settings), torch.randn(5, 6)
    again.load_state_dict(state)
    assert again.settings() == settings and type(again) is type(module)
    assert torch.equal(again.eval()(x), module.eval()(x))


@pytest.mark.parametrize("factory", [factorized_linear, guided_linear])
def test_under_autocast_products_are_as_narrow_as_those_of_a_linear(factory):
    _, module = make(factory)
    module.mix = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(torch.randn(5, 6))
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("factory", [factorized_linear, guided_linear])
def test_it_compiles_without_graph_breaks_and_a_may_change(factory):
    _, module = make(factory)
    compiled, x = torch.compile(module, backend="eager", fullgraph=True), torch.randn(4, 6)
    for module.mix in [cosine_mix(t / 20) for t in range(20)]:
        assert torch.allclose(compiled(x), module(x), atol=1e-6)


@torch.no_grad()
def test_the_forwards_time_falls_with_the_share_of_the_parameters_at_width_1536():
    width, x = 1536, torch.randn(128, 1536)
    dense, most = linear_and_factors(width, 4 * width, width // 2)  # 62.5 % of the parameters
    _, few = linear_and_factors(width, 4 * width, width // 4)  # 31.25 %
    steps = {name: lambda m=m: m(x) for name, m in (("100", dense), ("63", most), ("31", few))}

    def ordered():
        found = interleaved_seconds(steps, rounds=3, clock=time.process_time)
        seconds = {name: median(times) for name, times in found.items()}
        return seconds["31"] < seconds["63"] < seconds["100"]

    assert any(ordered() for _ in range(5))
