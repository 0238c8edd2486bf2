"""Bytes of text: windows, a causal model, and runs that switch, resume and know their cost."""

import inspect
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conf_yamls import build, composed
from runs import assert_same_run
from switchlora.data import build_text, contents_of, shared_items
from switchlora.errors import Interrupted
from switchlora.learner import evaluate
from switchlora.models import CausalTransformer
from switchlora.run import prepare, save
from switchlora.storage import read_record
from switchlora.train import train

TINY = (
    *("model=bytes", "model.embed_dim=16", "model.num_heads=2", "model.depth=2"),
    *("data=bytes", "data.context=16", "data.batch_size=8", "data.train_size=80"),
    *("data.val_fraction=0.002", "data.test_fraction=0.002"),
    *("epochs=2", "monitor.window=5", "full.scheduler.warmup_t=2", "log=quiet"),
    *("switch/criterion=at_epoch", "switch.criterion.epoch=1", "switch/rank=fixed"),
    *("switch.rank.rank=2", "log.every=1", "log.figures=false"),
)


@pytest.fixture
def text(tmp_path):
    """A file of 1,000 bytes that count up, and options for its windows."""
    (tmp_path / "text").write_bytes(bytes(i % 251 for i in range(1000)))
    return {"path": str(tmp_path / "text"), "context": 10, "batch_size": 8}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CausalTransformer(context=12, embed_dim=16, depth=2, num_heads=2)


def rows_of(loader):
    return torch.cat([inputs[:, 0] for inputs, _ in loader]).tolist()


def test_a_target_is_the_byte_after_its_input_and_pieces_do_not_overlap(text):
    data = build_text(**text, seed=1)
    for loader in (data.train, data.val, data.test):
        for inputs, targets in loader:
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape[1] == 10
            assert torch.equal(targets[:, :-1], inputs[:, 1:])
            assert torch.equal(targets, (inputs + 1) % 251)
    seen = sorted(rows_of(data.train) + rows_of(data.val) + rows_of(data.test))
    first = [start % 251 for start in (*range(0, 790, 10), *range(800, 890, 10))]
    assert set(seen) <= {*first, *(start % 251 for start in range(900, 990, 10))}
    assert [len(loader.dataset) for loader in (data.train, data.val, data.test)] == [79, 9, 9]


def test_an_epoch_has_its_own_order_and_goes_on_in_its_middle(text):
    data = build_text(**text, seed=1)
    first = rows_of(data.train)
    data.set_epoch(1)
    second = rows_of(data.train)
    data.set_epoch(1, start=4)
    assert first != second and rows_of(data.train) == second[32:]


def test_ranks_share_the_windows_of_each_batch(text):
    alone = build_text(**text, seed=1)
    ranks = [build_text(**text, seed=1, rank=r, world_size=2) for r in (0, 1)]
    for whole, *parts in zip(alone.train, *(data.train for data in ranks), strict=True):
        assert torch.equal(whole[0], torch.cat([inputs for inputs, _ in parts]))
    shared = sorted(rows_of(ranks[0].val) + rows_of(ranks[1].val))
    assert shared == sorted(rows_of(alone.val))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"context": 100}, "context=100 leaves no window"),
        ({"batch_size": 80}, "batch_size=80 .* 79 training windows"),
        ({"train_size": 80}, "train_size=80, but the text has 79 windows"),
        ({"val_fraction": 0.9}, "leave something to train on"),
    ],
)
def test_a_text_that_is_too_short_is_one_clear_line(text, options, says):
    with pytest.raises(ValueError, match=says):
        build_text(**{**text, **options})


def test_the_yaml_has_every_option_and_its_text_is_english():
    config = composed("data=bytes").data
    options = set(inspect.signature(build_text).parameters)
    assert options - set(config) == {"seed", "workers", "pin_memory", "rank", "world_size"}
    inputs, _ = next(iter(build(config).val))
    assert inputs.shape == (config.batch_size, config.context)
    assert " the " in bytes(inputs.flatten().tolist()).decode(errors="replace")


