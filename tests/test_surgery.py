"""Targets of real timm models; injecting, undoing and merging adapters."""

import pytest
import torch
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from switchlora.adapters import (
    Adapter,
    Factors,
    adapted_linear,
    adapted_modules,
    alpha_over_rank,
    applied_ranks,
    check_adapters_work,
    count_parameters,
    coverage_line,
    find_targets,
    inject,
    kept_parameters,
    merged_state_dict,
    restore,
    scaling_one,
    train_only,
)
from switchlora.learner import build_learner
from switchlora.models import create_model, eval_mode
from switchlora.names import family

DEFAULTS = list(composed().switch.targets)


def random_factors(model, targets, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, target in targets.items():
        out, inner = target.weight(model).shape
        A = torch.randn(rank, inner, generator=generator) / inner**0.5
        factors[name] = Factors(A, torch.randn(out, rank, generator=generator) / rank)
    return factors


@pytest.mark.parametrize("depth,width", [(1, 32), (3, 64)])
@pytest.mark.parametrize("class_token", [True, False])
def test_defaults_find_four_linears_in_every_block(depth, width, class_token):
    pool = "token" if class_token else "avg"
    model = tiny_vit(depth=depth, embed_dim=width, class_token=class_token, global_pool=pool)
    targets = find_targets(model, DEFAULTS)
    assert len(targets) == 4 * depth
    assert {family(n) for n in targets} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize(
    "name,options,families",
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 2}, 4),
        ("vit_base_patch16_reg4_gap_256", {"depth": 2, "embed_dim": 96, "num_heads": 2}, 4),
        ("eva02_tiny_patch14_224", {"depth": 2}, 4),
        ("eva02_base_patch14_224", {"depth": 2, "embed_dim": 96, "num_heads": 2}, 7),
        ("beit_base_patch16_224", {"depth": 2, "embed_dim": 96, "num_heads": 2}, 4),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 4),
    ],
)
def test_defaults_find_targets_that_other_transformers_call(name, options, families):
    model = create_model(name, num_classes=5, **options)
    size = model.default_cfg["input_size"]
    targets = find_targets(model, DEFAULTS)
    assert len({family(n) for n in targets}) == families
    check_adapters_work(model, targets.values(), torch.randn(1, *size))


def test_a_pattern_that_matches_nothing_suggests_near_names(vit):
    with pytest.raises(ValueError, match=r"'attn\.qvk' matches no linear layer.*attn\.qkv"):
        find_targets(vit, ["attn.qvk"])
    with pytest.raises(ValueError, match="at least one pattern"):
        find_targets(vit, [])


def test_a_pattern_that_matches_nothing_is_told_which_linears_there_are(vit):
    with pytest.raises(ValueError, match="'nope' matches no linear layer") as error:
        find_targets(vit, ["nope"])
    listed = str(error.value).split("linears of this model: ")[1].split(", ")
    blocks = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert listed == [*(f"blocks.*.{name}" for name in blocks), "head"]
    assert len(find_targets(vit, listed)) == 2 * len(blocks) + 1  # each can be pasted


@pytest.mark.parametrize("count,end", [(10, "j"), (11, "j and 1 more"), (13, "j and 3 more")])
def test_at_most_ten_families_of_linears_are_listed(count, end):
    names = "abcdefghijklm"[:count]
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=f"model: a.*, b.*, c.*, .*, {end[0]}.*{end[1:]}$"):
        find_targets(model, ["nope"])


def test_a_model_without_linears_is_said_to_have_none():
    with pytest.raises(ValueError, match="linears of this model: none$"):
        find_targets(nn.Sequential(nn.Conv2d(3, 3, 1)), ["qkv"])


def test_a_convolution_is_not_a_target(vit):
    with pytest.raises(ValueError, match="matches no linear layer"):
        find_targets(vit, [r"patch_embed\.proj"])


