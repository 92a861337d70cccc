"""Optimizers against torch's own, and against problems whose solution is known."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dltrain.components  # noqa: F401  registers the optimizers
from dltrain import registry
from dltrain.errors import ConfigError
from dltrain.registry import Section

# name, settings as a config has them, torch's class, the same settings as torch has them
CASES = [
    pytest.param(name, settings, reference, expected, id=f"{name}-{'-'.join(settings)}")
    for name, settings, reference, expected in [
        ("sgd", {"lr": 0.1}, "SGD", {"lr": 0.1}),
        ("sgd", {"lr": 0.1, "momentum": 0.9}, "SGD", {"lr": 0.1, "momentum": 0.9}),
        (
            "sgd",
            {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            "SGD",
            {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        ),
        ("adam", {}, "Adam", {"lr": 1e-3}),
        (
            "adam",
            {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
            "Adam",
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        ),
        ("adam", {"lr": 0.02, "amsgrad": True}, "Adam", {"lr": 0.02, "amsgrad": True}),
        ("adamw", {}, "AdamW", {"lr": 1e-3}),
        (
            "adamw",
            {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True},
            "AdamW",
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True},
        ),
        ("rmsprop", {}, "RMSprop", {"lr": 1e-2}),
        (
            "rmsprop",
            {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
            "RMSprop",
            {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
        ),
        ("adagrad", {}, "Adagrad", {"lr": 1e-2}),
        (
            "adagrad",
            {"lr": 0.2, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.1},
            "Adagrad",
            {"lr": 0.2, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.1},
        ),
        ("adadelta", {}, "Adadelta", {"lr": 1.0}),
        (
            "adadelta",
            {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1},
            "Adadelta",
            {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1},
        ),
        ("adamax", {}, "Adamax", {"lr": 2e-3}),
        (
            "adamax",
            {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
            "Adamax",
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        ),
        ("nadam", {}, "NAdam", {"lr": 2e-3}),
        (
            "nadam",
            {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "momentum_decay": 0.1, "weight_decay": 0.1},
            "NAdam",
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "momentum_decay": 0.1, "weight_decay": 0.1},
        ),
        (
            "nadam",
            {"weight_decay": 0.5, "decoupled_weight_decay": True},
            "NAdam",
            {"weight_decay": 0.5, "decoupled_weight_decay": True},
        ),
        ("radam", {}, "RAdam", {"lr": 1e-3}),
        (
            "radam",
            {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
            "RAdam",
            {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        ),
        (
            "radam",
            {"weight_decay": 0.5, "decoupled_weight_decay": True},
            "RAdam",
            {"weight_decay": 0.5, "decoupled_weight_decay": True},
        ),
        ("asgd", {}, "ASGD", {"lr": 1e-2}),
        (
            "asgd",
            {"lr": 0.05, "lambd": 0.1, "alpha": 0.5, "t0": 3, "weight_decay": 0.1},
            "ASGD",
            {"lr": 0.05, "lambd": 0.1, "alpha": 0.5, "t0": 3, "weight_decay": 0.1},
        ),
    ]
]


def build(name: str, parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return Section("optim").read({"name": name, **settings}).build(parameters)


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix, a vector, a convolution's weight in channels_last, and one that no gradient ever reaches."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=random, dtype=dtype) for shape in ((4, 3), (3,), (4, 3, 5, 5), (2,))]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(each) for each in made]


def walk(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Steps along gradients that are a function of the step and of where the parameters are."""
    for step in steps:
        optimizer.zero_grad()
        random = torch.Generator().manual_seed(step)
        for parameter in parameters[:3]:
            noise = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
            ((parameter**2).sum() + (noise * parameter).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "settings", "reference", "expected"), CASES)
def test_twenty_steps_are_torchs(name, settings, reference, expected):
    own, torchs = weights(torch.float64), weights(torch.float64)
    walk(build(name, own, **settings), own, range(20))
    walk(getattr(torch.optim, reference)(torchs, foreach=False, **expected), torchs, range(20))
    torch.testing.assert_close(own, torchs, rtol=1e-9, atol=1e-9)
    assert not torch.equal(own[0], weights(torch.float64)[0])
    assert torch.equal(own[3], weights(torch.float64)[3])


@pytest.mark.parametrize(("name", "settings", "reference", "expected"), CASES)
def test_float32_steps_have_the_bits_of_torchs_fastest_kind(name, settings, reference, expected):
    own, torchs = weights(), weights()
    walk(build(name, own, **settings), own, range(20))
    fused = {"fused": True} if reference in ("SGD", "Adam", "AdamW", "Adagrad") else {}  # those that torch has it for
    walk(getattr(torch.optim, reference)(torchs, **fused, **expected), torchs, range(20))
    for mine, theirs in zip(own, torchs, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("name", "settings", "reference", "expected"), CASES)
def test_a_state_that_is_put_back_goes_on_with_the_same_bits(name, settings, reference, expected):
    straight = weights()
    walk(build(name, straight, **settings), straight, range(20))

    before = weights()
    optimizer = build(name, before, **settings)
    walk(optimizer, before, range(10))
    saved = copy.deepcopy(optimizer.state_dict())
    for parameter, state in zip(before, saved["state"].values(), strict=False):
        for key, value in state.items():
            if value.ndim:  # as a file holds it, and back
                state[key] = torch.empty_like(parameter).copy_(value.contiguous())
    for stateful in (True, False):
        after = [nn.Parameter(each.detach().clone()) for each in before]
        resumed = build(name, after, **settings)
        if stateful:
            resumed.load_state_dict(saved)
        walk(resumed, after, range(10, 20))
        same = all(torch.equal(one, other) for one, other in zip(after, straight, strict=True))
        assert same or not stateful
    if saved["state"] and any(value.ndim for value in saved["state"][0].values() if torch.is_tensor(value)):
        assert not same  # without its state the optimizer goes another way, so the comparison can fail
    assert type(optimizer).__name__ == reference  # what a checkpoint records