def test_no_passage_of_the_default_text_is_in_two_splits():
    data = build(composed("data=bytes").data)
    assert [len(each.pairs) for each in shared_items(contents_of(data))] == [0, 0, 0]
    assert len(data.train.dataset) > 2000


def test_a_prediction_depends_on_what_came_before_and_on_nothing_after(model):
    tokens = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before - after).abs().amax((0, 2))[7:] > 1e-6).all()
    assert torch.allclose(model(tokens[:, :5]), before[:, :5], atol=1e-6)


def test_checkpointed_blocks_have_the_same_gradients(model):
    tokens = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(1))

    def gradients(checkpointing):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        return [p.grad for p in model.parameters()]

    pairs = zip(gradients(False), gradients(True), strict=True)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in pairs)


def test_evaluation_counts_every_token_once(model, text):
    data = build_text(**text)
    found = evaluate(model, data.val)
    inputs, targets = (torch.cat(parts) for parts in zip(*data.val, strict=True))
    with torch.no_grad():
        logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    hits = (logits.argmax(-1) == targets).float().mean()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * hits.item(), rel=1e-5)
    assert data.loss(logits, targets).item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_new_model_knows_nothing_of_bytes(model, text):
    found = evaluate(model, build_text(**text).val)
    assert found["loss"] == pytest.approx(math.log(256), rel=0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run over text that switches after one of its two epochs."""
    folder = tmp_path_factory.mktemp("text")
    return folder, train(composed(*TINY, "log.cost_model=true"), folder)


def test_a_run_over_text_switches_and_knows_its_memory_and_its_work(whole):
    folder, summary = whole
    assert summary["switch"]["fired"] and summary["switch"]["drift"] < 1e-5
    for phase in ("full", "adapter"):
        memory = summary["phases"][phase]["memory"]
        for part in ("activations", "gradients", "optimizer_state"):
            assert memory["measured"][part] == pytest.approx(memory["predicted"][part], rel=0.02)
    assert summary["cost"]["train_flops"] > 0 and summary["val"]["loss"] < math.log(256)
    losses = [event["train/loss"] for event in read_record(folder).events("train")]
    assert losses[-1] < losses[0]


def test_its_merged_weights_fit_the_plain_model(whole):
    folder, _ = whole
    plain = build(composed(*TINY).model)
    plain.load_state_dict(load_file(folder / "model.safetensors"))


def test_a_text_that_cannot_be_read_is_told_with_its_key(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=f"data.path={path} cannot be read .*give a file"):
            build_text(path=str(path), context=10, batch_size=8)


def test_a_text_that_has_changed_is_noticed_by_a_resume(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(i % 251 for i in range(20_000)))
    words = (*TINY, f"data.path={text}", "data.val_fraction=0.1", "data.test_fraction=0.1")
    words = (*words, "max_updates=10")
    run = prepare(composed(*words), tmp_path / "run")
    with run.log:
        save(run)
    prepare(composed(*words, "resume=auto"), tmp_path / "run")
    text.write_bytes(b"\1" + text.read_bytes()[1:])
    with pytest.raises(ValueError, match="changed since .*update-00000000.*then, .* now"):
        prepare(composed(*words, "resume=auto"), tmp_path / "run")
    branch = prepare(composed(*words, f"resume={tmp_path}/run"), tmp_path / "branch")
    assert branch.state.num_updates == 0


def test_a_run_over_text_goes_on_where_it_was_cut(whole, tmp_path, at_update):
    def kill(inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return inputs

    at_update(13, kill)
    with pytest.raises(Interrupted, match="SIGTERM after update 13"):
        train(composed(*TINY, "log.cost_model=true"), tmp_path)
    at_update(None, None)
    train(composed(*TINY, "log.cost_model=true", "resume=auto"), tmp_path)
    assert_same_run(whole[0], tmp_path)
