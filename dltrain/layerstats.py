"""What the layers are like after an epoch: norms of weights and gradients, activations and dead units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation

from dltrain.build import Setup
from dltrain.modules import ScaledTanh, as_written
from dltrain.registry import names

IMAGES = 256  # training images that activations are measured on: the same in each epoch
_ACTIVATIONS = (*(getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"), ScaledTanh)


def layer_statistics(setup: Setup) -> dict[str, Any]:
    """JSON-able, of the model as it stands, with the last step's gradients in its parameters:

    parameters: name -> weight_norm and gradient_norm, both 2-norms; the latter is None where there is no gradient
    activations: name of the module -> of its outputs for 256 training images, in evaluation mode and without
        augmentation: mean, std, zeros (their share) and dead: the share of units that are 0 for each of the images, a
        unit being a channel at all its places, or a number of a row
    """
    return {"parameters": _parameters(setup.model), "activations": _activations(setup)}


def _parameters(model: nn.Module) -> dict[str, dict[str, float | None]]:
    weights = {name: each.detach() for name, each in model.named_parameters()}
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    norms = torch._foreach_norm([*weights.values(), *gradients.values()])
    found = torch.stack([each.float() for each in norms]).tolist()  # waits for the device, once
    of_gradients = dict(zip(gradients, found[len(weights) :], strict=True))
    return {
        name: {"weight_norm": norm, "gradient_norm": of_gradients.get(name)}
        for name, norm in zip(weights, found[: len(weights)], strict=True)
    }


def _activations(setup: Setup) -> dict[str, dict[str, float]]:
    images = setup.data.train.images
    count = min(IMAGES, len(images))
    some = images.index_select(0, torch.arange(count) * len(images) // count)  # from all of it: it may be ordered
    found: dict[str, torch.Tensor] = {}

    def see(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def measure(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            calls = sum(each.partition("#")[0] == name for each in found)  # torchvision's use some modules twice
            found[f"{name}#{calls + 1}" if calls else name] = _describe(output)

        return measure

    model, device = setup.model, setup.placement.device
    hooks = [
        module.register_forward_hook(see(name))
        for name, module in model.named_modules()
        if isinstance(module, _ACTIVATIONS) or name.rpartition(".")[2].partition("_")[2] in names("activation")
    ]
    training = model.training
    model.eval()
    # a model that draws random numbers in evaluation mode too must not move those of training
    kept = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with kept, torch.no_grad(), setup.placement.autocast(), as_written(model):
        model(setup.normalise(some.to(device)))
    model.train(training)
    for hook in hooks:
        hook.remove()
    rows = torch.stack([*found.values()]).tolist() if found else []  # waits for the device, once
    return {
        name: dict(zip(("mean", "std", "zeros", "dead"), row, strict=True))
        for name, row in zip(found, rows, strict=True)
    }


def _describe(output: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, share of zeros and share of dead units of outputs `[B, C, …]`: float32 `[4]`."""
    std, mean = torch.std_mean(output.float(), correction=0)
    zero = output == 0
    dead = zero.movedim(1, 0).flatten(1).all(1)  # [C]
    return torch.stack([mean, std, zero.float().mean(), dead.float().mean()])
