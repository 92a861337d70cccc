"""Activations: what stands between two layers, element by element."""

from __future__ import annotations

from collections.abc import Callable

from dltrain.lazy import nn
from dltrain.registry import NonNegative, Positive, register

Shape = tuple[int, ...]  # of one image or of its features: (C, H, W) or (F,)


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
def elu(shape: Shape, outputs: int, *, alpha: Positive = 1.0) -> nn.Module:
    """x where it is positive, else alpha (exp(x) - 1) (Clevert et al. 2016).

    alpha: the negative side tends to minus this
    """
    return nn.ELU(alpha)


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
_plain("identity", "Identity", "x itself: no activation.")
