"""Riemannian preconditioned LoRA: its gradients, its fast descent, a run that goes on."""

import pytest
import torch
from torch import nn

from conf_yamls import composed
from runs import assert_same_run, make_run, make_run_in_parts
from switchlora.adapters import Adapter
from switchlora.learner import Riemannian
from switchlora.learner.riemannian import scale_gradients

OUT, IN, RANK = 12, 20, 3


def pair(seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, IN, generator=generator, dtype=torch.float64)
    B = size * torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
    return Adapter(nn.Parameter(A), nn.Parameter(B), slice(0, OUT), 1.0)


def test_each_gradient_is_divided_by_the_gram_matrix_of_the_other_factor():
    adapter = pair()
    A, B = adapter.A.detach(), adapter.B.detach()
    g_A, g_B = torch.ones_like(A), torch.ones_like(B)
    adapter.A.grad, adapter.B.grad = g_A.clone(), g_B.clone()
    scale_gradients([adapter], damping=0.1)
    damped = 0.1 * torch.eye(RANK, dtype=torch.float64)
    assert torch.allclose(adapter.A.grad, torch.inverse(B.T @ B + damped) @ g_A)
    assert torch.allclose(adapter.B.grad, g_B @ torch.inverse(A @ A.T + damped))


def test_a_zero_factor_gives_finite_gradients():
    adapter = pair(size=0.0)
    adapter.A.grad = torch.zeros_like(adapter.A)
    adapter.B.grad = torch.ones_like(adapter.B)
    scale_gradients([adapter], Riemannian().damping)
    assert not adapter.A.grad.any() and adapter.B.grad.isfinite().all()


@pytest.mark.parametrize("scaled", [True, False])
def test_gradient_descent_from_unbalanced_factors_is_fast_with_it_and_stuck_without(scaled):
    adapter, goal = pair(size=100.0), pair(seed=1)
    target = (goal.B @ goal.A).detach()
    optimizer = torch.optim.SGD([adapter.A, adapter.B], lr=0.4 if scaled else 1e-6)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (adapter.B @ adapter.A - target).square().sum() / 2
        loss.backward()
        losses.append(loss.item())
        if scaled:
            scale_gradients([adapter], 1e-6)
        optimizer.step()
    assert (losses[-1] < 1e-6 * losses[0]) == scaled


def test_a_damping_of_zero_is_refused():
    with pytest.raises(ValueError, match="refactoring.damping is 0: give a number above 0"):
        Riemannian(0)
    assert composed("+method=riemannian").adapter.refactoring.damping == 1e-6


def test_a_run_with_it_goes_on_bit_for_bit(tmp_path, at_update):
    words = (
        *("+method=riemannian", "switch.rank.rank=2", "data.train_size=320", "max_updates=11"),
        *("full.scheduler.warmup_t=5", "monitor.window=5", "full.precision=bf16"),
    )
    make_run(tmp_path / "whole", *words)
    make_run_in_parts(tmp_path / "again", at_update, [8], *words)
    assert_same_run(tmp_path / "whole", tmp_path / "again")
