"""``scripts/edge.py`` tells how near the edge of stability a switch is."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import edge

from runs import BY_DATE, make_run
from switchlora.storage import find_all
from switchlora.storage.retention import name_of

AT = 30
"""update of the switch"""
LEAVING_CHECKPOINTS = (*BY_DATE, f"max_updates={AT + 1}", "checkpoint.keep=9")


def test_the_largest_eigenvalue_is_that_of_the_hessian_in_the_metric_of_the_steps():
    torch.manual_seed(0)
    root, steps = torch.randn(30, 30), torch.rand(30) + 0.1
    hessian = root @ root.T - 5 * torch.eye(30)
    at = {"a": torch.randn(4, 5, requires_grad=True), "b": torch.randn(10, requires_grad=True)}

    def loss(tensors):
        flat = torch.cat([each.flatten() for each in tensors.values()])
        return flat @ hessian @ flat / 2

    found = edge.largest_eigenvalue(loss, at, {"a": steps[:20].view(4, 5), "b": steps[20:]})
    scaled = steps.sqrt()[:, None] * hessian * steps.sqrt()
    assert found == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]), rel=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("edge")
    make_run(place, *LEAVING_CHECKPOINTS, "switch.keep=[]")
    return place


def before_the_switch(run):
    return next(path for path in find_all(run) if path.name == name_of(AT))


@pytest.mark.parametrize("words", [["switch.split_qkv=true"], ["switch/init=zero_b"]])
def test_slices_and_factors_that_do_not_move_yet_are_measured_too(tmp_path, words):
    make_run(tmp_path / "run", *LEAVING_CHECKPOINTS, *words)
    resumed = [f"resume={before_the_switch(tmp_path / 'run')}"]
    found = edge.measure(edge.changed_config(tmp_path / "run", resumed), tmp_path)
    assert 0.1 < found["adapter"] / found["full"] < 10


@pytest.mark.parametrize("name, told", [("none", "none/config.yaml"), ("", "no checkpoint")])
def test_a_mistake_is_one_line(folder, monkeypatch, name, told):
    monkeypatch.setattr(sys, "argv", ["edge.py", str(folder / name), "7"])
    with pytest.raises(SystemExit, match=rf"^edge: [^\n]*{told}[^\n]*$"):
        edge.main()


def test_steps_of_the_factors_twice_as_large_are_twice_as_near_the_edge(folder, tmp_path):
    before = before_the_switch(folder)
    found = []
    for step in ("1", "2"):
        words = [f"resume={before}", f"adapter.matched_step={step}"]
        found.append(edge.measure(edge.changed_config(folder, words), tmp_path / step))
    one, two = found
    assert one["lr"] == two["lr"] > 0
    assert one["full"] == two["full"] > 0
    assert two["factor_lr"] == pytest.approx(2 * one["factor_lr"], rel=0.01)
    assert two["adapter"] == pytest.approx(2 * one["adapter"], rel=0.1)
