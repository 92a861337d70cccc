"""The linear models that the curriculum begins with, trained by the library, against their mathematics."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dltrain import config as configs
from dltrain import shipped
from dltrain.build import Setup, build
from dltrain.runs import new_run
from dltrain.step import Steps

RULE: dict[str, Any] = {
    "model": {"name": "perceptron", "init": "zeros"},
    "loss": "perceptron",
    "descent": {"variant": "stochastic"},
    "optim": {"name": "sgd", "lr": 1},
    "train": {"precision": "fp32"},
}
BINARY = {**RULE, "model": {"name": "perceptron", "init": "zeros", "output": "sigmoid"}}
REAL = os.environ.get("DLTRAIN_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="DLTRAIN_TEST_DATA names no folder with MNIST")


def quiet(line: str) -> None:
    pass


def setup_of(**sections: Any) -> Setup:
    return build(configs.from_plain({"name": "x", **sections}, "here"), quiet)


def trained(setup: Setup, epochs: int) -> np.ndarray:
    """Weights and biases, float64 `[outputs, pixels + 1]`, after so many epochs from where they start."""
    steps = Steps(new_run(setup))
    for epoch in range(epochs):
        steps.run.progress.epoch, steps.run.progress.step = epoch, 0
        for _ in range(setup.steps_per_epoch):
            steps.take()
        steps.read()
    weight, bias = setup.parameters
    return torch.cat([weight, bias[:, None]], 1).detach().double().numpy()


def inputs_of(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """The training images as the model sees them, with a last number that is 1, float64 `[N, pixels + 1]`; labels."""
    rows = setup.normalise(setup.data.train.images).flatten(1)
    return F.pad(rows, (0, 1), value=1).double().numpy(), setup.data.train.labels.numpy()


def regression(data: dict[str, Any], **optim: Any) -> tuple[Setup, np.ndarray, np.ndarray]:
    """Linear regression by batch gradient descent from zero; its inputs; the least-squares weights [K, pixels + 1]."""
    setup = setup_of(
        data=data,
        model=RULE["model"],
        loss="mse",
        descent={"variant": "batch"},
        optim={"name": "sgd", **optim},
        train={"precision": "fp32", "epochs": 200},
    )
    inputs, labels = inputs_of(setup)
    targets = np.eye(len(setup.data.classes))[labels]
    found = torch.linalg.lstsq(torch.from_numpy(inputs), torch.from_numpy(targets), driver="gelsd").solution
    return setup, inputs, found.numpy().T


def test_linear_regression_ends_at_the_least_squares_solution() -> None:
    """Noise in every pixel makes the slowest direction quick enough to be at its end.

    What is left after 200 steps is float32's rounding: 6e-8 of weights of up to 0.1, in sums of 257 products.
    """
    data = {"name": "synthetic", "train": 1000, "test": 50, "size": 16, "channels": 1, "class_count": 4, "noise": 100.0}
    setup, inputs, best = regression(data, lr=0.1, momentum=0.9)
    weights = trained(setup, 200)
    assert np.abs(best).max() > 0.05
    np.testing.assert_allclose(weights, best, atol=1e-5)
    np.testing.assert_allclose(inputs @ weights.T, inputs @ best.T, atol=1e-4)


def test_linear_regression_of_real_digits_nears_it_in_each_direction_as_descent_must() -> None:
    """Along an eigenvector of the loss's second derivative with eigenvalue e, (1 - lr e)^steps of the way is left."""
    setup, inputs, best = regression({"name": "digits"}, lr=0.2)
    weights = trained(setup, 60)
    classes = len(setup.data.classes)
    values, vectors = np.linalg.eigh(2 / classes * inputs.T @ inputs / len(inputs))  # the loss is a mean over classes
    left = (1 - 0.2 * values) ** 60
    expected = (best @ vectors * (1 - left)) @ vectors.T
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    steep = values > 0.5
    assert steep.sum() >= 4
    np.testing.assert_allclose((weights @ vectors)[:, steep], (best @ vectors)[:, steep], rtol=0.02, atol=1e-4)
    guessed, would = (inputs @ weights.T).argmax(1), (inputs @ best.T).argmax(1)
    assert (guessed == would).mean() > 0.94  # flat directions, far from their end, decide little


def by_rosenblatts_rule(setup: Setup, epochs: int) -> tuple[np.ndarray, list[int]]:
    """Weights `[1, pixels + 1]` by the rule of 1958 as a loop over images, and the mistakes of each epoch."""
    inputs, labels = inputs_of(setup)
    batches = setup.batches()
    weights = np.zeros(inputs.shape[1], np.float32)
    mistakes = []
    for epoch in range(epochs):
        mistakes.append(0)
        for image in batches.order(epoch).tolist():
            x, sign = inputs[image].astype(np.float32), np.float32(2 * labels[image] - 1)
            if sign * (weights @ x) <= 0:
                weights += sign * x
                mistakes[-1] += 1
    return weights[None].astype(np.float64), mistakes


def test_the_perceptron_rule_is_rosenblatts_loop_until_nothing_is_wrong() -> None:
    setup = setup_of(**BINARY, data={"name": "digits", "classes": [3, 9]})
    expected, mistakes = by_rosenblatts_rule(setup, 1)
    assert mistakes[0] > 3
    np.testing.assert_allclose(trained(setup, 1), expected, rtol=1e-6)


@pytest.mark.parametrize("classes", [[0, 1], [3, 9]])
def test_the_perceptron_rule_converges_on_a_separable_pair(classes: list[int]) -> None:
    setup = setup_of(**BINARY, data={"name": "digits", "classes": classes})
    _, mistakes = by_rosenblatts_rule(setup, 60)
    last = mistakes.index(0)  # the first epoch without a mistake: its rule changes nothing from here on
    weights = trained(setup, last)
    inputs, labels = inputs_of(setup)
    assert ((inputs @ weights[0] > 0) == labels).all()
    np.testing.assert_array_equal(
        weights, trained(setup_of(**BINARY, data={"name": "digits", "classes": classes}), last + 2)
    )


def test_the_rule_for_ten_classes_moves_two_rows_a_mistake() -> None:
    """The true class's weights get the image, those of the class that was taken for it lose it."""
    setup = setup_of(**RULE, data={"name": "digits", "limit": 200})
    inputs, labels = inputs_of(setup)
    weights = np.zeros((10, inputs.shape[1]), np.float32)
    for image in setup.batches().order(0).tolist():
        x, label = inputs[image].astype(np.float32), labels[image]
        outputs = weights @ x
        others = np.where(np.arange(10) == label, -np.inf, outputs)
        highest = others == others.max()
        if outputs[label] <= others.max():
            weights[label] += x
            weights[highest] -= x / highest.sum()  # rivals that draw, as all do in the first step, share it
    np.testing.assert_allclose(trained(setup, 1), weights, rtol=1e-5, atol=1e-5)


@needs_real_data
def test_mnists_zeros_and_ones_are_told_apart_without_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped recipe on the published images: the loop comes to rest, and the library takes the loop's steps."""
    monkeypatch.setenv("DLTRAIN_DATA", str(REAL))
    config = configs.load(shipped.find("mnist_rosenblatt"), ["train.precision=fp32"])
    setup = build(config, quiet)
    _, mistakes = by_rosenblatts_rule(setup, config.train.epochs)
    assert mistakes[-1] == 0
    expected, _ = by_rosenblatts_rule(setup, 1)
    np.testing.assert_allclose(trained(setup, 1), expected, rtol=1e-5, atol=1e-4)
