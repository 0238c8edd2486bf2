"""GaLore, APOLLO and Fira: each step by its equation, what the state holds, runs that go on."""

import math

import pytest
import torch
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from pretended import DEVICE, on_pretended
from runs import SHORT, assert_same_run, make_run, make_run_in_parts
from switchlora.analysis.compare import differences
from switchlora.cost import stepped, without_content
from switchlora.learner import (
    build_learner,
    dense_moments,
    held_bytes,
    moments_of,
    parameter_groups,
)
from switchlora.learner.parts import MATRICES
from switchlora.learner.projected import PRIME
from switchlora.learner.recipe import check_goes_with_fsdp
from test_distributed import run_ranks

NAMES = ("galore", "fira", "apollo", "apollo_mini")
LR, INTERVAL = 1e-2, 2
SMALL = (
    *("data.train_size=320", "max_updates=18", "epochs=3"),
    *("full.scheduler.warmup_t=5", "monitor.window=5", "full.optimizer.interval=4"),
)
"""10 updates an epoch"""


def recipe(name, *words):
    return build(composed(f"recipe@full={name}", "full.scheduler.warmup_t=0", *words).full)


def gradients(shape, count=5):
    """Gradients of growing norms, so that the limiter acts."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [drawn[k] * 3**k for k in range(count)]


def tensors(optimizer):
    """All tensors that an optimizer holds."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return filter(torch.is_tensor, values)


def reference(name, weight, grads, rank, scale):
    """The authors' code in few lines, for a weight with more columns than rows."""
    first = second = last = P = None
    for t, G in enumerate(grads):
        if t % INTERVAL == 0 and name in ("galore", "fira"):
            P = torch.linalg.svd(G, full_matrices=False)[0][:, :rank]
        elif t % INTERVAL == 0:
            generator = torch.Generator().manual_seed(PRIME + t // INTERVAL)
            P = torch.randn(len(G), rank, generator=generator).to(G) / math.sqrt(rank)
        R = P.T @ G
        first = 0.1 * R if first is None else 0.9 * first + 0.1 * R
        second = 0.001 * R * R if second is None else 0.999 * second + 0.001 * R * R
        psi = first / (second.sqrt() + 1e-6)
        phi = psi.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        if name == "apollo_mini":
            phi = psi.norm() / (R.norm() + 1e-8)
        term = phi * (G - scale * P @ R if name == "fira" else G)
        if last is not None:
            term = term / (max(term.norm() / (last + 1e-8), 1.01) / 1.01)
        last = term.norm()
        inside = scale * P @ psi
        change = {"galore": inside, "fira": inside + term}.get(name, scale * term)
        size = LR * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        weight = weight - size * change
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_a_matrix_moves_as_the_equations_of_its_paper_say(name, shape):
    config = composed(f"recipe@full={name}", f"full.optimizer.interval={INTERVAL}")
    options = config.full.optimizer
    weight = nn.Parameter(torch.linspace(-1, 1, 160, dtype=torch.float64).view(shape))
    turned = shape[0] > shape[1]
    start = weight.detach().clone()
    group = {"params": [weight], "part": MATRICES}
    optimizer = build(options)([group])
    grads = gradients(shape)
    for grad in grads:
        weight.grad = grad
        optimizer.step()
    rank = 1 if name == "apollo_mini" else 2
    wide = [grad.T for grad in grads] if turned else grads
    expected = reference(name, start.T if turned else start, wide, rank, options.scale)
    assert torch.allclose(weight.T if turned else weight, expected, rtol=1e-9, atol=1e-12)


def test_the_rates_are_those_of_the_authors():
    for name, rank, scale in (("galore", 0.25, 0.25), ("fira", 0.25, 0.25), ("apollo", 0.25, 1)):
        options = composed(f"+method={name}").full.optimizer
        told = (options.lr, options.rank, options.scale, options.interval, options.eps)
        assert told == (0.01, rank, scale, 200, 1e-6)
    mini = composed("+method=apollo_mini").full
    assert mini.optimizer.rank == 1 and mini.optimizer.scaling == "tensor"
    assert mini.optimizer.scale == pytest.approx(math.sqrt(128), rel=1e-5)
    assert mini.weight_decay == 0 and mini.clip_grad is None and mini.optimizer.lr == 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_matrix_is_as_small_as_the_paper_says(name):
    model = tiny_vit()
    learner = build_learner(model, recipe(name), total_updates=10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    learner.optimizer.step()
    matrices = {p for group in learner.optimizer.groups(MATRICES) for p in group["params"]}
    assert matrices
    for weight, state in learner.optimizer.state.items():
        held = sum(v.untyped_storage().nbytes() for v in state.values() if torch.is_tensor(v))
        if weight not in matrices:
            assert held == 2 * weight.nbytes + 4
            continue
        short, long = sorted(weight.shape)
        rank = 1 if name == "apollo_mini" else round(short / 4)
        numbers = 2 * rank * long
        numbers += rank * short if name in ("galore", "fira") else 0
        numbers += 0 if name == "galore" else 1
        assert held == 4 * numbers
    with without_content(model, torch.device("cpu")) as hollow:
        predicted = held_bytes(tensors(stepped(hollow, recipe(name))))
    assert predicted == held_bytes(tensors(learner.optimizer))


@pytest.mark.parametrize("name", NAMES)
def test_all_but_the_matrices_are_stepped_by_adamw(name):
    mine, theirs = tiny_vit(), tiny_vit()
    theirs.load_state_dict(mine.state_dict())
    optimizer = build_learner(mine, recipe(name), total_updates=10).optimizer
    adamw = torch.optim.AdamW(theirs.parameters(), LR, eps=1e-6, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = LR
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    optimizer.step()
    adamw.step()
    inside = {p for group in optimizer.groups(MATRICES) for p in group["params"]}
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other) != (one in inside)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_about_as_long_as_the_rates_of_factors_are_matched_to(name):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 96))
    optimizer = build(composed(f"recipe@full={name}").full.optimizer)
    optimizer = optimizer([{"params": [weight], "part": MATRICES}])
    weight.grad = torch.randn(64, 96)
    optimizer.step()
    length = weight.detach().square().mean().sqrt().item() / optimizer.param_groups[0]["lr"]
    assert 0.6 < length / optimizer.step_size(64, 96) < 1.7


