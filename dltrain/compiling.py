"""Whether and how the step is compiled, and how long a step takes where that decides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn

from dltrain.device import Placement
from dltrain.errors import DeviceError
from dltrain.gpu.rates import synchronize

Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

LONG = 600.0  # seconds of training from which `auto` tries: compiling takes up to a minute, so it costs at most a tenth
FASTER = 0.95  # of the eager step's time, at most, for a compiled one to be kept
TIMED = 7  # steps of which the median is taken, or as many as fit into a second


def eager(model: nn.Module, loss: Callable[..., torch.Tensor], placement: Placement) -> Forward:
    """(images, targets) -> the loss `[]` and the outputs `[B, K]`."""

    def forward(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with placement.autocast():
            outputs = model(images)
        return loss(outputs, targets), outputs

    return forward


def compiled(
    model: nn.Module, loss: Callable[..., torch.Tensor], placement: Placement, mode: str, whole_step: bool
) -> Forward:
    """As `eager`, forward and backward pass each compiled to one function; on CUDA replayed as a graph.

    A shape that comes for the first time is compiled for itself: an epoch's last step may have one of its own.

    mode: default or max-autotune
    whole_step: whether the images of a step go through the model at once; gradients that are summed over several
        cannot lie where a graph writes them again

    Raises DeviceError, when it is called, where torch cannot compile it.
    """
    cuda = placement.device.type == "cuda"
    graphs = cuda and whole_step
    modes = {
        "default": "reduce-overhead" if graphs else "default",
        "max-autotune": "max-autotune" if graphs or not cuda else "max-autotune-no-cudagraphs",
    }
    whole = torch.compile(eager(model, loss, placement), mode=modes[mode], dynamic=False)
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    def forward(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            found, outputs = whole(images, targets)
        except (TorchDynamoException, InductorError) as error:
            mend = "set train.compile: off, or install what is missing (a C++ compiler for a CPU, Triton for CUDA)"
            raise DeviceError(f"train.compile: the step could not be compiled: {_first_line(error)}; {mend}") from error
        return (found.clone(), outputs.detach().clone()) if graphs else (found, outputs)  # the next step writes there

    return forward


def seconds_of_a_step(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    placement: Placement,
    images: torch.Tensor,
    targets: torch.Tensor,
    mode: str = "off",
) -> float:
    """Median seconds of a forward and backward pass, of a copy of the model; torch's generators stay as they are.

    images: float32 `[B, C, H, W]`; targets: any that the loss takes for them; both on the CPU
    """
    model = copy.deepcopy(model)
    placement.take(model)
    inputs = images.to(placement.device).contiguous(memory_format=placement.memory_format)
    targets = targets.to(placement.device)
    forward = eager(model, loss, placement) if mode == "off" else compiled(model, loss, placement, mode, True)
    took: list[float] = []
    cuda = placement.device.type == "cuda"
    with torch.random.fork_rng(devices=[placement.device] if cuda else []):
        for step in range(2 + TIMED):  # the first two make what is made once
            begin = perf_counter()
            model.zero_grad()
            forward(inputs, targets)[0].backward()
            synchronize(placement.device)
            if step >= 2:
                took.append(perf_counter() - begin)
            if sum(took) > 1:
                break
    return sorted(took)[len(took) // 2]


def choose(eager_seconds: float, steps: int, seconds: Callable[[], float]) -> tuple[str, str]:
    """What `auto` makes of a run of so many steps: off or default, and why.

    seconds: times a compiled step
    """
    whole = eager_seconds * steps
    if whole < LONG:
        return "off", f"about {max(1, round(whole))} s of steps do not repay compiling"
    try:
        fast = seconds()
    except DeviceError as error:
        return "off", str(error)
    share = f"a compiled step took {fast / eager_seconds:.2f} of the time, in a run of about {whole / 60:.0f} minutes"
    return ("default" if fast < FASTER * eager_seconds else "off"), share


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
