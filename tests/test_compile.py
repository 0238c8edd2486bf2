"""Compiled blocks: graphs are counted, shared and kept, and nothing else of a run sees them."""

from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from conf_yamls import build, composed
from conftest import tiny_vit
from runs import BY_DATE, events_without_times, make_run, make_run_in_parts
from switchlora.adapters import (
    Adapter,
    adapted_linear,
    as_on_a_gpu,
    guided_linear,
    operands_kept,
)
from switchlora.learner import (
    build_learner,
    chosen_compiler,
    compile_of,
    compiling,
    evaluate,
    launches_graphs,
)
from switchlora.run import tell_compiler_fault, with_choices

LABELS = torch.arange(8) % 5
EAGER = "full.compile={backend: eager}"
TINY = (
    *(*BY_DATE, "switch.criterion.epoch=0.5", "max_updates=13", "epochs=1"),
    *("model.depth=2", "model.embed_dim=16", "full.scheduler.warmup_t=2", "monitor.window=5"),
    *("switch/rank=fixed", "switch.rank.rank=2"),
)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_graphs():
    """Begin without the graphs of other tests, and leave none behind."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def learner_of(model, *words):
    return build_learner(model, build(composed(*words).full), 10)


def updated(learner, images, times=2):
    return [learner.update(images, LABELS, cross_entropy, number) for number in range(times)]


def with_adapters(blocks, rank_of, names=("mlp.fc1",)):
    """Put an adapter on linears of each block, all of one rank."""
    for number, block in enumerate(blocks):
        for name in names:
            linear, rank = block.get_submodule(name), rank_of(number)
            rows = slice(0, linear.out_features)
            A = torch.randn(rank, linear.in_features) / 8
            B = torch.randn(linear.out_features, rank) / 8
            block.set_submodule(name, adapted_linear(linear, {"": Adapter(A, B, rows, 1.0)}))


def test_blocks_share_a_graph_which_a_rebuilt_model_takes_again(images):
    model = tiny_vit(depth=6)
    updated(learner_of(model, EAGER), images)
    assert graphs() == 1
    for rank_of, expected in ((lambda _: 4, 2), (lambda _: 4, 2), (lambda n: 4 + n % 2, 3)):
        model = tiny_vit(depth=6)
        with_adapters(model.blocks, rank_of)
        with torch._dynamo.config.patch(recompile_limit=1):  # torch's own; ours holds
            updated(learner_of(model, EAGER), images, times=1)
        assert graphs() == expected
    assert not counters["graph_break"]


def test_compiled_blocks_compute_the_gradients_of_eager_ones(images):
    found = []
    for words in ((), ("full.compile={backend: aot_eager}",)):
        torch.manual_seed(3)
        model = tiny_vit()
        with_adapters(model.blocks[1:], lambda _: 4)
        outcomes = updated(learner_of(model, *words), images)
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([torch.tensor([each.loss for each in outcomes]), *grads])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_outside_of_an_update_the_model_is_not_compiled(images):
    learner = learner_of(tiny_vit(), EAGER)
    updated(learner, images)
    before = graphs()
    evaluate(learner.model, [(images, LABELS)])
    learner.model.eval()(images[:3])
    assert graphs() == before
    assert not any("forward" in vars(module) for module in learner.model.modules())


def test_a_model_without_blocks_is_compiled_whole(images):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    assert compiling.compiled_blocks(model) == [model]
    updated(learner_of(model, EAGER), images)
    assert graphs() == 1


def broken(graph, inputs):
    raise RuntimeError("no ptxas\nat all")


def test_a_compiler_that_fails_leaves_the_bits_of_eager_code_and_a_line(images, capsys):
    torch._dynamo.register_backend(broken, name="broken")
    found = []
    for words in ((), ("full.compile={backend: broken}",)):
        torch.manual_seed(3)
        learner = learner_of(tiny_vit(drop_path_rate=0.3), *words)
        found.append((updated(learner, images), learner.flops, learner.activation_bytes))
    assert found[0] == found[1]
    lines = []
    state, log = SimpleNamespace(phase="full"), SimpleNamespace(line=lines.append)
    for _ in range(2):
        tell_compiler_fault(SimpleNamespace(learner=learner, state=state, log=log))
    (line,) = lines
    assert "torch.compile failed, the full phase goes on without it" in line and "ptxas" in line


def test_an_error_of_the_model_is_told_as_without_the_compiler(images):
    learner = learner_of(tiny_vit(), EAGER)
    with pytest.raises(ValueError, match="batch_size"):
        learner.update(images, LABELS[:3], cross_entropy, 0)


def test_stochastic_guidance_compiles_a_graph_for_each_choice_not_for_each_draw(images):
    model = tiny_vit()
    for block in model.blocks:
        fc1 = block.mlp.fc1
        A, B = torch.randn(2, fc1.in_features), torch.randn(fc1.out_features, 2)
        adapter = Adapter(A, B, slice(0, fc1.out_features), 1.0)
        block.mlp.fc1 = guided_linear(fc1, {"": adapter}, stochastic=True)
    learner = learner_of(model, EAGER)
    for number in range(14):
        for layer in learner.guided:
            layer.mix = 0.5 + 0.01 * number
        learner.update(images, LABELS, cross_entropy, number)
    assert graphs() <= 3  # with W x at the first mix and at any mix, and without


@pytest.mark.parametrize(
    "device,triton,recomputed,accumulation,expected",
    [
        (CUDA, True, None, 1, "graphs"),
        (CUDA, True, None, 2, True),
        (CUDA, True, "blocks", 1, True),
        (CUDA, True, "gelu", 1, None),
        (CUDA, False, None, 1, None),
        (torch.device("cpu"), True, None, 1, None),
    ],
)
def test_auto_compiles_on_a_gpu_that_has_a_compiler(
    device, triton, recomputed, accumulation, expected, monkeypatch
):
    monkeypatch.setattr(compiling, "has_triton", lambda: triton)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert chosen_compiler("auto", device, recomputed, accumulation) == expected
    compiled = compile_of("auto", device, recomputed, accumulation)
    assert launches_graphs(compiled) == (expected == "graphs")
    assert compile_of({"mode": "default"}, device) == {"mode": "default"}
    assert compile_of(False, device) is False


@pytest.mark.parametrize("ranks, hip", [(2, None), (1, "7.2")])
def test_auto_launches_no_graphs_where_nobody_tried_them(ranks, hip, monkeypatch):
    monkeypatch.setattr(compiling, "missing_compiler", lambda: None)
    monkeypatch.setattr(compiling, "world_size", lambda: ranks)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert compile_of("auto", CUDA) is True


def test_graphs_is_the_mode_of_torch_that_launches_them():
    found = compile_of("graphs", CUDA)
    assert found["mode"] in torch._inductor.list_mode_options()
    assert launches_graphs(found) and launches_graphs("graphs")
    assert not any(map(launches_graphs, ({"mode": "default"}, True, "auto", None)))


def test_graphs_are_refused_where_they_cannot_be_had(monkeypatch):
    with pytest.raises(ValueError, match="for NVIDIA's GPUs, and this run trains on a cpu"):
        learner_of(tiny_vit(), "full.compile=graphs")
    monkeypatch.setattr(compiling, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="for one process, and this run has 2"):
        compile_of("graphs", CUDA)


@pytest.mark.parametrize("asked", ["graphs", "{mode: reduce-overhead}"])
@pytest.mark.parametrize("word", ["accumulation=2", "activation_checkpointing=blocks"])
def test_graphs_are_refused_where_a_second_pass_would_overwrite_the_first(asked, word):
    with pytest.raises(Exception, match=f"does not go with {word}"):
        build(composed(f"full.compile={asked}", f"full.{word}").full)


def test_a_gpu_without_a_c_compiler_is_told(monkeypatch):
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "C compiler" in compiling.missing_compiler()
    assert compile_of("auto", CUDA) is None


def test_the_files_of_a_run_say_whether_it_was_compiled():
    chosen = with_choices(composed("adapter.compile=true"))
    assert chosen.full.compile is None and chosen.adapter.compile is True


def test_a_compiled_run_knows_its_flops_and_activations_and_goes_on_with_the_same_bits(
    tmp_path, at_update
):
    eager = make_run(tmp_path / "eager", *TINY)
    compiled = make_run_in_parts(tmp_path / "compiled", at_update, [12], *TINY, EAGER)
    assert compiled["cost"]["train_flops"] == eager["cost"]["train_flops"] > 0
    for phase, found in eager["phases"].items():
        here = compiled["phases"][phase]
        assert here["flops_per_update"] == found["flops_per_update"]
        assert here["memory"]["measured"] == found["memory"]["measured"]
    one, other = (events_without_times(tmp_path / name) for name in ("eager", "compiled"))
    assert one == other


def noting(products):
    """A backend that notes the shapes of both operands of each product in its graphs."""

    def compiled(graph, _):
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                left, right = (tuple(each.meta["val"].shape) for each in node.args[-2:])
                products.append((left, right))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiled)


def gradients_of(module, backend):
    """Outputs and gradients of an adapted linear in bf16, as on a GPU."""
    inputs = torch.randn(9, 11, 24, generator=torch.Generator().manual_seed(5), requires_grad=True)
    wanted = [inputs, *(p for p in module.parameters() if p.requires_grad)]
    call = torch.compile(module, backend=backend, fullgraph=True) if backend else module
    with as_on_a_gpu(), operands_kept(module), torch.autocast("cpu", torch.bfloat16):
        outputs = call(inputs).float()
        return [outputs.detach(), *torch.autograd.grad(outputs.square().sum(), wanted)]


@pytest.mark.parametrize("train_A, bias, rank", [(True, True, 5), (False, False, 8)])
@pytest.mark.parametrize("out", [24, 40])
def test_compiled_code_on_a_gpu_reads_inputs_that_are_not_narrower_once(train_A, bias, rank, out):
    A, B = torch.randn(rank, 24) / 4, torch.randn(out, rank) / 4
    linear = torch.nn.Linear(24, out, bias=bias)
    module = adapted_linear(linear, {"": Adapter(A, B, slice(0, out), 1.5)})
    module.lora_A.requires_grad_(train_A)
    products = []
    eager, compiled = (gradients_of(module, backend) for backend in (None, noting(products)))
    for here, there in zip(compiled, eager, strict=True):
        torch.testing.assert_close(here, there, rtol=0.05, atol=0.02 * float(there.abs().max()))
    tokens = 9 * 11
    apart = out > 24
    widths = (out, 8) if apart else (out + 8,)
    forward = {((tokens, 24), (24, width)) for width in widths}
    backward = ((tokens, out), (out, 24))
    assert {*forward, backward} <= set(products)
    passes = sum(tokens in (*left, *right) for left, right in products)
    assert passes == (5 if train_A else 3) + apart
