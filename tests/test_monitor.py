"""The monitor against exact linear algebra, and its small print."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conf_yamls import composed
from conftest import tiny_vit
from pretended import DEVICE, on_pretended
from runs import SHORT
from switchlora.adapters import find_targets
from switchlora.monitor import (
    Measurement,
    UpdateMonitor,
    batched,
    captured_energy,
    monitor as monitor_module,
    truncated_svd,
)
from switchlora.process import distributed
from switchlora.run import prepare
from switchlora.run.prepare import place_of_references
from switchlora.storage import read_record
from switchlora.train import fit

PATTERNS = [r"attn\.qkv", r"mlp\.fc1"]
ALL_FOUR = [*PATTERNS, r"attn\.proj", r"mlp\.fc2"]


def monitored(window=10, split_qkv=False, **options):
    torch.manual_seed(0)
    model = tiny_vit()
    return model, UpdateMonitor(model, find_targets(model, PATTERNS, split_qkv), window, **options)


def move(model, scale=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


@pytest.fixture(params=[False, True], ids=["one by one", "together"])
def way(request, monkeypatch):
    """How a CPU measures, and how a GPU does."""
    monkeypatch.setattr(monitor_module, "goes_together", lambda device: request.param)


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setattr(monitor_module, "goes_together", lambda device: True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("split_qkv", [False, True])
def test_statistics_agree_with_scipy(split_qkv):
    model, monitor = monitored(split_qkv=split_qkv)
    before = {n: t.weight(model).clone() for n, t in monitor.targets.items()}
    move(model)
    measurement = monitor.measure(10, 1.0)
    assert len(measurement.layers) == (8 if split_qkv else 4)
    for name, stats in measurement.layers.items():
        weight = monitor.targets[name].weight(model)
        update = weight - before[name]
        for matrix, norm, rank in [
            (weight, stats.weight_norm, stats.weight_stable_rank),
            (update, stats.update_norm, stats.update_stable_rank),
        ]:
            S = scipy.linalg.svdvals(matrix.numpy())
            assert norm == pytest.approx(math.sqrt((S**2).sum()), rel=1e-5)
            assert rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=0.02)
        assert stats.relative_update_norm == stats.update_norm / stats.weight_norm


def test_a_rotation_with_constant_norm_is_an_update():
    model, monitor = monitored()
    weight = model.get_parameter("blocks.0.mlp.fc1.weight")
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    norm = torch.linalg.matrix_norm(weight).item()
    with torch.no_grad():
        weight.copy_(weight @ rotation)
    stats = monitor.measure(10, 1.0).layers["blocks.0.mlp.fc1"]
    assert stats.weight_norm == pytest.approx(norm, rel=1e-5)
    assert stats.update_norm > 0.5 * norm


def test_exact_mode_adds_effective_ranks_and_leading_singular_values():
    model, monitor = monitored(exact=True, leading=5)
    move(model)
    stats = monitor.measure(10, 1.0).layers["blocks.1.attn.qkv"]
    S = scipy.linalg.svdvals(model.get_parameter("blocks.1.attn.qkv.weight").detach().numpy())
    p = S / S.sum()
    assert stats.weight_effective_rank == pytest.approx(math.exp(-(p * p_log(p)).sum()), rel=1e-3)
    assert stats.weight_singular_values == pytest.approx(S[:5], rel=1e-3)
    assert len(stats.update_singular_values) == 5


def test_kept_energies_are_what_the_directions_of_the_window_before_hold_of_an_update():
    model, monitor = monitored(exact=True, leading=5)
    name = "blocks.0.mlp.fc1"
    move(model)
    assert monitor.measure(10, 1.0).layers[name].update_kept_energies == ()
    _, _, directions = truncated_svd(monitor.updates()[name], 5)
    monitor.start_window(10)
    move(model, seed=1)
    again, _ = monitored(exact=True, leading=5)
    resumed = UpdateMonitor(again, monitor.targets, 10, exact=True, leading=5)
    resumed.load_state_dict(monitor.state_dict())
    again.load_state_dict(model.state_dict())
    kept = monitor.measure(20, 2.0).layers[name].update_kept_energies
    update = monitor.updates()[name]
    for rank in (1, 3, 5):
        assert sum(kept[:rank]) == pytest.approx(
            captured_energy(update, directions[:rank]), rel=1e-4
        )
    assert resumed.measure(20, 2.0).layers[name].update_kept_energies == kept


def turn(weight, angle):
    """Rotate the first two directions of the smaller side of ``weight`` (out, in)."""
    rotation = torch.eye(32)
    c, s = math.cos(angle), math.sin(angle)
    rotation[:2, :2] = torch.tensor([[c, -s], [s, c]])
    with torch.no_grad():
        weight.copy_(weight @ rotation if weight.shape[1] == 32 else rotation @ weight)


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"])
def test_bases_know_a_turn_by_its_angle_and_do_not_see_growth(name):
    model = tiny_vit()
    targets = find_targets(model, [r"mlp\.fc1", r"mlp\.fc2"])
    monitor = UpdateMonitor(model, targets, 10, bases=True)
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.mul_(3)
    assert monitor.measure(10, 1.0).layers[name].basis_stability == pytest.approx(1)
    turn(weight, math.pi / 3)
    layers = monitor.measure(20, 2.0).layers
    assert layers[name].basis_stability == pytest.approx((30 + 2 * 0.5) / 32)
    assert layers["blocks.1.mlp.fc1"].basis_stability == pytest.approx(1)


def test_basis_stability_is_the_mean_cosine_between_columns_of_polar_factors():
    model, monitor = monitored(bases=True)
    name = "blocks.1.attn.qkv"
    weight = model.get_submodule(name).weight
    before = scipy.linalg.polar(weight.detach().numpy())[0]
    move(model, scale=0.1)
    now = scipy.linalg.polar(weight.detach().numpy())[0]
    cosines = torch.cosine_similarity(torch.tensor(now), torch.tensor(before), dim=0)
    stats = monitor.measure(10, 1.0).layers[name]
    assert stats.basis_stability == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert monitored()[1].measure(10, 1.0).layers[name].basis_stability is None


def test_a_run_logs_how_far_bases_turn_and_its_criterion_reads_it(tmp_path):
    turning = ("monitor.bases=true", "switch/criterion=oialr", "switch.criterion.threshold=1")
    soon = ("switch.criterion.delay=0", "max_updates=10")
    run = prepare(composed(*SHORT, *turning, *soon), tmp_path)
    with run.log:
        fit(run)
    (measured,) = read_record(tmp_path).history()
    assert [measured] == run.state.history
    cosines = {name: stats.basis_stability for name, stats in measured.layers.items()}
    assert all(0.5 < cosine < 1 for cosine in cosines.values())
    (event,) = read_record(tmp_path).events("measure")
    assert {n: event[f"switch/margin/{n}"] for n in cosines} == {
        name: cosine - 1 for name, cosine in cosines.items()
    }


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_measured_as_such_and_forgotten_when_it_is_whole(value):
    model, monitor = monitored(exact=True, bases=True)
    name = "blocks.0.mlp.fc1"
    weight = model.get_submodule(name).weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = value
    lost = monitor.measure(10, 1.0)
    assert lost.not_finite == [name] and math.isnan(lost.layers[name].weight_stable_rank)
    with torch.no_grad():
        weight.copy_(whole)
    assert monitor.measure(20, 2.0).not_finite == []


@pytest.mark.usefixtures("way")
def test_a_decomposition_that_fails_gives_no_number_and_no_end(monkeypatch):
    model, monitor = monitored(exact=True, bases=True)

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    for name in ("svd", "svdvals", "eigh"):
        monkeypatch.setattr(torch.linalg, name, fail)
    assert monitor.measure(10, 1.0).not_finite == list(monitor.targets)


def p_log(p):
    return torch.tensor(p).log().numpy()


def test_a_window_is_counted_in_updates_from_its_start():
    model, monitor = monitored(window=3)
    assert [monitor.due(n) for n in range(5)] == [False, False, False, True, True]
    move(model)
    monitor.start_window(3)
    assert not monitor.due(5) and monitor.due(6)
    assert monitor.measure(6, 1.0).layers["blocks.0.attn.qkv"].update_norm == 0.0
    assert monitor.measure(6, 1.0).layers["blocks.0.attn.qkv"].update_stable_rank == 0.0


def test_the_train_loss_is_the_mean_over_the_window():
    _, monitor = monitored()
    for loss in (3.0, 2.0, 1.0):
        monitor.observe(loss)
    assert monitor.measure(3, 1.0).train_loss == 2.0
    monitor.start_window(3)
    monitor.observe(0.5)
    assert monitor.measure(4, 1.0).train_loss == 0.5


def test_gradients_are_read_as_they_are_and_absent_ones_are_nan():
    model, monitor = monitored()
    name = "blocks.0.mlp.fc1"
    assert math.isnan(monitor.measure(1, 1.0).layers[name].grad_norm)
    model.get_submodule(name).weight.grad = torch.full((128, 32), 0.5)
    assert monitor.measure(1, 1.0).layers[name].grad_norm == pytest.approx(0.5 * 64)


def test_decoupled_weight_decay_can_be_taken_out_of_the_update():
    model, monitor = monitored()
    lr, decay, steps = 0.01, 0.1, 20
    truth = torch.zeros(96, 32)
    for step in range(steps):
        drift = 0.001 * torch.randn(96, 32, generator=torch.Generator().manual_seed(step))
        truth += drift
        with torch.no_grad():
            model.get_parameter("blocks.0.attn.qkv.weight").mul_(1 - lr * decay).add_(drift)
        monitor.observe(1.0, lr * decay)
    with_decay = monitor.updates()["blocks.0.attn.qkv"]
    without = monitor.updates(without_decay=True)["blocks.0.attn.qkv"]
    error = torch.linalg.matrix_norm(without - truth)
    assert error < 0.1 * torch.linalg.matrix_norm(with_decay - truth)


def test_updates_of_bfloat16_weights_are_finite_float32():
    torch.manual_seed(0)
    model = tiny_vit().bfloat16()
    monitor = UpdateMonitor(model, find_targets(model, PATTERNS), 1)
    move(model)
    update = monitor.updates()["blocks.0.attn.qkv"]
    assert update.dtype == torch.float32 and torch.isfinite(update).all() and update.any()


def test_measuring_leaves_model_and_rng_alone():
    model, monitor = monitored()
    move(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    monitor.measure(10, 1.0)
    monitor.start_window(10)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_a_window_of_zero_updates_is_refused():
    with pytest.raises(ValueError, match="at least 1 update"):
        monitored(window=0)


def with_gradients(model):
    for p in model.parameters():
        p.grad = 0.1 * p.detach()


def three_windows(**options):
    """Measurements of three windows, of which the second has gradients."""
    model, monitor = monitored(split_qkv=True, **options)
    found = []
    for window in range(3):
        move(model, seed=window)
        if window == 1:
            with_gradients(model)
        found.append(monitor.measure(10 * window, 1.0))
        monitor.start_window(10 * window)
    return found, monitor


def rows(measured: Measurement):
    found = {}
    for name, stats in measured.layers.items():
        numbers = (stats.weight_norm, stats.update_norm, stats.grad_norm)
        found[name] = (*numbers, stats.weight_stable_rank, stats.update_stable_rank)
    return found


def assert_same_numbers(measured, expected, within):
    assert rows(measured).keys() == rows(expected).keys()
    for name, row in rows(measured).items():
        assert row == pytest.approx(rows(expected)[name], rel=within, nan_ok=True)


def test_targets_measured_together_have_the_numbers_of_targets_measured_one_by_one(monkeypatch):
    expected, one_by_one = three_windows()
    monkeypatch.setattr(monitor_module, "goes_together", lambda device: True)
    monkeypatch.setattr(batched, "LARGEST", 2 * 32 * 32)  # some stacks hold a part of one shape
    measured, monitor = three_windows()
    for now, before in zip(measured, expected, strict=True):
        assert_same_numbers(now, before, within=1e-5)
    assert monitor.initial_stable_ranks == pytest.approx(one_by_one.initial_stable_ranks, rel=1e-5)


@pytest.mark.usefixtures("together")
def test_a_measurement_that_goes_on_from_a_checkpoint_has_the_same_bits_together():
    _, monitor = three_windows()
    again = UpdateMonitor(monitor.model, monitor.targets, 10)
    again.load_state_dict(monitor.state_dict())
    move(monitor.model, seed=9)
    assert again.measure(40, 2.0) == monitor.measure(40, 2.0)


class Kernels(TorchDispatchMode):
    """Counts operators, but not those that only look at a tensor in another way."""

    VIEWS = (
        *("view", "unbind", "split", "slice", "expand", "transpose", "detach", "unsqueeze"),
        *("_unsafe_view", "select", "permute", "alias", "t."),
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.name().startswith(tuple(f"aten::{name}" for name in self.VIEWS))
        return function(*args, **(kwargs or {}))


def kernels_of_a_measurement(depth):
    model = tiny_vit(depth=depth)
    monitor = UpdateMonitor(model, find_targets(model, ALL_FOUR), 10)
    move(model)
    monitor.measure(10, 1.0)
    monitor.start_window(10)
    move(model)
    with Kernels() as kernels:
        monitor.measure(20, 2.0)
    return kernels.count


@pytest.mark.usefixtures("together")
def test_a_measurement_has_under_a_thousand_kernels_at_any_depth():
    assert kernels_of_a_measurement(2) == kernels_of_a_measurement(9) < 1000


def test_a_measurement_waits_for_the_device_once():
    with on_pretended() as mode:
        model = tiny_vit().to(DEVICE)
        monitor = UpdateMonitor(model, find_targets(model, ALL_FOUR), 10, device=DEVICE)
        for _ in range(2):
            move_there(model)
            with_gradients(model)
            mode.crossings.clear()
            monitor.measure(10, 1.0)
    waits = {name: n for name, n in mode.crossings.items() if name != "async"}
    assert waits == {"waiting": 1}


def move_there(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)


def test_ranks_share_the_targets_and_all_of_them_know_the_same_afterwards(monkeypatch):
    pair = [monitored(split_qkv=True) for _ in range(2)]
    for model, _ in pair:
        move(model)
    _, alone = monitored(split_qkv=True)
    move(alone.model)
    expected = alone.measure(10, 1.0)
    here, both_there, sent = threading.local(), threading.Barrier(2), [None, None]

    def gather(own):
        sent[here.rank] = own
        both_there.wait(timeout=20)
        return list(sent)

    def measure(number):
        here.rank = number
        return pair[number][1].measure(10, 1.0, share=True)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: here.rank)
    monkeypatch.setattr(distributed, "gather", gather)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(measure, range(2)))
    (first, *_), (second, *_) = sent
    assert len(first) == len(second) == 4 and not set(first) & set(second)
    for measured, (_, monitor) in zip(found, pair, strict=True):
        assert_same_numbers(measured, expected, within=0)
        vectors = monitor.state_dict()["vectors"]
        for key, vector in alone.state_dict()["vectors"].items():
            assert torch.equal(vectors[key], vector)


@pytest.mark.parametrize(
    "device,memory,place", [("cuda", 2**34, "cuda"), ("cuda", 2**18, "cpu"), ("cpu", 2**34, "cpu")]
)
def test_copies_of_the_weights_lie_on_a_gpu_with_room_for_them(device, memory, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    model, monitor = monitored()
    found = place_of_references(model, monitor.targets, torch.device(device))
    assert found == torch.device(place)
