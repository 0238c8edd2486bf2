"""Kernels that an adapted linear launches, and the order of sums that GPUs take, run on a CPU."""

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from switchlora.adapters import (
    AdaptedProduct,
    Adapter,
    Product,
    adapted_linear,
    operands_kept,
    product,
)

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNELS = {*ALLOCATIONS, "_unsafe_view", "detach"}


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in NO_KERNELS:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Products are made on this CPU as on devices that launch kernels."""
    monkeypatch.setattr(product, "LAUNCHING", ("cpu",))


def linear(trains):
    module = nn.Linear(64, 96)
    module.weight.requires_grad_(trains)
    return module


def adapted(form, train_A=True, rank=8, scaling=1.0):
    factors = Adapter(torch.randn(rank, 64), torch.randn(96, rank), slice(0, 96), scaling)
    module = adapted_linear(nn.Linear(64, 96), {"": factors})
    module.form = form
    module.lora_A.requires_grad_(train_A)
    return module


def of_peft():
    config = peft.LoraConfig(r=8, target_modules=["0"], bias="all")
    return peft.get_peft_model(nn.Sequential(nn.Linear(64, 96)), config)


def kernels_of(modules):
    inputs = torch.randn(5, 64, requires_grad=True)
    with Kernels() as found, operands_kept(nn.ModuleList(modules)):
        for module in modules:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = module(inputs)
            outputs.backward(torch.ones(5, 96, dtype=torch.bfloat16))
    return found.count


def kernels_a_linear(make):
    """Kernels of a forward and a backward pass in bf16 that one linear more takes."""
    return (kernels_of([make() for _ in range(11)]) - kernels_of([make()])) / 10


@pytest.mark.parametrize("form", ["merged", "split"])
def test_an_adapter_launches_few_kernels_more_than_a_frozen_linear(as_on_a_gpu, form):
    frozen = kernels_a_linear(lambda: linear(trains=False))
    both = kernels_a_linear(lambda: adapted(form))
    assert both <= frozen + 6
    assert kernels_a_linear(lambda: adapted(form, train_A=False)) <= frozen + 4
    assert both < kernels_a_linear(of_peft)


@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_gradients_in_the_order_of_a_gpu_are_those_of_differences(as_on_a_gpu, form, scaling):
    how = Product(form, [(slice(0, 12), scaling)])
    weight = torch.randn(12, 6, dtype=torch.float64)
    shapes = (3, 2, 6), (12,), (3, 6), (12, 3)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(inputs, bias, *factors):
        return AdaptedProduct.apply(inputs, weight, bias, None, None, how, *factors)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("rank", [8, 5])
def test_an_aligned_rank_changes_no_gradient_beyond_rounding(monkeypatch, form, rank):
    module = adapted(form, rank=rank, scaling=1.5)
    inputs = torch.randn(50, 64, requires_grad=True)
    wanted = [inputs, module.bias, module.lora_A, module.lora_B]

    def gradients():
        with operands_kept(module), torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(module(inputs).float().sum(), wanted)

    here = gradients()
    monkeypatch.setattr(product, "LAUNCHING", ("cpu",))
    for on_cpu, as_on_gpu in zip(here, gradients(), strict=True):
        torch.testing.assert_close(as_on_gpu, on_cpu, rtol=0.02, atol=0.02 * on_cpu.abs().max())


@pytest.mark.parametrize("form", ["merged", "split"])
def test_cuda_sums_the_gradients_of_factors_in_float32_as_they_are_kept(form):
    with FakeTensorMode():
        options = {"device": "cuda", "dtype": torch.bfloat16}
        grad, weight, inputs = (torch.empty(s, **options) for s in ((50, 96), (96, 64), (50, 64)))
        low, A, B = (torch.empty(s, **options) for s in ((50, 8), (8, 64), (96, 8)))
        adapters = [Adapter(A, B, slice(0, 96), 1.0)]
        _, of_factors, of_bias = product.adapted_backward(
            grad, weight, inputs, [low], adapters, form, torch.float32
        )
    assert [gradient.dtype for gradient in of_factors] == [torch.float32] * 2
    assert of_factors[1].is_contiguous() and of_bias == []
