"""Importing this registers every component that dltrain ships.  None of them imports torch before it is used."""

from dltrain import losses, optim, schedules
from dltrain.data import augment, cifar, digits, mnist
from dltrain.models import activations, cnn, layers, mlp, perceptron

__all__ = [
    "activations",
    "augment",
    "cifar",
    "cnn",
    "digits",
    "layers",
    "losses",
    "mlp",
    "mnist",
    "optim",
    "perceptron",
    "schedules",
]
