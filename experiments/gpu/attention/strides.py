"""Do a GPU's losses follow if attention reads every gradient with the strides of its first?

    python strides.py CHECKOUT losses.csv      # CHECKOUT holds commit 4a81e31

A run of that commit switches to both factors. It has the products of compiled code on a GPU, on a
CPU. It trains twice: attention's backward pass reads gradients as they lie, then as torch's cache
of cuDNN graphs does, which knows the strides of q, k and v alone.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

checkout, out = (Path(word).resolve() for word in sys.argv[1:])
sys.path[:0] = [str(checkout), str(checkout / "tests")]
os.chdir(checkout)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from runs import make_run  # noqa: E402
from switchlora.adapters import product  # noqa: E402
from switchlora.storage import read_events  # noqa: E402

WORDS = (
    *("switch.train_factors=[A,B]", "switch/criterion=at_epoch", "switch.criterion.epoch=1.5"),
    *("full.compile=false", "full.precision=bf16", "system.device=cpu", "model.depth=2"),
    *("full.optimizer.lr=3e-3", "max_updates=50", "log.cost_model=false", "checkpoint.keep=0"),
    *("log=quiet", "seed=0"),
)
attention = F.scaled_dot_product_attention


class Attention(torch.autograd.Function):
    """Attention whose backward pass can take a gradient to lie as the first one did."""

    cached = False
    first: dict = {}

    @staticmethod
    def forward(ctx, *qkv):
        """Return the outputs of q, k and v (B, heads, T, width)."""
        ctx.save_for_backward(*qkv)
        return attention(*qkv)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of q, k and v."""
        qkv = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        key = tuple(each.shape + each.stride() for each in qkv)
        strides = Attention.first.setdefault(key, grad.stride())
        if Attention.cached:
            grad = grad.as_strided(grad.shape, strides, grad.storage_offset())
        with torch.enable_grad():
            outputs = attention(*qkv)
        return torch.autograd.grad(outputs, qkv, grad)


def losses(cached: bool) -> list[float]:
    """Return the training losses of the run."""
    Attention.cached, Attention.first = cached, {}
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "run", *WORDS)
        return [event["train/loss"] for event in read_events(Path(folder) / "run", "train")]


torch.set_num_threads(1)
product.LAUNCHING, product.COUNTED_AS_COMPILED = (*product.LAUNCHING, "cpu"), True
F.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)
both = zip(losses(cached=False), losses(cached=True), strict=True)
with out.open("w", newline="") as file:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["update", "read as it lies", "read as the first lay"])
    table.writerows((n + 1, f"{a:.4f}", f"{b:.4f}") for n, (a, b) in enumerate(both))
