"""Quantised frozen weights: codes, products, the switch, and everything that reads them later."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from switchlora import LowRankSwitch
from switchlora.adapters import (
    CODES,
    Adapter,
    adapted_linear,
    adapted_modules,
    adapter_layout,
    count_parameters,
    dequantised,
    inject_empty,
    merged_state_dict,
    operands_kept,
    quantised,
    round_residual,
    without_adapters,
)
from switchlora.adapters.quantised import LEVELS
from switchlora.bench import plan, plan_numbers
from switchlora.bench.plan_models import planned
from switchlora.criteria import AtEpoch
from switchlora.errors import SwitchFailed
from switchlora.learner import SavedTensors
from switchlora.run.checks import rehearse_switch
from switchlora.storage import load_adapter, save_adapter
from switchlora.switching import grow, settle, take_back, transaction
from switchlora.switching.rounding import give_to_factors, round_residuals
from trials import LOSS, Trial, batch

SHAPES = [(5, 64), (3, 1), (7, 130), (4, 97)]
BALANCED = "switch/init=update_svd"
ALL = slice(0, 27)
ROWS = {"q": slice(0, 9), "k": slice(9, 18), "v": slice(18, 27)}


def matrix(rows, columns):
    """Rows of many sizes; the first one is zero."""
    torch.manual_seed(rows * columns)
    weight = torch.randn(rows, columns) * torch.logspace(-30, 3, rows)[:, None]
    weight[0] = 0
    return weight


def read(codes, scale, name, columns):
    return dequantised(codes, scale, CODES[name], columns)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_at_most_half_a_step_of_its_row(shape):
    weight = matrix(*shape)
    codes, scale = quantised(weight, torch.int8)
    error = (read(codes, scale, "int8", shape[1]) - weight).abs()
    assert codes.dtype == torch.int8 and codes.shape == shape and scale.shape == (shape[0], 1)
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_torchs_own_cast_of_rows_that_end_at_448(shape):
    weight = matrix(*shape)
    codes, scale = quantised(weight, CODES["fp8"])
    by_torch = (weight / scale.where(scale > 0, 1.0)).to(torch.float8_e4m3fn).float()
    assert torch.equal(read(codes, scale, "fp8", shape[1]), by_torch * scale)
    assert by_torch.abs().amax(1)[1:].eq(448).all()


def test_the_levels_of_nf4_are_its_papers_quantiles():
    """Dettmers et al., arXiv 2305.14314: half of 2^4 + 1 quantiles on either side, and 0."""
    end = 0.9677083
    left, right = (norm.ppf([end + (0.5 - end) * i / n for i in range(n)]) for n in (7, 8))
    levels = torch.tensor(sorted([*-left, 0.0, *right]))
    torch.testing.assert_close(torch.tensor(LEVELS), (levels / levels.max()).float())


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_takes_the_nearest_level_of_each_block_and_half_a_byte(shape):
    weight = matrix(*shape)
    codes, scale = quantised(weight, CODES["nf4"])
    found = read(codes, scale, "nf4", shape[1])
    for block, values in zip(weight.split(64, 1), found.split(64, 1), strict=True):
        levels = block.abs().amax(1)[:, None] * torch.tensor(LEVELS)
        nearest = (block[:, :, None] - levels[:, None]).abs().amin(2)
        assert torch.equal((block - values).abs(), nearest)
    assert codes.nbytes == shape[0] * -(-shape[1] // 2)
    assert scale.nbytes == 4 * shape[0] * -(-shape[1] // 64)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_codes_stand_for_has_these_codes(name, shape):
    codes, scale = quantised(matrix(*shape), CODES[name])
    again, _ = quantised(read(codes, scale, name, shape[1]), CODES[name])
    assert torch.equal(again, codes)
    assert codes.dtype in (torch.int8, torch.uint8), "gloo exchanges no floats of 8 bits"


def layer(name, sliced=False, columns=70):
    torch.manual_seed(0)
    adapters = {}
    for part, rows in (ROWS if sliced else {"": ALL}).items():
        A, B = torch.randn(3, columns) / 8, torch.randn(rows.stop - rows.start, 3) / 8
        adapters[part] = Adapter(A, B, rows, 0.5)
    module = adapted_linear(nn.Linear(columns, 27), adapters)
    round_residual(module, CODES[name])
    return module


def exact(module):
    """W_res + s B A in float64, of float64 copies that train."""
    parts = []
    for A, B, _, s in module.adapters().values():
        parts.append(s * (B.double() @ A.double()))
    codes = dequantised(module.weight, module.weight_scale, module.coded, module.in_features)
    return codes.double() + torch.cat(parts)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_dequantised_weight(name, form, sliced, precision):
    module = layer(name, sliced)
    module.form = form
    x = torch.randn(6, 5, 70, requires_grad=True)
    direction = torch.randn(6, 5, 27)
    trained = [p for p in module.parameters() if p.requires_grad]
    with operands_kept(module), torch.autocast("cpu", precision, precision != torch.float32):
        outputs = module(x)
        found = [outputs, *torch.autograd.grad((outputs * direction).sum(), [x, *trained])]
    expected = x.double() @ exact(module).T + module.bias.double()
    loss = (expected * direction).sum()
    for mine, theirs in zip(
        found, [expected, *torch.autograd.grad(loss, [x, *trained])], strict=True
    ):
        size = theirs.abs().max()
        close = 1e-5 if precision == torch.float32 else 2e-2
        assert (mine - theirs).abs().max() <= close * size
    torch.testing.assert_close(module.merged().double(), exact(module).detach())


@pytest.mark.parametrize("transform", ["dropout", "functorch", "compiled"])
def test_other_ways_through_a_product_read_the_codes_too(transform):
    module, x = layer("nf4"), torch.randn(4, 70)
    expected = (x.double() @ exact(module).T + module.bias).detach().float()
    if transform == "dropout":
        module.dropout = 1e-9
        found = module(x)
    elif transform == "functorch":
        found = torch.func.vmap(module)(x)
    else:
        found = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_pass_keeps_a_dequantised_weight():
    kept = {}
    for name in (None, "int8"):
        module = adapted_linear(
            nn.Linear(256, 256),
            {"": Adapter(torch.randn(1, 256), torch.randn(256, 1), slice(0, 256), 1.0)},
        )
        if name:
            round_residual(module, CODES[name])
        module.form, saved = "merged", SavedTensors()
        with operands_kept(module), saved:
            outputs = module(torch.randn(2, 256, requires_grad=True))
            kept[name] = saved.bytes_beside(module)
        outputs.sum().backward()
    assert kept[None] >= 4 * 256 * 256 and kept["int8"] < 256 * 256


@pytest.fixture(scope="module")
def trained():
    """Full phases by their start, that are copied, not trained again."""
    return {start: Trial(start) for start in (BALANCED, "switch/init=update_directions")}


def trial_of(trained, *words, start="switch/init=update_directions"):
    trial = copy.deepcopy(trained[start])
    trial.policy = build(composed("switch/rank=fixed", "switch.rank.rank=2", start, *words).switch)
    return trial


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("start", [BALANCED, "switch/init=update_directions"])
@pytest.mark.parametrize("name", CODES)
def test_a_switch_quantises_and_B_takes_what_it_can_of_the_loss(name, start, trained, monkeypatch):
    trial = trial_of(trained, f"switch.residual_dtype={name}", start=start)
    twin, plain = copy.deepcopy(trial), copy.deepcopy(trained[start])
    report = trial.switch()
    assert report.drift <= 1e-5 and report.rounding_drift > 0
    monkeypatch.setattr(transaction, "give_to_factors", lambda *_: None)
    twin.switch()
    for path, module in adapted_modules(trial.model).items():
        lost = plain.model.get_submodule(path).weight.double() - exact(module)
        rows = lost @ torch.linalg.pinv(module.lora_A.double())
        assert rows.abs().max() < 1e-5, "no other B is better for this A"
        alone = adapted_modules(twin.model)[path]
        assert lost.norm() < (lost - exact(module) + exact(alone)).norm()
        assert_equal(module.weight.data, alone.weight.data)
        assert_equal(module.lora_A.data, alone.lora_A.data)
    trial.train(3)


@pytest.mark.parametrize("name", CODES)
def test_outputs_do_not_move_for_inputs_that_A_spans(name):
    torch.manual_seed(0)
    A, B = torch.randn(5, 70), torch.zeros(27, 5)
    model = nn.Sequential(adapted_linear(nn.Linear(70, 27), {"": Adapter(A, B, ALL, 0.5)}))
    drifts = []
    for inputs in (torch.randn(8, 5) @ A, torch.randn(8, 70)):
        other = copy.deepcopy(model)
        before = other(inputs)
        shares = round_residuals(other, CODES[name], {})
        rounded = (other(inputs) - before).abs().max()
        give_to_factors(other, shares)
        drifts.append((other(inputs) - before).abs().max() / rounded)
    assert drifts[0] < 1e-3 and drifts[1] > 0.3


def test_a_quantised_model_counts_holds_and_trains_what_it_says(trained):
    trial = trial_of(trained, "switch.residual_dtype=nf4")
    parameters, before = count_parameters(trial.model), {}
    trial.switch()
    factors = sum(len(m.lora_A) * (m.in_features + m.out_features) for m in modules(trial))
    assert count_parameters(trial.model) == parameters + factors
    for module in modules(trial):
        size = module.in_features * module.out_features
        held = module.weight.nbytes + module.weight_scale.nbytes
        assert held <= 0.5 * size + 4 * (size / 64 + module.out_features)
        assert not module.weight.requires_grad and not module.weight_scale.requires_grad
        before[module] = module.weight.clone()
    trial.train(3)
    assert all(torch.equal(module.weight, codes) for module, codes in before.items())


def modules(trial):
    return adapted_modules(trial.model).values()


def test_too_large_a_drift_undoes_the_switch_bit_by_bit(trained):
    trial = trial_of(trained, "switch.residual_dtype=nf4", "switch.max_rounding_drift=1e-6")
    before = state_of(trial.model)
    with pytest.raises(
        SwitchFailed, match=r"to nf4 moved the logits by .*max_rounding_drift=1e-0"
    ):
        trial.switch()
    assert_equal(state_of(trial.model), before)
    trial.train(1)


def test_after_a_joint_phase_weights_are_quantised_or_all_is_as_before(trained):
    trial = trial_of(trained, "switch.residual_dtype=int8", "switch.joint_epochs=1")
    ranks = trial.switch().ranks
    assert all(module.coded is None for module in modules(trial))
    trial.train(2)
    before = state_of(trial.model)
    with pytest.raises(SwitchFailed):
        settle(trial.scene(lambda model: 1 / 0), ranks)
    assert_equal(state_of(trial.model), before)
    trial.learner, outcome = settle(trial.scene(), ranks)
    assert outcome.rounding_drift > 0
    assert all(module.coded == torch.int8 for module in modules(trial))
    trial.train(1)


def test_growth_keeps_the_codes_and_full_training_comes_back_with_whole_weights(trained):
    trial = trial_of(trained, "switch.residual_dtype=nf4")
    full = [name for name, p in trial.model.named_parameters() if p.requires_grad]
    trial.switch()
    trial.train(2)
    codes = [module.weight.clone() for module in modules(trial)]
    gradients = {
        n: torch.randn_like(t.weight(trial.model)) for n, t in trial.monitor.known.items()
    }
    ranks = dict.fromkeys(gradients, 4)
    trial.learner, growth = grow(trial.scene(), lambda: gradients, ranks)
    assert set(growth.ranks.values()) == {4} and growth.rounding_drift < 1e-5
    for module, before in zip(modules(trial), codes, strict=True):
        assert torch.equal(module.weight, before)
    trial.train(1)
    trial.learner, outcome = take_back(trial.scene(), full)
    assert outcome.drift < 1e-5 and not adapted_modules(trial.model)
    assert all(p.dtype == torch.float32 for p in trial.model.parameters())
    trial.train(1)


def test_a_later_stage_leaves_the_codes_of_an_earlier_one():
    words = ("switch.residual_dtype=fp8", "switch/stages=by_margin", "switch.split_qkv=true")
    trial = Trial(*words, "switch.rank.rank=1")
    first = [name for name in trial.monitor.targets if name.endswith((".q", ".proj"))]
    waiting = trial.switch(first).waiting
    trial.monitor.watch(waiting, trial.done)
    trial.train(1)
    qkv = trial.model.blocks[0].attn.qkv
    rows, before = len(qkv.weight), qkv.weight.clone()
    assert qkv.coded and set(qkv.dense) == {"k", "v"}
    trial.switch(waiting)
    qkv = trial.model.blocks[0].attn.qkv
    assert not qkv.dense and torch.equal(qkv.weight[:rows], before)
    trial.train(1)


@pytest.mark.parametrize("name", CODES)
def test_a_rebuilt_model_has_the_bits_and_exports_what_it_computes(name, trained, tmp_path):
    trial = trial_of(trained, f"switch.residual_dtype={name}")
    trial.switch()
    trial.train(2)
    images = batch(7)[0]
    with torch.no_grad():
        expected = trial.model.eval()(images)
    again = tiny_vit()
    inject_empty(again, adapter_layout(trial.model))
    again.load_state_dict(trial.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images), expected)
    plain = tiny_vit().eval()
    plain.load_state_dict(merged_state_dict(trial.model))
    save_adapter(trial.model, tmp_path)
    residual = load_file(tmp_path / "residual.safetensors")
    assert_equal(residual, without_adapters(trial.model))
    assert {tensor.dtype for tensor in residual.values()} == {torch.float32}
    for model in (plain, load_adapter(tiny_vit(), tmp_path).eval()):
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_a_loop_of_ones_own_quantises_and_goes_on_from_its_state():
    def loop(updates, state=None):
        torch.manual_seed(0)
        model = tiny_vit()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {"criterion": AtEpoch(2), "updates_per_epoch": 1, "window": 2, "rank": 2}
        switch = LowRankSwitch(model, optimizer, residual_dtype="int8", **options)
        for part, saved in zip((switch, model, optimizer), state or (), strict=False):
            part.load_state_dict(saved)
        for number in range(switch.num_updates, updates):
            images, labels = batch(number)
            optimizer.zero_grad()
            LOSS(model(images), labels).backward()
            optimizer.step()
            switch.step()
        return model, [copy.deepcopy(part.state_dict()) for part in (switch, model, optimizer)]

    whole, _ = loop(6)
    assert all(module.coded == torch.int8 for module in adapted_modules(whole).values())
    resumed, _ = loop(6, loop(4)[1])
    assert_equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    "words, says",
    [
        (("switch/restart=relora",), "residual_dtype=int8 does not go with switch.restart: what"),
        (("switch/adapter=factorized", "switch/init=weight_svd"), "with switch.residual_dtype"),
        (("switch.max_rounding_drift=-1",), "switch.max_rounding_drift is -1"),
    ],
)
def test_what_cannot_be_quantised_is_refused_at_once(words, says):
    with pytest.raises(Exception, match=says):
        build(composed("switch.residual_dtype=int8", *words).switch)


def test_shards_refuse_codes_before_training(trained):
    trial = trial_of(trained, "switch.residual_dtype=fp8")
    with pytest.raises(ValueError, match="residual_dtype=fp8 does not go with system.parallel"):
        rehearse_switch(trial.model, trial.policy, trial.monitor, "fsdp")


def test_a_plan_counts_the_bytes_of_codes():
    words = ("model=vit_tiny_patch16_224", "hardware=h100", "data.batch_size=16", "rank=4")
    sizes = {}
    for dtype in ("bf16", "int8", "nf4"):
        request = plan.request_of([*words, f"switch.residual_dtype={dtype}"])
        few = plan_numbers.traces_of(planned(request.model, {}), request, "adapter")
        sizes[dtype] = plan_numbers.sizes_of(12, few)["parameters"]
    weights = 12 * 12 * 192**2  # of the targets
    assert sizes["bf16"] - sizes["int8"] == pytest.approx(weights, rel=0.03)
    assert sizes["int8"] - sizes["nf4"] == pytest.approx(0.44 * weights, rel=0.03)