# a rate for each that suits the problems below, on which it decays to nothing
RATES = [
    ("sgd", {"lr": 1.0}),
    ("sgd", {"lr": 0.3, "momentum": 0.9}),
    ("sgd", {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    ("adam", {"lr": 0.1}),
    ("adam", {"lr": 0.1, "amsgrad": True}),
    ("adamw", {"lr": 0.1, "weight_decay": 0.0}),
    ("rmsprop", {"lr": 0.1}),
    ("rmsprop", {"lr": 0.03, "centered": True, "momentum": 0.5}),
    ("adagrad", {"lr": 1.0}),
    ("adadelta", {"lr": 10.0}),
    ("adamax", {"lr": 0.2}),
    ("nadam", {"lr": 0.1}),
    ("radam", {"lr": 0.3}),
    ("asgd", {"lr": 1.0, "lambd": 0.0}),
    ("lion", {"lr": 0.1, "beta1": 0.95, "beta2": 0.98}),
    ("schedule_free_sgd", {"lr": 5.0}),
    ("muon", {"lr": 0.1, "momentum": 0.5}),
]


def minimise(name: str, settings: dict[str, Any], loss: Any, at: torch.Tensor, steps: int = 300) -> torch.Tensor:
    parameter = nn.Parameter(at.clone()[None])  # a matrix, for the sake of muon
    optimizer = build(name, [parameter], **settings)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = settings["lr"] * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(parameter[0]).backward()
        optimizer.step()
    if registry.find(name, "optim").facts.get("averages"):
        return optimizer.evaluation_weights()[parameter][0]
    return parameter.detach()[0]


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `[80, 3]` and noisy answers `[80]` of 0 or 1."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=random, dtype=torch.float64)
    noise = torch.randn(80, generator=random, dtype=torch.float64)
    return x, (x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise > 0).double()


@pytest.mark.parametrize(("name", "settings"), RATES)
def test_a_quadratic_is_brought_to_its_minimum(name, settings):
    x, y = problem()
    matrix = x.T @ x / len(x)
    solution = torch.linalg.solve(matrix, x.T @ y / len(x))
    found = minimise(name, settings, lambda w: ((x @ w - y) ** 2).mean() / 2, torch.ones(3).double())
    torch.testing.assert_close(found, solution, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "settings"), RATES)
def test_logistic_regression_reaches_what_newtons_method_does(name, settings):
    x, y = problem()
    penalty = 0.1

    def loss(w: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + penalty * (w**2).sum() / 2

    solution = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):
        p = torch.sigmoid(x @ solution)
        gradient = x.T @ (p - y) / len(x) + penalty * solution
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + penalty * torch.eye(3, dtype=torch.float64)
        solution = solution - torch.linalg.solve(hessian, gradient)
    torch.testing.assert_close(minimise(name, settings, loss, torch.ones(3).double()), solution, rtol=0, atol=1e-4)


def test_weight_decay_of_sgd_is_an_l2_penalty():
    x, y = problem()
    penalised = x.T @ x / len(x) + 0.3 * torch.eye(3, dtype=torch.float64)
    solution = torch.linalg.solve(penalised, x.T @ y / len(x))
    settings = {"lr": 1.0, "weight_decay": 0.3}
    found = minimise("sgd", settings, lambda w: ((x @ w - y) ** 2).mean() / 2, torch.ones(3).double())
    torch.testing.assert_close(found, solution, rtol=0, atol=1e-6)


def test_weight_decay_of_adamw_shrinks_the_weights_beside_the_gradient():
    parameter = nn.Parameter(torch.tensor([2.0]).double())
    optimizer = build("adamw", [parameter], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        parameter.grad = torch.zeros(1).double()
        optimizer.step()
    assert parameter.item() == pytest.approx(2 * (1 - 0.1 * 0.5) ** 3)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ConfigError, match=r"optim sgd: nesterov needs a momentum above 0"):
        build("sgd", weights(), lr=0.1, nesterov=True)


def test_every_optimizer_is_tested_here():
    own = {"lion", "muon", "schedule_free_sgd"}  # in test_optimizers.py
    searching = {"lbfgs"}
    assert {case.values[0] for case in CASES} | own == {name for name, _ in RATES}
    assert {name for name, _ in RATES} | searching == set(registry.names("optim"))


WITHOUT_THE_COMPILER = """
import sys
import torch
import dltrain.components
from dltrain.registry import Section, find, names
for name in names("optim"):
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Section("optim").read({"name": name, "lr": 0.1}).build([parameter])
    def closure():
        optimizer.zero_grad()
        loss = (parameter ** 2).sum()
        loss.backward()
        return loss.detach()
    def step():
        if find(name, "optim").facts.get("closure"):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    step()
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    assert parameter.max() < 1
print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))])
"""


def test_no_optimizer_imports_torchs_compiler():
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_COMPILER], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