class ReadsWeight(nn.Module):
    """Uses a linear's weight without calling it, as fused-bias attention does."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        return nn.functional.linear(x, self.qkv.weight)


def test_a_target_that_the_model_never_calls_is_refused():
    model = ReadsWeight()
    with pytest.raises(ValueError, match="qkv, are never called"):
        check_adapters_work(model, find_targets(model, ["qkv"]).values(), torch.ones(1, 4))


class Small(nn.Module):
    """Sequences (B, 6, 8) to logits, by layers of torch, with a head of zeros."""

    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        nn.init.zeros_(self.head.weight)
        if change:
            change(self)

    def forward(self, x):
        x = self.layer(x)
        return self.head(x + self.fc2(x + self.fc1(x))).mean(1)


def share_weight(model):
    model.fc2.weight = model.fc1.weight


def share_module(model):
    model.fc2 = model.fc1


def read_weight_too(model):
    model.head.register_forward_pre_hook(lambda _, args: args[0] @ model.fc1.weight)


@pytest.mark.parametrize(
    "change,says",
    [
        (share_weight, "shared with another"),
        (share_module, "shared with another"),
        (read_weight_too, "read directly"),
        (lambda model: nn.utils.parametrizations.weight_norm(model.fc1), "made anew"),
        (lambda model: nn.utils.parametrizations.spectral_norm(model.fc1), "made anew"),
    ],
)
def test_an_adapter_that_does_not_stand_for_its_weight_is_refused(change, says):
    model = Small(change)
    targets = find_targets(model, ["fc1", "layer.linear1"])
    with pytest.raises(ValueError, match=rf"such as fc1, compute something else.*{says}"):
        check_adapters_work(model, targets.values(), torch.randn(4, 6, 8))


def test_a_projection_inside_of_torchs_attention_is_refused():
    model = Small()
    targets = find_targets(model, ["out_proj", "linear1"])
    with pytest.raises(ValueError, match="1 target.*out_proj, are never called"):
        check_adapters_work(model, targets.values(), torch.randn(4, 6, 8))


def test_the_check_leaves_bits_and_modes_as_they_were():
    model = Small()
    model.layer.norm1.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    modes = [module.training for module in modules.values()]
    random = torch.get_rng_state()
    check_adapters_work(
        model, find_targets(model, ["linear1", "fc2"]).values(), torch.ones(2, 6, 8)
    )
    assert dict(model.named_modules()) == modules
    assert [module.training for module in modules.values()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@torch.no_grad()
def test_in_evaluation_adapters_count_where_torch_has_a_fast_path(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)
    model, x = Small().eval(), torch.randn(4, 6, 8)
    nn.init.normal_(model.head.weight)
    before = model(x)
    targets = find_targets(model, ["linear1", "linear2"])
    inject(model, targets, random_factors(model, targets), scaling_one)
    assert torch.allclose(model(x), before, atol=1e-5)
    for module in adapted_modules(model).values():
        module.lora_B.add_(0.5)
    plain = Small().eval()
    plain.load_state_dict(merged_state_dict(model))
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert (model(x) - before).abs().max() > 0.01


def test_the_coverage_names_the_largest_linears_that_are_left_out(vit):
    whole = find_targets(vit, [*DEFAULTS, "head"])
    assert (
        coverage_line(vit, whole.values())
        == "targets: 100.0% of the weights of the model's linears"
    )
    sizes = {"attn.qkv": 3 * 32 * 32, "attn.proj": 32 * 32, "mlp.fc1": 4 * 32 * 32}
    total = 2 * (sum(sizes.values()) + sizes["mlp.fc1"]) + 5 * 32
    some = find_targets(vit, ["mlp.fc2"], split_qkv=True)
    shares = [f"blocks.*.{name} ({2 * sizes[name] / total:.1%})" for name in sizes]
    shares.sort(key=lambda share: float(share.split("(")[1].rstrip("%)")), reverse=True)
    said = coverage_line(vit, some.values())
    assert said.startswith(f"targets: {2 * sizes['mlp.fc1'] / total:.1%} of the weights")
    assert said.endswith(f"left out: {', '.join(shares)} and 1 more")


def test_norms_that_are_frozen_keep_their_running_statistics(vit, images):
    stem = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.BatchNorm2d(1, affine=False))
    after = nn.BatchNorm1d(5)
    model = nn.Sequential(stem, vit, after)
    for frozen in (True, False):
        stem.requires_grad_(not frozen)
        learner = build_learner(model, build(composed().full), total_updates=10)
        moved = []
        for number in range(2):
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            learner.update(images, torch.arange(8) % 5, nn.CrossEntropyLoss(), number)
            with eval_mode(model):
                model(images)
            now = dict(model.named_buffers())
            moved.append({n.split(".")[0] for n in now if not torch.equal(now[n], before[n])})
        assert moved == [{"2"} if frozen else {"0", "2"}] * 2


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize("scaling", [scaling_one, lambda r: alpha_over_rank(r, 16.0)])
def test_inject_keeps_the_function_and_restore_the_very_modules(vit, images, split_qkv, scaling):
    vit.eval()
    before, modules = vit(images), dict(vit.named_modules())
    targets = find_targets(vit, DEFAULTS, split_qkv)
    replaced = inject(vit, targets, random_factors(vit, targets), scaling)
    assert len(adapted_modules(vit)) == len(replaced) == 8
    assert (vit(images) - before).abs().max() <= 1e-5
    restore(vit, replaced)
    assert dict(vit.named_modules()) == modules
    assert torch.equal(vit(images), before)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 0), (0, 0, 3)])
def test_a_sliced_adapter_equals_three_separate_ones(ranks):
    torch.manual_seed(0)
    qkv, x = nn.Linear(16, 48), torch.randn(5, 7, 16)
    adapters = {
        part: Adapter(torch.randn(r, 16), torch.randn(16, r), slice(16 * i, 16 * i + 16), 0.5 + i)
        for i, (part, r) in enumerate(zip("qkv", ranks, strict=True))
    }
    sliced = adapted_linear(qkv, adapters)
    with torch.no_grad():
        for B in sliced.lora_B.values():
            B.add_(0.1)
    W, outputs = sliced.weight, []
    for name, a in sliced.adapters().items():
        outputs.append(x @ (W[a.rows] + a.scaling * a.B @ a.A).mT + qkv.bias[a.rows])
        assert len(a.A) == dict(zip("qkv", ranks, strict=True))[name]
    assert torch.allclose(sliced(x), torch.cat(outputs, -1), atol=1e-5)


def test_row_slices_come_in_the_order_of_the_rows(vit):
    targets = find_targets(vit, ["attn.qkv"], split_qkv=True)
    first = [targets[f"blocks.0.attn.qkv.{part}"] for part in "qkv"]
    assert [t.rows for t in first] == [slice(0, 32), slice(32, 64), slice(64, 96)]
    inject(vit, targets, random_factors(vit, targets), scaling_one)
    module = vit.get_submodule("blocks.0.attn.qkv")
    assert [a.rows for a in module.adapters().values()] == [t.rows for t in first]


@pytest.mark.parametrize("split_qkv", [False, True])
def test_the_merged_state_dict_is_the_plain_models_and_computes_the_same(vit, images, split_qkv):
    vit.eval()
    targets = find_targets(vit, DEFAULTS, split_qkv)
    inject(vit, targets, random_factors(vit, targets), scaling_one)
    for p in vit.parameters():
        p.data.add_(0.01 * torch.randn(p.shape))
    plain = tiny_vit().eval()
    plain.load_state_dict(merged_state_dict(vit), strict=True)
    assert (plain(images) - vit(images)).abs().max() <= 1e-5


def test_merging_changes_nothing_in_the_model(vit, images):
    targets = find_targets(vit, DEFAULTS)
    inject(vit, targets, random_factors(vit, targets), scaling_one)
    state = {n: t.clone() for n, t in vit.state_dict().items()}
    for _ in range(300):
        merged_state_dict(vit)
        vit.train().eval()
    assert all(torch.equal(state[n], t) for n, t in vit.state_dict().items())


def test_rank_zero_freezes_a_target_without_an_adapter(vit):
    targets = find_targets(vit, ["mlp.fc1"])
    inject(vit, targets, random_factors(vit, targets, rank=0), scaling_one)
    assert not adapted_modules(vit)
    assert applied_ranks(vit, targets, targets) == dict.fromkeys(targets, 0)
    train_only(vit, kept_parameters(vit, {t.module for t in targets.values()}, [".*"]))
    assert not vit.get_parameter("blocks.0.mlp.fc1.weight").requires_grad


@pytest.mark.parametrize(
    "keep,extra",
    [
        ([], set()),
        (["norm"], {"norm"}),
        (["head", "bias"], {"head", "bias"}),
        ([".*"], {""}),
    ],
)
def test_keep_says_what_trains_besides_the_factors(vit, keep, extra):
    targets = find_targets(vit, DEFAULTS)
    inject(vit, targets, random_factors(vit, targets), scaling_one)
    train_only(vit, kept_parameters(vit, targets, keep))
    for name, p in vit.named_parameters():
        frozen_weight = name.removesuffix(".weight") in targets
        wanted = any(part in name for part in extra) and not frozen_weight
        assert p.requires_grad == (wanted or "lora_" in name), name


def test_keep_that_matches_nothing_suggests_near_names(vit):
    with pytest.raises(ValueError, match=r"switch\.keep.*'hed'.* matches no parameter"):
        kept_parameters(vit, [], ["hed"])


def test_freezing_drops_the_gradient(vit, images):
    vit(images).sum().backward()
    train_only(vit, kept_parameters(vit, ["blocks.0.mlp.fc1"], [".*"]))
    assert vit.get_parameter("blocks.0.mlp.fc1.weight").grad is None
    assert vit.get_parameter("blocks.0.mlp.fc2.weight").grad is not None
    assert count_parameters(vit) - count_parameters(vit, trainable=True) == 32 * 128


@pytest.mark.parametrize(
    "name,expected",
    [
        ("blocks.3.attn.qkv", "attn.qkv"),
        ("layers.0.blocks.11.mlp.fc1", "mlp.fc1"),
        ("head", "head"),
        ("blocks.3.attn.qkv.q", "attn.qkv.q"),
    ],
)
def test_family(name, expected):
    assert family(name) == expected
