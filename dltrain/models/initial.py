"""Initialisations: how weights start, drawn from torch's global generator or made from training images."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from dltrain.errors import ConfigError
from dltrain.lazy import F, nn, torch
from dltrain.registry import Component, Positive, register

NOTE = "dltrain_init"  # the attribute of a module that says by what its weight starts


def start(module: nn.Module, init: Component | None) -> nn.Module:
    """Starts the module's weight by `init` and its bias at zero; None leaves both as torch drew them.

    An initialisation sees a weight as [out, in, height, width] or [out, in], and each group of a convolution alone, so
    that fans are those of the sums that are computed.  One from data is noted, for `initialise_from_data`.  Tensors on
    the meta device stay as they are.  Raises ValueError where the initialisation does not fit.
    """
    if init is None:
        return module
    setattr(module, NOTE, init)
    with torch.no_grad():
        if module.bias is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for part in _parts(module) if init.kind == "init" else ():
            if part.is_meta:
                continue
            fresh = part.clone(memory_format=torch.contiguous_format)
            try:
                init(fresh)
            except ValueError as error:
                raise ValueError(f"init {init.name}: {error}") from None
            part.copy_(fresh)
    return module


def _parts(module: nn.Module) -> list[torch.Tensor]:
    """Views of the weight, together all of it, in which each output has the inputs that it sums over."""
    from dltrain.modules import TableConv2d

    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, TableConv2d):
        return [part[None] for part in weight.split(module.fans)]
    groups: int = getattr(module, "groups", 1)
    parts = weight.chunk(groups)
    return [part.transpose(0, 1) for part in parts] if isinstance(module, nn.ConvTranspose2d) else list(parts)


def start_others(model: nn.Module, init: Component | None) -> nn.Module:
    """Starts every convolution and linear layer by `init` that no `init` of its own was given."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    for module in model.modules():
        if isinstance(module, kinds) and not hasattr(module, NOTE):
            start(module, init)
    return model


def _from_data(module: nn.Module) -> Component | None:
    init: Component | None = getattr(module, NOTE, None)
    return init if init is not None and init.kind == "data_init" else None


def wants_data(model: nn.Module) -> bool:
    """Whether `initialise_from_data` has anything to do."""
    return any(_from_data(module) for module in model.modules())


class _Done(Exception):
    """Ends a forward pass that has nothing more to start."""


