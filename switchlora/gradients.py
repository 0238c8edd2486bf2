"""The gradient of the loss by effective weights, whatever module computes with them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from switchlora.learner import autocast
from switchlora.run import Run
from switchlora.targets import Target


def weight_gradients(run: Run, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Gradient (out, in) by each target's effective weight, on the next micro-batch to train on.

    On this rank's share of it. Neither ``.grad`` nor the order of the epoch's batches is touched.
    """
    run.data.set_epoch(run.state.epoch)
    inputs, labels = next(iter(run.data.train))
    if run.data.mixup is not None:
        inputs, labels = run.data.mixup(inputs, labels)
    micro_batch = run.learner.recipe.accumulation
    inputs, labels = inputs.chunk(micro_batch)[0], labels.chunk(micro_batch)[0]
    names = sorted({target.module for target in targets.values()})
    recipe = run.learner.recipe
    found = module_gradients(run.model, names, run.data.loss, recipe.precision, inputs, labels)
    return {name: found[target.module][target.rows] for name, target in targets.items()}


def module_gradients(
    model: nn.Module,
    names: Sequence[str],
    loss_fn: nn.Module,
    precision: str,
    inputs: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """G = sum over tokens of g_y x^T (out, in) of the linears ``names``.

    From one forward and backward pass, by the inputs and the outputs' gradients that pass through
    each module.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0].detach(), output)})
        )
        for name in names
    ]
    device = next(model.parameters()).device
    try:
        with autocast(device.type, precision):
            loss = loss_fn(model(inputs.to(device)), labels.to(device))
        grads = torch.autograd.grad(loss, [seen[name][1] for name in names])
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: grad.flatten(0, -2).float().mT @ seen[name][0].flatten(0, -2).float()
        for name, grad in zip(names, grads, strict=True)
    }
