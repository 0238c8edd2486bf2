"""The memory proof: what the table shows is what is held, and what was predicted."""

import copy
import gc
from contextlib import redirect_stdout
from io import StringIO
from itertools import takewhile

import pytest
import torch
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from runs import SHORT, make_run
from switchlora.cost import trace_batch
from switchlora.learner import SavedTensors, build_learner, held_bytes
from switchlora.run import MEMORY_PARTS, Phase, predict_memory, prepare
from switchlora.storage import read_events
from switchlora.train import fit

PHASES = (Phase.FULL, Phase.ADAPTER)
EARLY = ("switch/criterion=at_epoch", "switch.criterion.epoch=0.1", "monitor.window=2")
EARLY += ("log.cost_model=true",)
"""the switch comes after 2 updates"""
KINDS = {
    "plain": ("ema=0.9", "switch.moments=factors"),
    "bf16": (
        "recipe@full=sgd",
        "full.precision=bf16",
        "full.accumulation=2",
        "full.activation_checkpointing=gelu",
        "ema=0.9",
    ),
    "quantised": ("switch.residual_dtype=nf4", "ema=0.9"),
    "lean": (
        "full.activation_checkpointing=blocks",
        "full.precision=bf16",
        "switch.residual_dtype=bf16",
        "switch/init=update_svd",
        "switch.max_drift=0.1",
        "switch.train_factors=[B]",
        "switch.split_qkv=true",
        "ema=0.9",
    ),
}
LOSS = nn.CrossEntropyLoss()


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    """Folder, summary and words of a run with two updates in each phase."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.setattr("switchlora.run.transitions.predicted_update", lambda run: None)
        summary = make_run(folder, *EARLY, *KINDS[request.param], "max_updates=4")
    return folder, summary, said.getvalue()


def memory_of(summary, phase):
    """Measured and predicted bytes."""
    memory = summary["phases"][phase]["memory"]
    return memory["measured"], memory["predicted"]


def prepared(folder, *overrides):
    return prepare(composed(*SHORT, *EARLY, *overrides), folder)


@pytest.mark.parametrize("phase", PHASES)
def test_every_part_is_held_as_predicted(finished, phase):
    measured, predicted = memory_of(finished[1], phase)
    assert set(measured) == set(predicted) == set(MEMORY_PARTS)
    for part, size in measured.items():
        close = 0.02 if part in ("activations", "total") else 0.01
        assert size == pytest.approx(predicted[part], rel=close), part
    assert measured["activations"] > 0 and measured["ema"] > 0
    assert (measured["monitor_reference"] > 0) == (phase is Phase.FULL)


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_and_moments_are_those_of_the_trained_tensors_and_of_no_others(finished, phase):
    folder, summary, _ = finished
    measured, _ = memory_of(summary, phase)
    trained = 4 * summary["phases"][phase]["trainable_parameters"]
    assert measured["gradients"] == trained and measured["ddp_buckets"] == 0
    moments = 1 if "torch.optim.SGD" in (folder / "config.yaml").read_text() else 2
    assert measured["optimizer_state"] == pytest.approx(moments * trained, rel=0.01)


def test_the_event_of_each_phase_says_what_the_summary_says(finished):
    folder, summary, _ = finished
    events = list(read_events(folder, "memory"))
    assert [event["num_updates"] for event in events] == [1, 3]
    for event, phase in zip(events, PHASES, strict=True):
        measured, predicted = memory_of(summary, phase)
        assert {part: event[f"memory/{part}"] for part in MEMORY_PARTS} == measured
        assert {part: event[f"memory/{part}_predicted"] for part in MEMORY_PARTS} == predicted


def cells_of(said):
    """Cells of the only memory table by the label of their row."""
    before, after = said.split("  memory, MiB")
    assert "SWITCH at" in before and "monitor took" not in before
    lines = list(takewhile(lambda line: "total on" not in line, after.splitlines()[1:]))
    lines.append(after.splitlines()[1 + len(lines)])
    return {line[2:26].strip(): line[26:].split() for line in lines}


def test_one_table_with_both_phases_comes_with_the_first_adapter_update(finished):
    _, summary, said = finished
    (full, _), (adapter, _) = (memory_of(summary, phase) for phase in PHASES)
    cells = cells_of(said)
    assert list(cells)[-1] == "total on cpu" and cells["monitor reference (cpu)"][2] == "0.00"
    moments = [found["optimizer_state"] / 2**20 for found in (full, adapter)]
    shown = [float(cells["optimizer state"][column]) for column in (0, 2, 4)]
    assert shown == pytest.approx([*moments, moments[1] / moments[0]], abs=0.006)


def test_a_run_does_not_switch_after_its_last_update(tmp_path):
    summary = make_run(tmp_path, *EARLY, "max_updates=2")
    assert not summary["switch"]["fired"] and set(summary["phases"]) == {"full"}


def alive():
    """Storages of all tensors that Python knows, by identity."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    return {id(storage): storage for storage in (x.untyped_storage() for x in tensors)}