def initialise_from_data(model: nn.Module, images: torch.Tensor) -> None:
    """Starts what is to start from data, in the order in which the layers compute, by one forward pass.

    Each sees inputs that went through those before it; what comes after the last of them is not computed.

    images: float32 `[N, C, H, W]`, normalised as in training.  Raises ConfigError where a layer is none that its
    initialisation can start.
    """
    waiting = {name: (module, init) for name, module in model.named_modules() if (init := _from_data(module))}

    def begin(name: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        _, init = waiting.pop(name)
        try:
            init(module, inputs[0])
        except ValueError as error:
            raise ConfigError(f"model: layer '{name}': init {init.name}: {error}") from None
        if not waiting:
            raise _Done

    hooks = [module.register_forward_pre_hook(partial(begin, name)) for name, (module, _) in waiting.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), suppress(_Done):
            model(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


@register("init")
def kaiming(
    weight: torch.Tensor,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Literal["relu", "tanh", "selu", "linear"] = "relu",
    distribution: Literal["normal", "uniform"] = "normal",
) -> None:
    """Of a variance that keeps the signal's size from layer to layer (He et al. 2015): gain^2 / fan.

    mode: the fan: of what a number is summed from (keeps the outputs' size) or goes to (keeps the gradients')
    nonlinearity: the activation after it, which the gain is for
    distribution: normal, or uniform of the same variance
    """
    fill = nn.init.kaiming_normal_ if distribution == "normal" else nn.init.kaiming_uniform_
    fill(weight, mode=mode, nonlinearity=nonlinearity)


@register("init")
def xavier(
    weight: torch.Tensor, *, distribution: Literal["uniform", "normal"] = "uniform", gain: Positive = 1.0
) -> None:
    """Of variance gain^2 2 / (fan in + fan out) (Glorot & Bengio 2010).

    distribution: uniform, or normal of the same variance
    gain: multiplies the weights
    """
    (nn.init.xavier_uniform_ if distribution == "uniform" else nn.init.xavier_normal_)(weight, gain)


@register("init")
def fan_in(weight: torch.Tensor, *, bound: Positive = 2.4) -> None:
    """Uniform within plus or minus bound / fan in (LeCun et al. 1998, appendix A).

    bound: divided by how many numbers an output is summed from
    """
    limit = bound / math.prod(weight.shape[1:])
    nn.init.uniform_(weight, -limit, limit)


@register("init")
def orthogonal(weight: torch.Tensor, *, gain: Positive = 1.0) -> None:
    """A random orthogonal matrix of the outputs' filters (Saxe et al. 2014).

    gain: multiplies the weights
    """
    nn.init.orthogonal_(weight, gain)


@register("init")
def dirac(weight: torch.Tensor) -> None:
    """The identity: each output channel of a convolution repeats the input channel of its number.

    Outputs beyond the inputs stay as they were drawn (as in arXiv 2404.00498, section 3.3).
    """
    if weight.ndim != 4:
        raise ValueError("needs a convolution")
    nn.init.dirac_(weight[: weight.shape[1]])


@register("init")
def normal(weight: torch.Tensor, *, std: Positive) -> None:
    """Normal with mean 0.

    std: standard deviation
    """
    nn.init.normal_(weight, std=std)


@register("init")
def trunc_normal(weight: torch.Tensor, *, std: Positive = 0.02) -> None:
    """Normal with mean 0, drawn again beyond two standard deviations.

    std: standard deviation before that
    """
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


@register("init")
def zeros(weight: torch.Tensor) -> None:
    """All zero, as the last norm of a residual path may start (Goyal et al. 2017, section 5.1)."""
    nn.init.zeros_(weight)


@register("init")
def constant(weight: torch.Tensor, *, value: Annotated[float, Field(allow_inf_nan=False)]) -> None:
    """All the same.

    value: of every weight
    """
    nn.init.constant_(weight, value)


@register("data_init")
def whitening(layer: nn.Module, inputs: torch.Tensor, *, eps: Positive = 5e-4) -> None:
    """Makes a convolution's outputs uncorrelated and of variance one (arXiv 2404.00498, section 3.2).

    Its filters are the eigenvectors of the covariance of all windows of the images (stride 1, no padding), largest
    eigenvalue first, divided by sqrt(eigenvalue + eps); then their negatives; as many of these as it has channels.

    eps: added to the eigenvalues, so that directions of little variance are not blown up
    """
    if not isinstance(layer, nn.Conv2d) or layer.weight.ndim != 4 or layer.groups != 1:
        raise ValueError("needs a convolution of all channels, without groups or connections")
    out, size = len(layer.weight), math.prod(layer.weight.shape[1:])
    if out > 2 * size:
        raise ValueError(f"windows of {size} numbers have {size} eigenvectors: at most {2 * size} channels, not {out}")
    total = torch.zeros(size, dtype=torch.float64)
    products = torch.zeros(size, size, dtype=torch.float64)
    count = 0
    for some in inputs.split(256):  # bounds the memory that the windows take
        windows = F.unfold(some, layer.kernel_size, layer.dilation).transpose(1, 2).flatten(0, 1).cpu().double()
        total += windows.sum(0)
        products += windows.T @ windows
        count += len(windows)
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - mean[:, None] * mean)  # ascending
    filters = (directions / (variances.clamp(min=0) + eps).sqrt()).T.flip(0)
    layer.weight.copy_(torch.cat((filters, -filters))[:out].view_as(layer.weight))
