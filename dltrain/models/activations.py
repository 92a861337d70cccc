"""Activations: what stands between two layers, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from dltrain.lazy import nn
from dltrain.registry import NonNegative, Positive, register

Shape = tuple[int, ...]  # of one image or of its features: (C, H, W) or (F,)
Finite = Annotated[float, Field(allow_inf_nan=False)]


@register("activation")
def relu(shape: Shape, outputs: int) -> nn.Module:
    """max(0, x)."""
    return nn.ReLU()


@register("activation")
def leaky_relu(shape: Shape, outputs: int, *, slope: NonNegative = 0.01) -> nn.Module:
    """x where it is positive, else slope times x.

    slope: of the negative side
    """
    return nn.LeakyReLU(slope)


@register("activation")
def prelu(shape: Shape, outputs: int, *, slope: Finite = 0.25, shared: bool = False) -> nn.Module:
    """As leaky_relu, with a slope that is learned for each channel (He et al. 2015).

    slope: where it starts
    shared: one slope for all channels
    """
    return nn.PReLU(1 if shared else shape[0], slope)


@register("activation")
def elu(shape: Shape, outputs: int, *, alpha: Positive = 1.0) -> nn.Module:
    """x where it is positive, else alpha (exp(x) - 1) (Clevert et al. 2016).

    alpha: the negative side tends to minus this
    """
    return nn.ELU(alpha)


@register("activation")
def celu(shape: Shape, outputs: int, *, alpha: Positive = 1.0) -> nn.Module:
    """x where it is positive, else alpha (exp(x / alpha) - 1): an elu whose slope has no jump (Barron 2017).

    alpha: the negative side tends to minus this
    """
    return nn.CELU(alpha)


@register("activation")
def softplus(shape: Shape, outputs: int, *, beta: Positive = 1.0) -> nn.Module:
    """log(1 + exp(beta x)) / beta: a smooth relu.

    beta: the larger, the sharper the bend
    """
    return nn.Softplus(beta)


@register("activation")
def hardtanh(shape: Shape, outputs: int, *, low: Finite = -1.0, high: Finite = 1.0) -> nn.Module:
    """x, but never below `low` or above `high`.

    low: the smallest value
    high: the largest value
    """
    if low >= high:
        raise ValueError(f"low: {low:g} is not below high: {high:g}")
    return nn.Hardtanh(low, high)


@register("activation")
def softshrink(shape: Shape, outputs: int, *, threshold: NonNegative = 0.5) -> nn.Module:
    """x moved towards zero by the threshold, and no further than zero.

    threshold: what is as near to zero as this becomes zero
    """
    return nn.Softshrink(threshold)


@register("activation")
def hardshrink(shape: Shape, outputs: int, *, threshold: NonNegative = 0.5) -> nn.Module:
    """x where it is farther from zero than the threshold, else 0.

    threshold: what is as near to zero as this becomes zero
    """
    return nn.Hardshrink(threshold)


@register("activation")
def scaled_tanh(shape: Shape, outputs: int, *, amplitude: Positive = 1.7159, slope: Positive = 2 / 3) -> nn.Module:
    """amplitude tanh(slope x), which by default takes 1 to 1 and -1 to -1 (LeCun et al. 1998, appendix A).

    amplitude: of the values
    slope: multiplies x
    """
    from dltrain.modules import ScaledTanh

    return ScaledTanh(amplitude, slope)


@register("activation")
def softmax(shape: Shape, outputs: int) -> nn.Module:
    """exp(x) divided by its sum over the channels, or over all numbers of a row.

    Not for the end of a model: losses take its outputs as they are, and `model.output` says what becomes of them.
    """
    return nn.Softmax(dim=1)


def _plain(name: str, module: str, formula: str) -> None:
    """Registers an activation without settings."""

    def build(shape: Shape, outputs: int) -> nn.Module:
        found: Callable[[], nn.Module] = getattr(nn, module)
        return found()

    build.__doc__ = formula
    register("activation", name)(build)


_plain("tanh", "Tanh", "The hyperbolic tangent, -1..1.")
_plain("sigmoid", "Sigmoid", "1 / (1 + exp(-x)), 0..1.")
_plain("gelu", "GELU", "x times the normal distribution's cumulative at x (Hendrycks & Gimpel 2016).")
_plain("silu", "SiLU", "x sigmoid(x), also called swish (Elfwing et al. 2018).")
_plain("mish", "Mish", "x tanh(log(1 + exp(x))) (Misra 2020).")
_plain("selu", "SELU", "An elu scaled so that activations keep mean 0 and variance 1 (Klambauer et al. 2017).")
_plain("relu6", "ReLU6", "min(max(0, x), 6).")
_plain("hardsigmoid", "Hardsigmoid", "min(max(0, x + 3), 6) / 6: a sigmoid of straight lines.")
_plain("hardswish", "Hardswish", "x min(max(0, x + 3), 6) / 6 (Howard et al. 2019).")
_plain("softsign", "Softsign", "x / (1 + |x|).")
_plain("log_sigmoid", "LogSigmoid", "log(1 / (1 + exp(-x))).")
_plain("tanhshrink", "Tanhshrink", "x - tanh(x).")
_plain("identity", "Identity", "x itself: no activation.")