def test_nothing_stays_alive_that_the_table_does_not_show(tmp_path):
    before = alive()
    run = prepared(tmp_path, "model.embed_dim=64", "ema=0.9", "max_updates=4", "checkpoint.keep=0")
    views = [vars(loader.dataset) for loader in (run.data.train, run.data.val, run.data.test)]
    kept = [x for view in views for x in view.values() if torch.is_tensor(x)]
    images = held_bytes([*kept, *(view["names"].rows for view in views)])
    with run.log:
        fit(run)
    found = alive()
    shown = run.ledger.memory[Phase.ADAPTER]["measured"]
    held = sum(found[key].nbytes() for key in found.keys() - before.keys()) - images
    assert held == pytest.approx(shown["total"] - shown["activations"], rel=0.01)


def test_the_prediction_is_that_of_the_cost_models_trace_and_moves_no_generator(tmp_path):
    run = prepared(tmp_path, "+model.drop_path_rate=0.3")
    random = torch.get_rng_state()
    predicted = predict_memory(run)
    assert torch.equal(random, torch.get_rng_state())
    traced = trace_batch(run.model, run.recipe, *run.data.example(32), run.data.loss).memory
    assert {part: predicted[part] for part in traced} == traced
    assert all(p.grad is None and p.device.type == "cpu" for p in run.model.parameters())


def test_code_that_needs_numbers_leaves_a_dash_and_a_line_and_ends_no_run(tmp_path, capsys):
    run = prepared(tmp_path, "max_updates=1")
    run.model.register_forward_pre_hook(lambda _, inputs: print(float(inputs[0].sum())))
    with run.log:
        fit(run)
    found = run.ledger.memory[Phase.FULL]
    assert found["predicted"]["activations"] is found["predicted"]["total"] is None
    assert found["predicted"]["optimizer_state"] > 0 and found["measured"]["total"] > 0
    assert "the bytes of activations cannot be predicted" in capsys.readouterr().out


@pytest.fixture
def learner():
    """Of the tiny ViT."""
    torch.manual_seed(0)

    def make(*overrides):
        config = composed(*overrides)
        return build_learner(copy.deepcopy(model), build(config.full), 10)

    model = tiny_vit()
    return make


def test_watching_what_autograd_keeps_changes_no_bit(learner, images):
    watched, unwatched = learner("full.precision=bf16"), learner("full.precision=bf16")
    unwatched.activation_bytes = 0
    labels = torch.arange(8) % 5
    found = [each.update(images, labels, LOSS, 50) for each in (watched, unwatched)]
    assert found[0] == found[1] and watched.activation_bytes > 0
    pairs = zip(watched.model.parameters(), unwatched.model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) and torch.equal(a, b) for a, b in pairs)


def test_what_compiled_graphs_keep_is_not_told(learner, images):
    compiled = learner("full.compile={backend:eager}")
    compiled.update(images, torch.arange(8) % 5, LOSS, 0)
    assert compiled.activation_bytes is None


def test_autograd_keeps_inputs_and_what_gelu_and_relu_need_each_once():
    model = nn.Sequential(nn.Linear(3, 50), nn.GELU(), nn.Linear(50, 20), nn.ReLU())
    saved = SavedTensors()
    with saved:
        outputs = model(torch.ones(7, 3)).view(-1)
    assert saved.bytes_beside(model) == 4 * 7 * (3 + 50 + 50 + 20)
    outputs.sum().backward()
    del outputs
    assert saved.bytes_beside(model) == 0
