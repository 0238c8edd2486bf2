"""The adapted linear against its plain form, for whole and row-sliced adapters."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from switchlora.adapters import (
    AdaptedProduct,
    Adapter,
    Product,
    adapted_linear,
    cheaper_form,
    operands_kept,
    product as products,
)

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
@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("trained", ["AB", "B"])
def test_outputs_and_gradients_equal_the_plain_form(kind, bias, form, trained):
    _, module = make(kind, bias)
    module.form = form
    for adapter in module.adapters().values():
        adapter.A.requires_grad_("A" in trained)
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
@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("trained", ["AB", "B"])
def test_gradcheck_in_double_precision(kind, form, trained):
    _, module = make(kind, dtype=torch.float64)
    A_trains = trained == "AB"
    adapters = module.adapters().values()
    layout = [(a.rows, a.scaling) for a in adapters]
    factors = [
        factor.detach().clone().requires_grad_(trains)
        for adapter in adapters
        for factor, trains in ((adapter.A, A_trains), (adapter.B, True))
    ]
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)

    def product(x, bias, *factors):
        return AdaptedProduct.apply(
            x, module.weight, None, bias, None, None, Product(form, layout), *factors
        )

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


@pytest.mark.parametrize("form", ["merged", "split"])
def test_in_compiled_code_both_forms_compute_the_same(form):
    _, module = make("sliced")
    module.form = form
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    (mine,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(module(x).square().sum(), x)
    assert torch.allclose(mine, theirs, atol=1e-5)


def saved_bytes(module, x, before=lambda x: x):
    """Bytes that module(before(x)) keeps for its backward pass, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(before(x))
    return sum(found.values())


@pytest.mark.parametrize("form", ["merged", "split"])
def test_a_frozen_A_needs_no_inputs_only_the_narrow_projections(form):
    _, module = make("whole")
    module.form = form
    x = torch.randn(50, 6, requires_grad=True)
    narrow = 50 * 3 * 4
    assert saved_bytes(module, x) == x.nbytes + narrow
    module.lora_A.requires_grad_(False)
    assert saved_bytes(module, x) == narrow


def test_within_an_update_the_effective_weight_is_formed_once(monkeypatch):
    _, module = make("scaled")
    module.form, formed = "merged", []
    form_it = products.effective_weight
    monkeypatch.setattr(
        products, "effective_weight", lambda *args: formed.append(1) or form_it(*args)
    )
    x = torch.randn(5, 6, requires_grad=True)
    for scope, times in ((operands_kept(module), 1), (nullcontext(), 4)):
        formed.clear()
        with scope:
            for _ in range(2):
                module(x).sum().backward()
        assert len(formed) == times


def test_what_was_kept_in_one_update_is_not_used_in_the_next():
    _, module = make("scaled")
    module.form, x = "merged", torch.randn(5, 6)
    with operands_kept(module):
        before = module(x)
    with torch.no_grad():
        module.lora_B.zero_()
    with operands_kept(module):
        after = module(x)
    assert torch.equal(after, F.linear(x, module.weight, module.bias))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "tokens, width, out, expected",
    [(3152, 384, 1536, "merged"), (394, 1024, 4096, "split"), (1576, 768, 768, "merged")],
)
def test_many_tokens_are_worth_an_effective_weight(tokens, width, out, expected):
    assert cheaper_form(tokens, width, out) == expected


def test_the_form_follows_the_shapes_where_none_is_given():
    linear = nn.Linear(64, 64)
    adapter = Adapter(torch.randn(2, 64), torch.randn(64, 2), slice(0, 64), 1.0)
    module = adapted_linear(linear, {"": adapter})
    used = set()
    for tokens in (8, 512):
        with operands_kept(module):
            module(torch.randn(tokens, 64))
            used |= {(tokens, form) for _, form, _ in module._kept.operands}
    assert used == {(8, "split"), (512, "merged")}


def test_inputs_from_a_gelu_are_made_again_bit_by_bit():
    _, module = make("whole")
    z = torch.randn(50, 6, requires_grad=True)
    results = []
    for module.recompute_gelu in (False, True):
        kept = saved_bytes(module, z, before=F.gelu)
        trained = [z, module.lora_A, module.lora_B]
        results.append((kept, torch.autograd.grad(module(F.gelu(z)).square().sum(), trained)))
    (kept, grads), (kept_less, remade) = results
    assert kept - kept_less == z.nbytes and all(map(torch.equal, grads, remade))


def test_row_slices_read_the_inputs_one_by_one_so_merging_pays_earlier():
    assert cheaper_form(200, 384, 1152) == "split"
    assert cheaper_form(200, 384, 1152, slices=3) == "merged"


