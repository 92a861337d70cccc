"""`dltrain train --dry-run`: everything resolved, one batch computed, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dltrain.build import Setup, build
from dltrain.config import Config
from dltrain.modules import as_written
from dltrain.runs import describe, new_run

# of a training step: a backward pass multiplies twice as often (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)
FORWARD_PASSES = 3
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TOLERANCE = 0.25  # of the expected first loss, or this much where that is more


def dry_run(config: Config, note: Callable[[str], None]) -> dict[str, Any]:
    """What a run of this config would be; JSON-able.  One step is taken and thrown away.

    layers: name, kind, output shape without the batch, parameters, FLOPs of one image's forward pass (a multiplication
    and an addition are two), and as the output of the first batch is: dtype, device, layout (contiguous, channels_last,
    any where these are the same, or strided)
    memory: estimated bytes, by what takes them
    first_loss, expected_loss: of the first batch, and of outputs that are all zero (ln(classes) for cross entropy)
    """
    setup = build(config, note)
    for line in describe(setup):
        note(line)
    run = new_run(setup)
    images, targets, _ = next(setup.batches().step(0, 0))
    layers, flops, activations = _layers(setup, images[:1])
    with setup.placement.autocast(), _placed(setup.model) as placed:
        outputs = setup.model(images)
    layers = [{**row, **placed.get(row["name"], dict.fromkeys(("dtype", "device", "layout")))} for row in layers]
    loss = setup.loss(outputs, targets)
    loss.backward()
    setup.optimizers.step(loss, lambda: loss)
    expected = float(setup.loss(torch.zeros_like(outputs), targets))
    first = float(loss.detach())
    weights = _bytes(*setup.model.state_dict().values())
    state = _bytes(
        *(value for _, each in setup.optimizers.state() for value in each.values() if torch.is_tensor(value)),
        *(run.average or {}).values(),
        *(run.slow or {}).values(),
    )
    half = 2 if setup.placement.dtype == torch.bfloat16 else 4
    memory = {
        "data": _bytes(*(tensor for split in setup.data.splits.values() for tensor in (split.images, split.labels))),
        "weights": weights,
        "gradients": _bytes(*setup.model.parameters()),
        "optimizer": state,
        "activations": activations * half * setup.micro_size,
    }
    return {
        "config": config.plain(),
        **setup.placement.why,
        "shape": list(setup.data.shape),
        "classes": len(setup.data.classes),
        "train_images": len(setup.data.train),
        "steps_per_epoch": setup.steps_per_epoch,
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "flops_per_image": flops,
        "memory": {**memory, "total": sum(memory.values())},
        "first_loss": first,
        "expected_loss": expected,
        "first_loss_ok": abs(first - expected) <= max(TOLERANCE * expected, TOLERANCE),
    }


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _placed(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """The dtype, device and layout of what each layer gives in a pass within, by the layer's name."""
    found: dict[str, dict[str, Any]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.is_tensor(output):
                dtype = DTYPES.get(output.dtype, str(output.dtype).removeprefix("torch."))
                found[name] = {"dtype": dtype, "device": str(output.device), "layout": _layout(output)}

        return see

    hooks = [module.register_forward_hook(note(name)) for name, module in _leaves(model).items()]
    yield found
    for hook in hooks:
        hook.remove()


def _layout(tensor: torch.Tensor) -> str:
    contiguous = tensor.is_contiguous()
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "any" if contiguous else "channels_last"
    return "contiguous" if contiguous else "strided"


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


def count_flops(model: nn.Module, image: torch.Tensor) -> FlopCounterMode:
    """The FLOPs of a forward pass of an image `[1, C, H, W]` in evaluation mode, in all and by module."""
    counter = FlopCounterMode(display=False)
    model.eval()
    with torch.no_grad(), counter:
        model(image)
    model.train()
    return counter


def _layers(setup: Setup, image: torch.Tensor) -> tuple[list[dict[str, Any]], int, int]:
    """A row for each layer, FLOPs of a forward pass, and how many numbers the layers give for one image."""
    shapes: dict[str, list[int]] = {}
    leaves = _leaves(setup.model)

    def note_shape(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda module, inputs, output: shapes.__setitem__(name, list(output.shape[1:]))

    hooks = [module.register_forward_hook(note_shape(name)) for name, module in leaves.items()]
    with as_written(setup.model):  # each layer's own output, whatever the order they are computed in
        counter = count_flops(setup.model, image)
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    root = type(setup.model).__name__
    rows = [
        {
            "name": name,
            "kind": type(module).__name__,
            "output": shapes.get(name),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "flops": sum(counts.get(f"{root}.{name}", {}).values()),
        }
        for name, module in leaves.items()
    ]
    return rows, counter.get_total_flops(), sum(torch.Size(shape).numel() for shape in shapes.values())
