"""Shards of one rank: their device, and their precision."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from conf_yamls import build, composed
from conftest import tiny_vit
from switchlora.learner import learner as learners, sharding
from switchlora.learner.compiling import made_compiled
from switchlora.learner.learner import _compress
from switchlora.learner.sharding import shard


@pytest.fixture(scope="module", autouse=True)
def _group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loss_and_gradients(model):
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images).float(), torch.arange(8) % 5)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def seeded():
    torch.manual_seed(0)
    return tiny_vit()


def test_in_bf16_ranks_gather_half_the_bytes_and_keep_everything_in_fp32():
    expected, plain = loss_and_gradients(seeded())
    model = shard(seeded(), precision="bf16")
    gathered = []
    fc1 = model.get_submodule("blocks.1.mlp.fc1")
    fc1.register_forward_hook(lambda layer, *_: gathered.append(layer.weight.dtype))
    loss, gradients = loss_and_gradients(model)
    assert gathered == [torch.bfloat16]
    assert loss == pytest.approx(expected, rel=0.02)
    for name, gradient in gradients.items():
        whole = gradient.full_tensor()
        assert gradient.dtype == model.get_parameter(name).dtype == torch.float32
        assert torch.cosine_similarity(whole.flatten(), plain[name].flatten(), dim=0) > 0.99


def test_in_fp32_a_shard_computes_what_the_whole_does():
    expected, _ = loss_and_gradients(seeded())
    assert loss_and_gradients(shard(seeded()))[0] == expected


def test_shards_lie_on_the_device_that_was_asked_for(monkeypatch):
    asked = []
    make = sharding.init_device_mesh

    def remembered(device_type, shape):
        asked.append(device_type)
        return make("cpu", shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sharding, "init_device_mesh", remembered)
    model = shard(tiny_vit(), torch.device("cpu"))
    assert asked == ["cpu"] and isinstance(next(model.parameters()), DTensor)


def test_a_learner_shards_onto_the_device_that_it_is_given(monkeypatch):
    """A model to be sharded stays on the CPU until then, so that it need not fit one GPU."""
    asked = []
    monkeypatch.setattr(learners, "shard", lambda model, device, _: asked.append(device) or model)
    recipe, there = build(composed().full), torch.device("meta")
    learners.build_learner(tiny_vit(), recipe, 10, parallel="fsdp", device=there)
    assert asked == [there]


def test_gradients_cannot_be_compressed_on_a_cpu_and_one_line_says_so():
    wrapper = torch.nn.parallel.DistributedDataParallel(tiny_vit())
    with pytest.raises(ValueError, match="system.compress=bf16 is for GPUs"):
        _compress(wrapper, "bf16")


def in_static_ddp(model):
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


@pytest.mark.parametrize("wrap", [shard, in_static_ddp])
def test_blocks_inside_of_a_wrapper_of_ranks_are_compiled_and_compute_the_same(wrap):
    expected, gradients = loss_and_gradients(seeded())
    torch.compiler.reset()
    counters.clear()
    model = wrap(seeded())
    with made_compiled(getattr(model, "module", model), {"backend": "eager"}).in_use():
        loss, found = loss_and_gradients(model)
    torch.compiler.reset()
    assert loss == expected and counters["stats"]["unique_graphs"] >= 1
    for name, gradient in found.items():
        here = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(here, gradients[name.removeprefix("module.")])