def gradients(function, x, module, direction):
    """Outputs, and the gradients of x and of all that trains."""
    torch.manual_seed(3)  # of dropout's mask
    y = function(x)
    trained = [p for p in module.parameters() if p.requires_grad and p.numel()]
    return [y, *torch.autograd.grad((y * direction).sum(), [x, *trained])]


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("bias", [True, False])
def test_in_the_joint_phase_the_base_weight_gets_its_gradient_too(kind, bias):
    _, module = make(kind, bias)
    module.weight.requires_grad_()
    x, direction = torch.randn(5, 7, 6, requires_grad=True), torch.randn(5, 7, 12)
    mine = gradients(module, x, module, direction)
    theirs = gradients(lambda x: plain(module, x), x, module, direction)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))
    assert any(torch.equal(g, mine[2]) and g.shape == module.weight.shape for g in mine)


@pytest.mark.parametrize("kind", SLICES)
def test_gradcheck_of_all_that_trains_in_the_joint_phase(kind):
    _, module = make(kind, dtype=torch.float64)
    module.weight.requires_grad_()
    values = {n: p for n, p in module.named_parameters() if p.numel()}
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x, *parameters):
        given = dict(zip(values, parameters, strict=True))
        return torch.func.functional_call(module, given, (x,))

    assert torch.autograd.gradcheck(outputs, (x, *values.values()))


def test_freezing_the_base_at_the_end_of_the_joint_phase_does_not_move_the_function():
    _, module = make("sliced")
    x = torch.randn(5, 6)
    joint = module.requires_grad_()(x)
    module.weight.requires_grad_(False)
    assert torch.allclose(joint, module(x), atol=1e-5)


def test_in_the_joint_phase_autocast_rounds_the_effective_weight_once():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    large = Adapter(torch.randn(4, 64), torch.randn(64, 4), slice(0, 64), 1.0)
    module, x = adapted_linear(linear, {"": large}).requires_grad_(), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = module(x), linear(x)
    assert mine.dtype == torch.bfloat16 and (mine - theirs).abs().max() <= 2**-7
    mine.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("joint", [False, True])
def test_dropout_is_one_mask_on_the_inputs_of_all_adapters_and_not_of_the_base(kind, joint):
    _, module = make(kind)
    module.weight.requires_grad_(joint)
    module.dropout, x = 0.4, torch.randn(5, 7, 6, requires_grad=True)

    def by_hand(x):
        dropped = F.dropout(x, 0.4)
        parts = [a.scaling * dropped @ a.A.mT @ a.B.mT for a in module.adapters().values()]
        return F.linear(x, module.weight, module.bias) + torch.cat(parts, dim=-1)

    direction = torch.randn(5, 7, 12)
    mine = gradients(module, x, module, direction)
    theirs = gradients(by_hand, x, module, direction)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))


def test_the_expectation_over_masks_is_the_undropped_output():
    _, module = make("sliced")
    x = torch.randn(6)
    undropped, module.dropout = module(x), 0.3
    draws = module(x.expand(20_000, 6))
    error = (draws.mean(dim=0) - undropped).abs()
    assert (error <= 5 * draws.std(dim=0) / 20_000**0.5 + 1e-5).all()
    assert draws.std(dim=0).max() > 0.1


def test_evaluation_drops_nothing():
    _, module = make("scaled")
    module.eval()
    x = torch.randn(5, 6)
    undropped, module.dropout = module(x), 0.5
    assert torch.equal(module(x), undropped)


def test_a_residual_in_bf16_takes_dropout_too():
    _, module = make("whole")
    module.weight.data = module.weight.bfloat16()
    module.dropout = 0.1
    assert module(torch.randn(5, 6)).dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_joint_phase_compiles_without_graph_breaks(dropout):
    _, module = make("sliced")
    module.requires_grad_().dropout = dropout
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(torch.randn(4, 6)).shape == (4, 12)


@pytest.mark.parametrize("kind", SLICES)
def test_the_merged_weight_is_that_of_the_linear_before(kind):
    linear, module = make(kind)
    assert torch.allclose(module.merged(), linear.weight, atol=1e-6)
    assert not module.merged().requires_grad


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("frozen", [True, False])
def test_function_transforms_see_the_plain_form(kind, frozen):
    _, module = make(kind)
    x = torch.randn(5, 3, 6)
    trained = {
        n: p.detach() for n, p in module.named_parameters() if p.requires_grad or not frozen
    }
    others = {n: p.detach() for n, p in module.named_parameters() if n not in trained}

    def loss(parameters, x):
        return functional_call(module, {**parameters, **others}, (x,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    for number, one in enumerate(x):
        names = list(trained)
        parameters = [module.get_parameter(name) for name in names]
        found = torch.autograd.grad(plain(module, one).square().sum(), parameters)
        for name, gradient in zip(names, found, strict=True):
            assert torch.allclose(each[name][number], gradient, atol=1e-3), name
    output = vmap(module)(x)
    assert torch.allclose(output, plain(module, x), atol=1e-4)
    tangent = jvp(lambda x: functional_call(module, {**trained, **others}, (x,)), (x,), (x,))[1]
    no_bias = plain(module, x) - module.bias
    assert torch.allclose(tangent, no_bias, atol=1e-4)


def test_a_second_derivative_is_refused_instead_of_wrong():
    _, module = make("whole")
    x = torch.randn(3, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), module.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
