"""The switch on two real gloo processes: a plain loop, Accelerate, Lightning."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

import loop_ranks  # noqa: E402
from conftest import tiny_vit  # noqa: E402
from starts import Started, torchrun  # noqa: E402
from switchlora.adapters import adapted_modules, merged_state_dict  # noqa: E402
from switchlora.integrations.transformers import LowRankSwitchCallback  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder with what two processes found, and their weights."""
    folder = tmp_path_factory.mktemp("pair")
    with Started(f"{folder}.said", torchrun, 2, loop_ranks.all_loops, str(folder)) as started:
        done = started.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def alone():
    """The same loop on one process with whole batches."""
    return loop_ranks.accelerated()


@pytest.mark.parametrize("loop", ["plain_loop", "accelerated", "in_lightning"])
def test_two_processes_switch_together_and_train_what_one_trains_with_whole_batches(
    pair, alone, loop
):
    facts = json.loads((pair / f"{loop}.json").read_text())
    assert facts["agree"] and facts["spread"] == 0
    assert facts["switched_at"] == alone.switched_at == 12 and facts["num_updates"] == 24
    assert facts["ranks"] == list(alone.ranks.values()) and len(adapted_modules(alone.model)) == 8
    losses = [loss for _, loss in facts["history"]]
    assert losses == pytest.approx([m.train_loss for m in alone.history], rel=1e-4)
    weights = torch.load(pair / f"{loop}.pt", weights_only=True)
    torch.testing.assert_close(weights, merged_state_dict(alone.model), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("loop", ["in_stages", "changing_again"])
def test_two_processes_change_the_model_again_together(pair, loop):
    alone = getattr(loop_ranks, loop)()
    facts = json.loads((pair / f"{loop}.json").read_text())
    assert facts["agree"] and facts["spread"] == 0
    assert facts["ranks"] == list(alone.ranks.values()) and len(alone.ranks) == 8
    weights = torch.load(pair / f"{loop}.pt", weights_only=True)
    torch.testing.assert_close(weights, merged_state_dict(alone.model), rtol=1e-3, atol=2e-5)


def test_ranks_of_adapters_grow_alike_on_two_processes(pair):
    facts = json.loads((pair / "growing.json").read_text())
    assert facts["agree"] and facts["spread"] == 0
    assert max(facts["ranks"]) > 4 <= min(facts["ranks"])


def test_micro_batches_under_accelerate_are_not_updates(alone):
    switch = loop_ranks.accelerated(accumulate=2)
    assert switch.switched_at == 12 and switch.num_updates == 24
    ours, theirs = merged_state_dict(switch.model), merged_state_dict(alone.model)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("update", [8, 18])
def test_accelerate_resumes_before_and_after_the_switch(alone, update, tmp_path):
    loop_ranks.accelerated(until=update, keep=tmp_path)
    again = loop_ranks.accelerated(resume=tmp_path)
    assert again.switched_at == 12 and again.num_updates == 24
    ours, theirs = again.model.state_dict(), alone.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_accelerate_trained_merges_and_loads_elsewhere():
    switch = loop_ranks.accelerated(until=14)
    images, _ = loop_ranks.batch(99)
    expected = switch.model.eval()(images)
    plain = tiny_vit().eval()
    plain.load_state_dict(switch.merge_and_unload().state_dict())
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=1e-5)


def test_the_trainer_of_transformers_refuses_several_processes():
    arguments = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="works in one process"):
        LowRankSwitchCallback().on_train_begin(arguments, None, None)
