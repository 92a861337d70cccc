"""Modules that a layer is built of where torch has none: their classes need torch, so layers import them when built."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layers(nn.Sequential):
    """Layers one after another.  A ReLU in front of a max pooling is computed behind it, on fewer numbers.

    The largest of rectified numbers is the largest number, rectified, and its gradient goes the same way: not a bit
    differs.
    """

    as_written = False  # whether to compute them in the order of the config

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self._ordered: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        for module in self if self.as_written else self._order():
            x = module(x)
        return x

    def _order(self) -> list[nn.Module]:
        if len(self._ordered) != len(self):  # layers are added one by one
            self._ordered = order = list(self)
            for at in range(len(order) - 1):
                if isinstance(order[at], nn.ReLU) and isinstance(order[at + 1], nn.MaxPool2d):
                    order[at], order[at + 1] = order[at + 1], order[at]
        return self._ordered


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Within, every layer is computed where the config has it."""
    stacks = [module for module in model.modules() if isinstance(module, Layers)]
    for each in stacks:
        each.as_written = True
    try:
        yield
    finally:
        for each in stacks:
            each.as_written = False


class Flatten(nn.Flatten):
    """[B, C, H, W] -> [B, C*H*W], whose gradient goes back in the layout that x came in.

    torch's own goes back contiguous, and a max pooling in channels_last then copies all of its gradient twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.ndim == 4 and not x.is_contiguous():
            x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return super().forward(x)


class Rows(nn.Module):
    """[B, C, H, W] -> [B, C*W, H]: the rows of an image one after another, their pixels as channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1, 2)


class Residual(nn.Module):
    """path(x) + shortcut(x), for x of any shape that both take to the same one."""

    def __init__(self, path: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.path(x) + self.shortcut(x)
        return total


class PadShortcut(nn.Module):
    """Every stride-th pixel, and zeros as further channels: [B, C, H, W] -> [B, channels, H', W']."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.channels - x.shape[1]))


class Concat(nn.Module):
    """What the branches make of x, one after another along the channels (or features)."""

    def __init__(self, branches: list[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """x times gate(x), which broadcasts to it."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = x * self.gate(x)
        return gated


class DropPath(nn.Module):
    """While training: x `[B, …]` with whole images at zero, by chance, and the others scaled up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Multiply(nn.Module):
    """x times a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ScaledTanh(nn.Module):
    """amplitude * tanh(slope * x)."""

    def __init__(self, amplitude: float, slope: float) -> None:
        super().__init__()
        self.amplitude = amplitude
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.amplitude * torch.tanh(self.slope * x)


class Scale(nn.Module):
    """x `[B, C, …]` times a learned number for each channel, plus a learned one if it has a bias."""

    def __init__(self, shape: tuple[int, ...], value: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((shape[0],), value))  # of one dimension, as those of a normalisation
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        size = (-1, *[1] * (x.ndim - 2))
        weight = self.weight.view(size)
        return x * weight if self.bias is None else torch.addcmul(self.bias.view(size), x, weight)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels at each place: [B, C, …] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RadialBasis(nn.Module):
    """Minus the squared distances of x `[B, F]` to fixed random codes of +1 and -1: `[B, out]`."""

    codes: Tensor

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(2, (out, features)) * 2.0 - 1)

    def forward(self, x: Tensor) -> Tensor:
        distances: Tensor = (x[:, None] - self.codes).square().sum(2)
        return -distances


class TableConv2d(nn.Conv2d):
    """A convolution with a list of input channels for each output channel; no other connection has parameters.

    weight: [connections, height, width], in the order of the outputs' lists
    """

    index: Tensor  # int64 [connections]: out * in_channels + in

    def __init__(self, channels: int, connections: list[list[int]], **settings: object) -> None:
        super().__init__(channels, len(connections), **settings)  # type: ignore[arg-type]
        self.fans = [len(sources) for sources in connections]
        places = [out * channels + source for out, sources in enumerate(connections) for source in sources]
        self.register_buffer("index", torch.tensor(places))
        self.weight = nn.Parameter(self.weight.detach().flatten(0, 1)[self.index])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.new_zeros(self.out_channels * self.in_channels, *self.kernel_size)
        dense = rows.index_copy(0, self.index, self.weight)
        dense = dense.view(self.out_channels, self.in_channels, *self.kernel_size)
        convolved: Tensor = self._conv_forward(x, dense, self.bias)
        return convolved
