"""LoRA-RITE by its equations, the same for every split of B A; whole runs with it."""

import pytest
import torch
from torch import nn

from conf_yamls import build, composed
from pretended import DEVICE, on_pretended
from runs import assert_same_but_for_memory, assert_same_run, make_run, make_run_in_parts
from switchlora.adapters import Adapter
from switchlora.learner import LoRARite
from switchlora.learner.parts import FACTORS
from switchlora.learner.recipe import check_goes_with_fsdp
from switchlora.storage import read_events

OUT, IN, RANK, SCALING, LR = 12, 20, 3, 2.0, 1e-2
WORDS = (
    *("+method=lora_rite", "switch.rank.rank=2", "data.train_size=320", "max_updates=11"),
    *("full.scheduler.warmup_t=5", "monitor.window=5"),
)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def trained(A, B, updates=4, size=0.02):
    """Factors after some updates, each with another gradient of the product; the products."""
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    optimizer = LoRARite([{"params": [A, B], "part": FACTORS}], lr=LR)
    optimizer.pair([Adapter(A, B, slice(0, OUT), SCALING)])
    products = []
    for number in range(updates):
        G = size * drawn(OUT, IN, seed=number)
        A.grad, B.grad = SCALING * B.detach().T @ G, SCALING * G @ A.detach().T
        optimizer.step()
        products.append((B @ A).detach())
    return A.detach(), B.detach(), products


def reference(A, B, updates=4, size=0.02):
    """The authors' code in few lines."""
    moments = {}
    for number in range(updates):
        G = size * drawn(OUT, IN, seed=number)
        (QA, RA), (QB, RB) = torch.linalg.qr(A.T), torch.linalg.qr(B)
        of_A, of_B = SCALING * G.T @ B @ RB.inverse(), SCALING * G @ A.T @ RA.inverse()
        norm = (of_A.square().sum() + of_B.square().sum()).sqrt()
        steps = []
        for key, U, Q, R in (("A", of_A, QB, RB), ("B", of_B, QA, RA)):
            U = U / max(norm, 1.0)
            M, V, old = moments.get(key, (torch.zeros_like(U), torch.zeros_like(R), Q))
            b1, b2 = (b * (1 - b**number) / (1 - b ** (number + 1)) for b in (0.9, 0.999))
            P = Q.T @ old
            V = b2 * P @ V @ P.T + (1 - b2) * U.T @ U / len(U)
            values, vectors = torch.linalg.eigh(V)
            root = vectors @ torch.diag(1 / (values.sqrt() + 1e-6)) @ vectors.T
            M = b1 * M @ P.T + (1 - b1) * U @ root
            moments[key] = (M, V, Q)
            steps.append(M @ R.inverse().T)
        A, B = A - LR * steps[0].T, B - LR * steps[1]
    return A, B


@pytest.mark.parametrize("size", [0.002, 0.2], ids=["small", "clipped"])
def test_factors_move_as_the_equations_say(size):
    A, B = drawn(RANK, IN, seed=7), drawn(OUT, RANK, seed=8)
    found = trained(A, B, size=size)
    for mine, theirs in zip(found, reference(A, B, size=size), strict=False):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)


def test_the_product_moves_alike_however_it_is_split():
    A, B, new = drawn(RANK, IN, seed=7), drawn(OUT, RANK, seed=8), drawn(RANK, RANK, seed=9)
    *_, one = trained(A, B)
    *_, other = trained(new @ A, B @ new.inverse())
    for mine, theirs in zip(one, other, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-8)


def test_a_gradient_of_more_than_one_is_left_out_and_A_waits_for_B():
    A = drawn(RANK, IN, seed=7)
    left, B, _ = trained(A, torch.zeros(OUT, RANK, dtype=torch.float64), updates=1)
    assert torch.equal(left, A) and B.any()
    left, still, _ = trained(A, B, updates=1, size=1e3)
    assert torch.equal(left, A) and torch.equal(still, B)


def test_shards_are_refused_and_the_rates_are_the_authors():
    recipe = build(composed("+method=lora_rite").full)
    with pytest.raises(
        ValueError, match="LoRARite does not go with system.parallel=fsdp: use ddp"
    ):
        check_goes_with_fsdp(recipe)
    options = composed("+method=lora_rite").adapter.optimizer
    assert (options.lr, list(options.betas), options.eps) == (1e-3, [0.9, 0.999], 1e-6)


@pytest.mark.usefixtures("measured_together")
def test_a_run_is_the_same_on_another_device(tmp_path):
    make_run(tmp_path / "here", *WORDS, "log.cost_model=true")
    with on_pretended():
        make_run(tmp_path / "there", f"system.device={DEVICE}", *WORDS)
    (memory,) = read_events(tmp_path / "here", "memory")
    part = "memory/optimizer_state"
    assert memory[part] == memory[f"{part}_predicted"] > 0
    assert_same_but_for_memory(tmp_path / "there", tmp_path / "here")


def test_a_run_goes_on_bit_for_bit(tmp_path, at_update):
    words = (*WORDS, "full.precision=bf16")
    make_run(tmp_path / "whole", *words)
    make_run_in_parts(tmp_path / "again", at_update, [8], *words)
    assert_same_run(tmp_path / "whole", tmp_path / "again")