def test_another_rank_begins_with_a_fresh_state():
    weight = nn.Parameter(torch.ones(4, 8))
    group = {"params": [weight], "part": MATRICES}
    first = build(composed("recipe@full=galore").full.optimizer)([dict(group)])
    other = build(composed("recipe@full=galore", "full.optimizer.rank=3").full.optimizer)([group])
    for optimizer in (first, other):
        weight.grad = torch.randn(4, 8)
        optimizer.state[weight] = first.state[weight]
        optimizer.step()
    assert other.state[weight]["step"] == 1
    assert other.state[weight]["projected_exp_avg"].shape == (3, 8)


def test_projected_moments_are_not_cut_into_slices():
    model = tiny_vit()
    learner = build_learner(model, recipe("galore"), total_updates=10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    learner.optimizer.step()
    rows = {"blocks.0.attn.qkv": {"q": slice(0, 4)}}
    assert dense_moments(rows, moments_of(model, learner.optimizer)) == {}


def test_shards_and_a_rank_that_is_none_are_refused_in_one_line():
    with pytest.raises(ValueError, match="GaLore does not go with system.parallel=fsdp: use ddp"):
        check_goes_with_fsdp(recipe("galore"))
    with pytest.raises(ValueError, match="full.optimizer.rank is 0: give a number above 0"):
        parameter_groups(tiny_vit(), recipe("galore", "full.optimizer.rank=0"))


@pytest.fixture(scope="module", params=["fira", "apollo_mini"])
def finished(request, tmp_path_factory):
    """The name of a method, and the folder of its run."""
    folder = tmp_path_factory.mktemp(request.param)
    make_run(folder, f"+method={request.param}", *SMALL, "full.precision=bf16")
    return request.param, folder


def test_a_run_that_stops_between_two_projections_goes_on_bit_for_bit(
    finished, tmp_path, at_update
):
    name, folder = finished
    words = (f"+method={name}", *SMALL, "full.precision=bf16")
    make_run_in_parts(tmp_path, at_update, [14], *words)
    assert_same_run(folder, tmp_path)


SWITCHED = (
    *("switch/criterion=at_epoch", "switch.criterion.epoch=1", "switch.split_qkv=true"),
    *("switch/rank=fixed", "switch.rank.rank=2", "log.cost_model=true", "max_updates=14"),
)


@pytest.mark.usefixtures("measured_together")
def test_a_run_on_another_device_goes_through_a_switch_and_holds_what_was_predicted(tmp_path):
    words = ("recipe@full=apollo", *SMALL, *SWITCHED)
    with on_pretended():
        make_run(tmp_path / "there", f"system.device={DEVICE}", *words)
    summary = make_run(tmp_path / "here", *words)
    found = [line for line in differences(tmp_path / "there", tmp_path / "here")]
    assert not [line for line in found if "memory" not in line]
    assert set(summary["phases"]) == {"full", "adapter"}
    for phase in summary["phases"].values():
        memory = phase["memory"]
        measured = memory["measured"]["optimizer_state"]
        assert measured == memory["predicted"]["optimizer_state"] > 0


def test_ranks_project_alike(tmp_path):
    words = ("+method=fira", *SHORT, *SMALL, "max_updates=10")
    assert run_ranks(2, tmp_path, *words)["spread"] == 0.0
