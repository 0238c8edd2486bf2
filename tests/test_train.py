"""Whole runs on real digits: what they write, that they repeat, and what they say when wrong."""

import json
import math
import os
import re
import sys
import weakref
from math import prod
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from conf_yamls import composed
from runs import BY_DATE, DIGITS, SHORT as THREE_EPOCHS, TINY, history_row, wandb_records
from switchlora.cli import main
from switchlora.config import build
from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed
from switchlora.learner import Learner
from switchlora.models import eval_mode
from switchlora.run import finish, prepare
from switchlora.run.messages import never_switched_lines, not_finite_lines
from switchlora.storage import KERNEL_LIMITS, cpu_name, read_events, read_record
from switchlora.switching import changes
from switchlora.train import fit, train

SHORT = (*THREE_EPOCHS, "epochs=4")
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
GOLDEN = Path(__file__).with_name("golden_losses.json")


def make_run(folder, *overrides):
    return train(composed(*SHORT, *overrides), Path(folder))


def losses(folder):
    return [e["train/loss"] for e in read_events(folder, "train")]


def digits_model(**options):
    return build(composed(*DIGITS).model, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with everything on, and the logits of its live model before it is gone."""
    folder = tmp_path_factory.mktemp("finished")
    config = composed(
        *SHORT,
        *BY_DATE,
        "ema=0.9",
        "switch.split_qkv=true",
        "log.wandb.mode=offline",
        "log.figures=true",
    )
    run = prepare(config, folder)
    references = weakref.WeakSet(run.monitor.references.values())
    with run.log:
        fit(run)
        summary = finish(run, "finished")
    assert not references, "the monitor's reference copy outlives the full phase"
    with eval_mode(run.model), torch.no_grad():
        return folder, summary, run.model(IMAGES)


def test_the_run_switches_at_a_measurement_and_says_so_in_its_summary(finished):
    folder, summary, logits = finished
    assert summary == json.loads((folder / "summary.json").read_text()) | {
        "switch": summary["switch"]
    }
    assert summary["status"] == "finished" and summary["switch"]["fired"]
    assert summary["switch"]["num_updates"] == 30  # windows of 10, 20 updates an epoch
    assert summary["switch"]["drift"] <= 1e-5
    assert set(summary["phases"]) == {"full", "adapter"}
    adapter = summary["phases"]["adapter"]
    trained = adapter["trainable_parameters"]
    assert trained <= 0.3 * summary["phases"]["full"]["trainable_parameters"]
    assert adapter["images_per_second"] > 0 and adapter["peak_memory_bytes"] > 0
    assert summary["val"]["loss"] < math.log(10) > summary["test"]["loss"]  # better than chance
    assert summary["environment"]["versions"]["torch"]


def test_an_evaluation_right_behind_a_switch_is_the_full_phases_last(tmp_path):
    """No update was made in between, and the switch kept the function."""
    words = (*BY_DATE, "switch.criterion.epoch=1", "monitor.window=10")
    summary = make_run(tmp_path, *words)
    evals = {e["num_updates"]: e["val/top1"] for e in read_events(tmp_path, "eval")}
    at, phases = summary["switch"]["num_updates"], summary["phases"]
    assert at in evals and len(set(evals.values())) > 1
    assert phases["full"]["val_top1"] == evals[at]
    assert phases["adapter"]["val_top1"] == evals[max(evals)]


def test_metrics_tell_the_story_in_order(finished):
    folder, *_ = finished
    events = list(read_events(folder))
    counts = [e["num_updates"] for e in events]
    assert counts == sorted(counts)
    assert len(losses(folder)) == counts[-1] == 80
    measured = [e for e in events if e["event"] == "measure"]
    assert [e["num_updates"] for e in measured] == [10, 20, 30]
    for key in ("update_norm", "relative_update_norm", "weight_stable_rank", "update_stable_rank"):
        assert measured[0][f"{key}/blocks.0.attn.qkv.q"] > 0
    (switch,) = [e for e in events if e["event"] == "switch"]
    assert switch["switch/reason"] and switch["switch/rank/blocks.0.mlp.fc2"] > 0
    assert [e["event"] for e in events][-1] == "test"
    assert all("val/ema_top1" in e for e in events if e["event"] == "eval")


def test_pictures_are_drawn(finished):
    folder, *_ = finished
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"update_norms", "stable_ranks", "update_norm_map", "training"} <= names


def test_timm_loads_the_merged_file_and_gives_the_live_models_logits(finished):
    folder, _, logits = finished
    options = dict(composed(*DIGITS).model)
    name = options.pop("name")
    options.pop("_target_")
    model = timm.create_model(name, checkpoint_path=str(folder / "model.safetensors"), **options)
    assert (model.eval()(IMAGES) - logits).abs().max() <= 1e-5


def test_peft_loads_the_adapter_on_the_residual_with_our_ranks_and_the_same_logits(finished):
    from peft import PeftModel

    folder, summary, logits = finished
    base = digits_model()
    base.load_state_dict(load_file(folder / "adapter" / "residual.safetensors"))
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert (adapted(IMAGES) - logits).abs().max() <= 1e-5
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module.out_features
        for name, module in adapted.named_modules()
        if name.endswith("lora_A.default")
    }
    wanted = {}
    for name, rank in summary["switch"]["ranks"].items():
        module = name.rsplit(".", 1)[0] if name[-2:] in (".q", ".k", ".v") else name
        wanted[module] = wanted.get(module, 0) + rank
    assert ranks == wanted


def test_wandb_reads_its_own_offline_run_back(finished):
    folder, *_ = finished
    records = wandb_records(folder)
    (end,) = [r for r in records if r["type"] == "exit"]
    assert end["exit"]["exit_code"] == 0
    rows = [history_row(r) for r in records if r["type"] == "history"]
    key = "update_norm/blocks.0.mlp.fc1"
    logged = [(r["num_updates"], r[key]) for r in rows if key in r]
    assert logged == [(e["num_updates"], e[key]) for e in read_events(folder, "measure")]
    keys = {key.split(".")[0] for row in rows for key in row}
    assert {"switch/drift", "switch/ranks", "figures/update_norms", "val/top1"} <= keys


REPEATED = (
    *(*BY_DATE, "ema=0.9", "data.mixup_alpha=0.2", "data.label_smoothing=0.1"),
    "max_updates=42",
)


def test_a_run_repeats_bit_for_bit(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        make_run(folder, *REPEATED)
    assert losses(first) == losses(second) and len(losses(first)) == 42
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("train_size", [320, 352])  # 10 and 11 updates an epoch
def test_accumulation_does_not_change_when_the_switch_fires(tmp_path, train_size):
    options = (
        "switch/criterion=loss_plateau",
        "switch.criterion.tolerance=10",
        "switch.criterion.patience=1",
        "max_updates=24",
        f"data.train_size={train_size}",
    )
    fired, first_losses = [], []
    for accumulation in (1, 2, 3):
        folder = tmp_path / str(accumulation)
        summary = make_run(folder, f"full.accumulation={accumulation}", *options)
        fired.append(summary["switch"]["num_updates"])
        first_losses.append(losses(folder)[:5])
    assert fired[0] is not None and len(set(fired)) == 1
    for others in first_losses[1:]:
        assert others == pytest.approx(first_losses[0], rel=1e-4)


def test_a_number_of_one_has_its_noun_in_the_singular():
    verdict = Verdict(False, {}, "1 of the 4 windows it needs is measured")
    (line,) = never_switched_lines(verdict, 1)
    assert line.startswith("The switch never fired in 1 measurement: ")
    (line,) = never_switched_lines(verdict, 1, ["it failed"])
    assert line.endswith("undone 1 time: it failed")
    assert not_finite_lines(1, 1) == [
        "the weight average (EMA) left out 1 update",
        "1 measurement held a number that was not finite",
    ]


def test_a_run_that_never_switches_says_what_held_it_back(tmp_path, capsys):
    summary = make_run(
        tmp_path,
        "switch/criterion=update_norm",
        "switch.criterion.fraction=0.001",
        "monitor.window=epoch",
        "switch.criterion.patience=2",
    )
    said = capsys.readouterr()
    text = said.out + said.err
    assert not summary["switch"]["fired"]
    assert "The switch never fired in 4 measurements" in text
    assert "held back most by: blocks." in text


def test_lora_from_the_start_needs_no_measurement(tmp_path):
    summary = make_run(
        tmp_path,
        "switch/criterion=at_start",
        "switch/init=zero_b",
        "switch/rank=fixed",
        "switch.rank.rank=4",
        "max_updates=5",
        "full.precision=bf16",
    )
    assert summary["switch"]["num_updates"] == 0
    assert summary["num_updates"] == 5 and summary["phases"]["adapter"]["num_updates"] == 5


def test_a_failed_switch_leaves_the_run_in_the_full_phase_and_says_so(
    tmp_path, capsys, monkeypatch
):
    def fails(*_):
        raise SwitchFailed("the logits moved, more than switch.max_drift")

    monkeypatch.setattr(changes, "switch", fails)
    with pytest.raises(SwitchFailed, match="^switch failed: the logits moved.*in full to its end"):
        make_run(tmp_path, *BY_DATE)
    said = capsys.readouterr()
    assert "the switch failed and was undone, full training goes on" in said.out + said.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"].startswith("switch failed: the logits moved")
    assert not summary["switch"]["fired"] and summary["test"]["top1"] > 0
    assert "not as configured, trained in full to the end" in said.out
    assert list(read_events(tmp_path, "switch_failed"))
    assert "The criterion fired, but the switch was undone" in said.out + said.err
    assert "max_drift" in summary["switch"]["failures"][0]


def poisoned(monkeypatch, when):
    """Make the images of some updates NaN, and so their loss."""
    update = Learner.update

    def spoiled(self, images, targets, loss_fn, num_updates):
        spoiled.calls += 1
        if when(spoiled.calls):
            images = images * math.nan
        return update(self, images, targets, loss_fn, num_updates)

    spoiled.calls = 0
    monkeypatch.setattr(Learner, "update", spoiled)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_not_measured(tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda call: call in (5, 6))
    summary = make_run(tmp_path, *BY_DATE)
    assert summary["status"] == "finished"
    assert summary["skipped_updates"] == 2 and summary["num_updates"] == 78
    assert all(math.isfinite(e["train/window_loss"]) for e in read_events(tmp_path, "measure"))


def command(monkeypatch, folder, *arguments):
    words = [word for word in SHORT if word not in TINY]  # which not every model has
    monkeypatch.setattr(sys, "argv", ["switchlora", *words, f"hydra.run.dir={folder}", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return str(stop.value.code)


def test_too_many_bad_losses_stop_the_run_with_one_line_and_keep_everything(tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda call: call > 45)
    said = command(monkeypatch, tmp_path, "log.figures=true", "log.wandb.mode=offline")
    assert "not finite in 6 updates in a row after update 45" in said and "\n" not in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"].startswith("stopped: loss or gradient was not finite")
    assert summary["num_updates"] == 45 and len(losses(tmp_path)) == 45
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    assert (tmp_path / "figures" / "training.png").exists()
    assert summary["phases"]["full"]["num_updates"] == 45
    (end,) = [r for r in wandb_records(tmp_path) if r["type"] == "exit"]
    assert end["exit"]["exit_code"] == 1


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["model=timm", "model.name=vit_tiny_patch16_24"], "unknown model.*vit_tiny_patch16_224"),
        (["+model.hidden_size=3"], "refuses its options.*hidden_size"),
        (["data=imagenett"], "data=imagenett: choose one of .*imagenet"),
        (["switch.criteria=3"], "there is no key 'switch.criteria'; near names"),
        (
            ["switch.targets=[attn.qvk]"],
            "'attn.qvk' matches no linear layer; near names: attn.qkv",
        ),
        (["switch.keep=[hed]"], "switch.keep 'hed' matches no parameter; near names: .*head"),
        (
            ["switch/rank=fixed", "switch.rank.rank=65"],
            "switch.rank.rank=65 does not fit blocks.0.attn.qkv",
        ),
        (["switch.rank.share=0.01"], "switch.rank.share=0.01 is too small"),
        (["monitor.window=81"], "window of 81 updates is longer than the run, which has 80"),
        (["epochs=0"], "epochs is 0: give a whole number of at least 1"),
        (
            ["switch/init=pissa"],
            "switch/init=pissa: choose one of .*weight_svd",
        ),
        (["data.batch_size=100000"], "data.batch_size=100000"),
        (
            ["switch/criterion=prelora", "switch.criterion.signal=x"],
            "switch.criterion.signal is 'x'",
        ),
        (["system.device=gpu"], "device 'gpu' cannot be used"),
        (["monitor.device=gpu"], "device 'gpu' cannot be used"),
        (["switch.targets=['attn.(qkv']"], "'attn.\\(qkv' is no regular expression"),
        (["model=bytes"], "model.context: .*'data.context' not found; choose .* model=bytes with"),
        (["model=vit_tiny_patch16_224"], "the model cannot take|patches of 16 do not"),
        (["switch.rank=8"], "switch.rank is a group: write switch/rank=CHOICE"),
        (["switch/criterion=at_start"], "use switch/rank=fixed"),
        (["switch/criterion=at_start", "switch/rank=fixed"], "use switch/init=zero_b"),
        (["switch/rank=prelora", "switch.rank.mode=x"], "switch.rank.mode is 'x': choose"),
        (["switch/rank=stable_rank", "switch.rank.of=x"], "switch.rank.of is 'x'"),
    ],
)
def test_a_users_mistake_gets_one_line(tmp_path, monkeypatch, arguments, words):
    said = command(monkeypatch, tmp_path / "run", *arguments)
    assert re.search(words, said), said
    assert said.startswith("switchlora: ") and "\n" not in said


def test_the_default_window_shrinks_to_a_run_that_is_shorter(tmp_path, capsys):
    words = ("model.depth=1", "epochs=2", "switch/criterion=never")
    assert train(composed(*DIGITS, *words), tmp_path)["status"] == "finished"
    shown = capsys.readouterr().out
    assert "monitor.window: 4 updates, a tenth of the run, which has fewer than 100" in shown
    measured = [event["num_updates"] for event in read_events(tmp_path, "measure")]
    assert measured == list(range(4, 41, 4))


def test_an_unwritable_folder_gets_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    said = command(monkeypatch, tmp_path / "file" / "run")
    assert "Not a directory" in said and "\n" not in said


def test_a_folder_that_holds_a_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("kept")
    assert "already holds a run" in command(monkeypatch, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def kernels_here():
    """What the last bits of a loss hang on: processor, kernels and their limits, threads."""
    return {
        "processor": cpu_name().split(" x ")[-1],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "limits": {key: os.environ[key] for key in KERNEL_LIMITS if key in os.environ},
        "threads": torch.get_num_threads(),
    }


def test_golden_losses_have_not_moved(tmp_path):
    """Bit for bit with the kernels of a recording; with others, the full phase to rounding.

    After a change that is meant to move them: delete the file, run this test on each machine that
    you have, commit both. With kernels that no recording knows, it adds one when SWITCHLORA_GOLDEN
    is set to 'record'.
    """
    recorded = ("model.depth=3", "model.embed_dim=64", "data.train_size=null")
    recorded += ("data.batch_size=64",)
    recorded += ("switch/init=update_svd", "switch.rank.share=0.1")
    recorded += ("adapter.factor_lr=3", "adapter.rewarmup_updates=0")
    make_run(tmp_path, *BY_DATE, *recorded)
    versions = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}
    found = {"versions": versions, **kernels_here(), "losses": [x.hex() for x in losses(tmp_path)]}
    recordings = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
    where = {key: found[key] for key in found if key != "losses"}
    exact = [each for each in recordings if where.items() <= each.items()]
    if not recordings or (not exact and os.environ.get("SWITCHLORA_GOLDEN") == "record"):
        GOLDEN.write_text(json.dumps([*recordings, found], indent=1) + "\n")
    assert all(each["losses"] == found["losses"] for each in exact)
    alike = [each for each in recordings if each["versions"] == versions]
    if recordings and not alike:
        pytest.skip(f"recorded with {recordings[0]['versions']}: initial weights may differ")
    for each in alike:
        full = [[float.fromhex(x) for x in run["losses"][:30]] for run in (found, each)]
        assert full[0] == pytest.approx(full[1], rel=2e-3)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("switch.rank.share=0.15", "switch.train_factors=[A,B]"), True),
        (("switch.rank.share=0.4",), False),
        (("switch.rank.share=0.4", "switch.rank.captured=0.7"), False),
        (("switch.rank.share=0.4", "switch/init=zero_b"), False),
        (("switch/rank=fixed", "switch.rank.rank=1"), False),
    ],
)
def test_adapters_that_hold_little_of_the_update_are_told_where_the_budget_chose(
    tmp_path, capsys, overrides, told
):
    make_run(tmp_path, "switch/rank=budget", *BY_DATE, *overrides)
    report = read_record(tmp_path).result["switch"]
    held = {n: e for n, e in report["captured_energy"].items() if report["ranks"][n]}
    least = min(held, key=held.__getitem__)
    thin = sum(energy < 0.9 for energy in held.values())
    line = f"{thin} of {len(held)} adapters hold less than 0.9 of the recent update ({least}: "
    assert (f"{line}{held[least]:.2f})" in capsys.readouterr().out) == told
    assert not told or thin


def test_the_switch_tells_how_much_faster_updates_should_be_and_warns_where_they_are_not(
    tmp_path, capsys
):
    fit(prepare(composed(*SHORT, *BY_DATE, "log.cost_model=true", "epochs=2"), tmp_path))
    (event,) = [e for e in read_events(tmp_path) if e["event"] == "switch"]
    parts = [event[f"speedup/{part}"] for part in ("arithmetic", "optimizer", "communication")]
    assert parts[2] == 1.0 and all(0.2 < part < 5 for part in parts)
    said = capsys.readouterr().out
    assert "predicted speed of an update" in said
    assert ("the adapter phase will not be faster" in said) == (prod(parts) <= 1 / 0.98)
