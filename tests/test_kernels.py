"""Kernels that an adapted linear launches, and the order of sums that GPUs take, run on a CPU."""

from contextlib import nullcontext

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
    Rates,
    Shape,
    adapted_linear,
    as_on_a_gpu,
    faster_form,
    operands_kept,
    own_work,
    product,
)
from switchlora.cost import all_hardware, hardware_like, hardware_named
from switchlora.cost.predict import _Linear
from switchlora.cost.trace import Recorder

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
def on_a_gpu():
    """Products are made on this CPU as on devices that launch kernels."""
    with as_on_a_gpu():
        yield


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
def test_an_adapter_launches_few_kernels_more_than_a_frozen_linear(on_a_gpu, form):
    frozen = kernels_a_linear(lambda: linear(trains=False))
    both = kernels_a_linear(lambda: adapted(form))
    assert both <= frozen + 6
    assert kernels_a_linear(lambda: adapted(form, train_A=False)) <= frozen + 4
    assert both < kernels_a_linear(of_peft)


@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_gradients_in_the_order_of_a_gpu_are_those_of_differences(on_a_gpu, form, scaling):
    how = Product(form, [(slice(0, 12), scaling)])
    weight = torch.randn(12, 6, dtype=torch.float64)
    shapes = (3, 2, 6), (12,), (3, 6), (12, 3)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(inputs, bias, *factors):
        return AdaptedProduct.apply(inputs, weight, None, bias, None, None, how, *factors)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("rank", [8, 5])
def test_an_aligned_rank_changes_no_gradient_beyond_rounding(form, rank):
    module = adapted(form, rank=rank, scaling=1.5)
    inputs = torch.randn(50, 64, requires_grad=True)
    wanted = [inputs, module.bias, module.lora_A, module.lora_B]

    def gradients():
        with operands_kept(module), torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(module(inputs).float().sum(), wanted)

    here = gradients()
    with as_on_a_gpu():
        there = gradients()
    for on_cpu, as_on_gpu in zip(here, there, strict=True):
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


WHOLE, QKV = {"": 96}, {"q": 32, "k": 32, "v": 32}


def sliced(rows, form, train_A):
    """A linear with an adapter of rank 8 on each of its parts."""
    adapters, start = {}, 0
    for name, number in rows.items():
        A, B = torch.randn(8, 64), torch.randn(number, 8)
        adapters[name] = Adapter(A, B, slice(start, start + number), 1.0)
        start += number
    module = adapted_linear(nn.Linear(64, 96), adapters)
    module.form = form
    for adapter in module.adapters().values():
        adapter.A.requires_grad_(train_A)
    return module


def bytes_of_an_update(form, rows, weight_dtype, train_A, kept):
    """Bytes that the operations of a linear's two passes in bf16 read and write."""
    module = sliced(rows, form, train_A)
    module.weight.data = module.weight.data.to(weight_dtype)
    inputs = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    recorder = Recorder(module, torch.device("cpu"))
    with recorder, operands_kept(module) if kept else nullcontext():
        with torch.autocast("cpu", torch.bfloat16):
            outputs = module(inputs)
        outputs.backward(torch.ones(40, 96, dtype=torch.bfloat16))
    return sum(operation.bytes for operation in recorder.operations)


@pytest.mark.parametrize("rows", [WHOLE, QKV], ids=["whole", "slices"])
@pytest.mark.parametrize("train_A", [True, False])
@pytest.mark.parametrize("form, compiled", [("merged", False), ("merged", True), ("split", False)])
def test_the_gradient_of_inputs_lies_as_that_of_a_plain_linear(rows, train_A, form, compiled):
    """Attention reads it on a Hopper GPU, where torch 2.11 takes it to lie as in the first update.

    Its cache of cuDNN's graphs (``MHA.cpp``) knows the strides of queries, keys and values alone.
    """
    strides = []
    for module in (nn.Linear(64, 96), sliced(rows, form, train_A)):
        inputs = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True) * 1
        inputs.register_hook(lambda gradient: strides.append(gradient.stride()))
        with as_on_a_gpu(compiled=compiled), operands_kept(module):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = module(inputs)
            (outputs * torch.randn_like(outputs)).sum().backward()
    assert strides[0] == strides[1]


@pytest.mark.parametrize("rows", [WHOLE, QKV], ids=["whole", "slices"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_A, kept", [(True, True), (False, True), (True, False)])
def test_the_work_that_forms_are_chosen_by_is_what_they_do(
    on_a_gpu, rows, weight_dtype, train_A, kept
):
    case = (rows, weight_dtype, train_A, kept)
    merged, split = (bytes_of_an_update(form, *case) for form in ("merged", "split"))
    slices = [(number, 8) for number in rows.values()]
    shape = Shape(40, 64, slices, 2, weight_dtype.itemsize, train_A, made=1 if kept else 2)
    expected = [sum(work.moved for work in own_work(form, shape)) for form in ("merged", "split")]
    assert merged - split == expected[0] - expected[1]


@pytest.mark.parametrize("name", all_hardware())
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_form_on_a_device_is_the_one_that_the_cost_model_finds_faster(name, precision):
    hardware = hardware_named(name)
    machine, itemsize = hardware.machine(precision, False), 2 if precision == "bf16" else 4
    chosen = set()
    for tokens in (64, 512, 3152, 25216, 200_000):
        for inner, outer in ((384, 384), (768, 3072), (4096, 4096), (4096, 11008)):
            for rank in (8, 64, 256):
                linear = _Linear(tokens, inner, outer, itemsize)
                shape = Shape(tokens, inner, [(outer, rank)], itemsize)
                found = faster_form(shape, hardware.rates(precision))
                seconds = {
                    form: sum(map(machine.seconds, getattr(linear, form)(rank, True)))
                    for form in ("merged", "split")
                }
                assert seconds[found] == pytest.approx(min(seconds.values()), rel=1e-9)
                chosen.add(found)
    assert chosen == {"merged", "split"}


def test_a_module_takes_the_form_of_its_device_s_rates():
    module = adapted(None)
    found = []
    for rates in (Rates(1e15, 1e9, 0.0), Rates(1e6, 1e15, 0.0)):
        for tokens in (2, 4096):
            with as_on_a_gpu(rates), operands_kept(module):
                module(torch.randn(tokens, 64))
                found += [form for _, form, _ in module._kept.operands]
    assert found == ["split", "merged"] * 2


@pytest.mark.parametrize(
    "driver_s, name",
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", None),
    ],
)
def test_a_driver_s_name_finds_the_rates_of_a_known_device(driver_s, name):
    found = hardware_like(driver_s)
    assert name == (found and found.name)


@pytest.mark.parametrize("tokens, expected", [(8191, 1), (8192, 2)])
def test_only_a_cpu_forms_the_weight_again_for_many_tokens(tokens, expected):
    module = adapted("merged")
    formed = []
    for context in (nullcontext(), as_on_a_gpu()):
        inputs = torch.randn(tokens, 64, requires_grad=True)
        recorder = Recorder(module, torch.device("cpu"))
        with context, recorder, operands_kept(module):
            module(inputs).sum().backward()
        formed.append(sum(op.flops == 2 * 8 * 96 * 64 for op in recorder.operations))
    assert formed == [expected, 1]
