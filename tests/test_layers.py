"""The adapted linear against its plain form, for whole and row-sliced adapters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from switchlora.layers import AdaptedProduct, Adapter, adapted_linear

SLICES = {
    "whole": {"": (slice(0, 12), 3, 1.0)},
    "scaled": {"": (slice(0, 12), 2, 2.5)},
    "sliced": {
        "q": (slice(0, 4), 1, 1.0),
        "k": (slice(4, 8), 3, 2.0),
        "v": (slice(8, 12), 0, 1.0),
    },
}


def make(kind, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(6, 12, bias=bias, dtype=dtype)
    adapters = {}
    for name, (rows, rank, scaling) in SLICES[kind].items():
        out = rows.stop - rows.start
        A, B = torch.randn(rank, 6, dtype=dtype), torch.randn(out, rank, dtype=dtype)
        adapters[name] = Adapter(A, B, rows, scaling)
    return linear, adapted_linear(linear, adapters)


def plain(module, x):
    """F.linear(x, W) + s (x A^T) B^T, slice by slice, by autograd."""
    parts = [a.scaling * F.linear(F.linear(x, a.A), a.B) for a in module.adapters().values()]
    return F.linear(x, module.weight, module.bias) + torch.cat(parts, dim=-1)


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_the_plain_form(kind, bias):
    _, module = make(kind, bias)
    x = torch.randn(5, 7, 6, requires_grad=True)
    direction = torch.randn(5, 7, 12)
    trained = [p for p in module.parameters() if p.requires_grad]
    results = []
    for form in (module, lambda x: plain(module, x)):
        y = form(x)
        results.append([y, *torch.autograd.grad((y * direction).sum(), [x, *trained])])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert not module.weight.requires_grad


@pytest.mark.parametrize("kind", SLICES)
def test_gradcheck_in_double_precision(kind):
    _, module = make(kind, dtype=torch.float64)
    adapters = module.adapters().values()
    layout = [(a.rows, a.scaling) for a in adapters]
    factors = [f.detach().clone().requires_grad_() for a in adapters for f in (a.A, a.B)]
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)

    def product(x, bias, *factors):
        return AdaptedProduct.apply(x, module.weight, bias, layout, *factors)

    assert torch.autograd.gradcheck(product, (x, module.bias, *factors))


@pytest.mark.parametrize("kind", SLICES)
def test_a_fresh_adapter_computes_what_the_linear_did(kind):
    linear, module = make(kind)
    x = torch.randn(4, 6)
    assert torch.allclose(module(x), linear(x), atol=1e-5)
    assert module.bias is linear.bias


def test_under_autocast_the_output_is_rounded_as_the_plain_linears_is():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    large = Adapter(torch.randn(4, 64), torch.randn(64, 4), slice(0, 64), 1.0)
    module, x = adapted_linear(linear, {"": large}), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = module(x), linear(x)
    assert mine.dtype == torch.bfloat16
    assert (mine - theirs).abs().max() <= 2**-7  # no more than one step of bf16
    mine.float().sum().backward()
    assert module.lora_A.grad.dtype == torch.float32


def test_no_dense_gradient_of_the_frozen_weight_is_made():
    _, module = make("whole")
    module(torch.randn(4, 6)).sum().backward()
    assert module.weight.grad is None


def test_it_compiles_without_graph_breaks():
    _, module = make("sliced")
    x = torch.randn(4, 6)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
