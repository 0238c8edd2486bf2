"""Counted work: what runs is what the shapes say."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf_yamls import composed
from runs import BY_DATE, SHORT
from switchlora.cost import trace_batch
from switchlora.learner import FlopCounter
from switchlora.run import Phase, prepare
from switchlora.train import fit


def test_a_product_costs_two_flops_a_multiply_add_forward_and_backward():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with FlopCounter() as ours, FlopCounterMode(display=False) as torchs:
        (a @ b).sum().backward()
    assert ours.total == torchs.get_total_flops() == 3 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_counts_the_work_of_an_update_in_each_phase(accumulation, tmp_path):
    words = ("max_updates=32", "+model.drop_path_rate=0.1", f"full.accumulation={accumulation}")
    run = prepare(composed(*SHORT, *BY_DATE, *words), tmp_path)
    batch = *run.data.example(run.share), run.data.loss
    full = trace_batch(run.model, run.recipe, *batch)
    with run.log:
        fit(run)
    adapter = trace_batch(run.model, run.recipe, *batch)
    for phase, trace in ((Phase.FULL, full), (Phase.ADAPTER, adapter)):
        expected = sum(operation.flops for operation in trace.operations)
        assert run.ledger.flops[phase] == expected > 0
    assert run.ledger.flops[Phase.ADAPTER] < run.ledger.flops[Phase.FULL]
