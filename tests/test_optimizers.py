"""Optimizers of our own, and what wraps a step, against the papers' definitions as plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dltrain.components  # noqa: F401  registers the optimizers
from dltrain.errors import ConfigError
from dltrain.optimizers import ascend, descend, lookahead, orthogonalise
from dltrain.registry import Section

SHAPES = [(4, 3), (4, 3), (6, 2), (5, 2, 3, 3)]  # two alike, a tall one, a convolution
Weights = list[torch.Tensor]


def build(name: str, parameters: Any, **settings: Any) -> Any:
    return Section("optim").read({"name": name, **settings}).build(parameters)


def weights(channels_last: bool = False, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Matrices, a convolution's weight, and a matrix that no gradient ever reaches."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in (*SHAPES, (2, 2))]
    if channels_last:
        made[3] = made[3].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(each) for each in made]


def gradients(step: int, at: Weights) -> Weights:
    """Of |w|^2 + noise . w, where the noise is a function of the step."""
    random = torch.Generator().manual_seed(step)
    return [2 * w + torch.randn(w.shape, generator=random, dtype=torch.float64).to(w.dtype) for w in at]


def walk(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = rate(step)
        for parameter, gradient in zip(parameters, gradients(step, [p.detach() for p in parameters[:4]]), strict=False):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in the parameter's layout, as autograd's
        optimizer.step()


def rate(step: int) -> float:
    """A warm-up from 0, as a schedule sets it, and one step at 0 later."""
    return 0.0 if step == 9 else 0.05 * min(1.0, step / 4)


def lion(start: Weights, steps: int, beta1: float, beta2: float, weight_decay: float) -> Weights:
    """Chen et al. 2023, algorithm 2."""
    w, m = [each.clone() for each in start], [torch.zeros_like(each) for each in start]
    for step in range(steps):
        for i, g in enumerate(gradients(step, w)):
            c = beta1 * m[i] + (1 - beta1) * g
            w[i] = w[i] - rate(step) * (torch.sign(c) + weight_decay * w[i])
            m[i] = beta2 * m[i] + (1 - beta2) * g
    return w


def quintic(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz by what it does to singular values: U p(p(…p(S / ||S||))) V^T, p(s) = a s + b s^3 + c s^5."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def muon(
    start: Weights,
    steps: int,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adjust_lr: str = "original",
    newton_schulz_steps: int = 5,
    normalize_weights: bool = False,
) -> Weights:
    """Jordan 2024, one matrix at a time, each convolution's filter a row."""
    w, m = [each.clone() for each in start], [torch.zeros_like(each) for each in start]
    for step in range(steps):
        for i, g in enumerate(gradients(step, w)):
            m[i] = momentum * m[i] + (1 - momentum) * g
            u = momentum * m[i] + (1 - momentum) * g if nesterov else m[i]
            u = quintic(u.reshape(len(u), -1), newton_schulz_steps)
            rows, columns = u.shape
            factor = {"original": max(1, rows / columns) ** 0.5, "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5}
            if normalize_weights:
                w[i] = w[i] * rows**0.5 / w[i].norm()
            decayed = (1 - rate(step) * weight_decay) * w[i]
            w[i] = decayed - rate(step) * factor[adjust_lr] * u.reshape(w[i].shape)
    return w


def schedule_free(start: Weights, steps: int, beta: float, weight_decay: float = 0.0) -> tuple[Weights, Weights]:
    """Defazio et al. 2024, equations 3 to 5: (y, x), x as the mean of all z weighted by the squares of their rates."""
    y = [each.clone() for each in start]
    z = [each.clone() for each in start]
    sums, total = [torch.zeros_like(each) for each in start], 0.0
    x = [each.clone() for each in start]
    for step in range(steps):
        total += rate(step) ** 2
        for i, g in enumerate(gradients(step, y)):
            z[i] = z[i] - rate(step) * (g + weight_decay * y[i])
            sums[i] = sums[i] + rate(step) ** 2 * z[i]
            x[i] = sums[i] / total if total else x[i]
            y[i] = (1 - beta) * z[i] + beta * x[i]
    return y, x


CASES = [
    pytest.param(name, settings, by_hand, id=f"{name}-{'-'.join(map(str, settings.values()))}")
    for name, settings, by_hand in [
        ("lion", {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3}, lion),
        ("lion", {"beta1": 0.5, "beta2": 0.8, "weight_decay": 0.0}, lion),
        ("muon", {}, muon),
        ("muon", {"momentum": 0.6, "nesterov": False, "weight_decay": 0.3, "adjust_lr": "match_rms_adamw"}, muon),
        ("muon", {"momentum": 0.6, "newton_schulz_steps": 3, "normalize_weights": True, "weight_decay": 0.3}, muon),
        ("schedule_free_sgd", {"beta": 0.9}, lambda *args, **settings: schedule_free(*args, **settings)[0]),
        ("schedule_free_sgd", {"beta": 0.3, "weight_decay": 0.3}, lambda *args, **s: schedule_free(*args, **s)[0]),
    ]
]
ByHand = Callable[..., Weights]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("name", "settings", "by_hand"), CASES)
def test_fifteen_steps_are_those_of_the_definition(
    name: str, settings: dict[str, Any], by_hand: ByHand, channels_last: bool
) -> None:
    own = weights(channels_last)
    start = [p.detach().clone() for p in own]
    walk(build(name, own, **settings), own, range(15))
    torch.testing.assert_close([p.detach() for p in own[:4]], by_hand(start[:4], 15, **settings), rtol=1e-9, atol=1e-9)
    assert torch.equal(own[4], start[4])
    assert own[3].stride() == start[3].stride()


@pytest.mark.parametrize(("name", "settings", "by_hand"), CASES)
def test_float32_steps_are_those_of_the_definition(name: str, settings: dict[str, Any], by_hand: ByHand) -> None:
    own = weights(dtype=torch.float32)
    start = [p.detach().double() for p in own[:4]]
    walk(build(name, own, **settings), own, range(15))
    torch.testing.assert_close([p.double() for p in own[:4]], by_hand(start, 15, **settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "settings", "by_hand"), CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_state_that_is_put_back_goes_on_with_the_same_bits(
    name: str, settings: dict[str, Any], by_hand: ByHand, channels_last: bool
) -> None:
    straight, before = weights(channels_last, torch.float32), weights(channels_last, torch.float32)
    walk(build(name, straight, **settings), straight, range(15))

    optimizer = build(name, before, **settings)
    walk(optimizer, before, range(7))
    saved = copy.deepcopy(optimizer.state_dict())
    for index, state in saved["state"].items():
        for key, value in state.items():
            if torch.is_tensor(value):  # as a file holds it, and back
                state[key] = torch.empty_like(before[index]).copy_(value.contiguous())
    results = {}
    for stateful in (True, False):
        results[stateful] = [nn.Parameter(p.detach().clone()) for p in before]
        resumed = build(name, results[stateful], **settings)
        if stateful:
            resumed.load_state_dict(saved)
        walk(resumed, results[stateful], range(7, 15))
    assert all(torch.equal(one, other) for one, other in zip(results[True], straight, strict=True))
    assert not torch.equal(results[False][0], straight[0])  # without its state it goes another way


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 30, 30)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalise(matrices, steps=5) @ vh.mT  # diagonal, where the singular vectors are the same
    values = rotated.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(rotated, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 4), steps=5), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_but_for_its_rounding_to_bfloat16(
    nesterov: bool, adjust_lr: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.3}
    own, torchs = weights()[:3], weights()[:3]
    walk(build("muon", own, adjust_lr=adjust_lr, **settings), own, range(5))
    reference = torch.optim.Muon(torchs, adjust_lr_fn=adjust_lr, **settings)
    walk(reference, torchs, range(5))
    start = weights()
    for mine, theirs, first in zip(own, torchs, start, strict=False):
        assert (mine - theirs).norm() < 0.02 * (theirs - first).norm()

    exact = weights()[:3]
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda g, *_: quintic(g, 5))
    walk(torch.optim.Muon(exact, adjust_lr_fn=adjust_lr, **settings), exact, range(5))
    torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-9)


def test_muon_refuses_a_bias() -> None:
    text = r"optim muon: updates matrices and convolutions, not a parameter of shape \[3\].*optim.groups with ndim"
    with pytest.raises(ConfigError, match=text):
        build("muon", [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(("beta", "weight_decay"), [(0.9, 0.0), (0.5, 0.3)])
def test_schedule_free_is_evaluated_at_its_average(beta: float, weight_decay: float) -> None:
    own = weights()
    start = [p.detach().clone() for p in own]
    optimizer = build("schedule_free_sgd", own, beta=beta, weight_decay=weight_decay)
    walk(optimizer, own, range(15))
    found = optimizer.evaluation_weights()
    _, expected = schedule_free(start[:4], 15, beta, weight_decay)
    torch.testing.assert_close([found[p] for p in own[:4]], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[own[4]], start[4])  # the one that had no gradient
    assert not any(each.requires_grad for each in found.values())


def test_schedule_free_averages_to_the_minimum_of_a_noisy_quadratic() -> None:
    """At a constant rate the weights keep jumping about by the noise; their average settles."""
    random = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.full((200,), 5.0))
    optimizer = build("schedule_free_sgd", [w], lr=0.3, beta=0.0)
    for _ in range(2000):
        w.grad = w.detach() - 1 + torch.randn(200, generator=random)
        optimizer.step()
    average, w = optimizer.evaluation_weights()[w], w.detach()
    # w wanders about 1 with a variance of lr / (2 - lr), its mean over n steps with one of 1 / n; of the way there,
    # 4 (1 - lr)^t, the mean keeps 4 / (lr n)
    assert ((w - 1) ** 2).mean() == pytest.approx(0.3 / 1.7, rel=0.3)
    assert ((average - 1) ** 2).mean() == pytest.approx(1 / 2000 + (4 / 0.3 / 2000) ** 2, rel=0.3)


def test_asgd_is_evaluated_at_the_mean_of_its_path() -> None:
    w, still = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(2).double())
    optimizer = build("asgd", [w, still], lr=0.1, t0=3)
    path = []
    for step in range(8):
        w.grad = torch.randn(3, generator=torch.Generator().manual_seed(step)).double()
        optimizer.step()
        path.append(w.detach().clone())
        if step == 2:
            assert torch.equal(optimizer.evaluation_weights()[w], w)
    # torch's share is 1 / max(1, step - t0) with steps counted from 0: the mean starts at the weights of step t0 + 2
    expected = torch.stack(path[4:]).mean(0)
    torch.testing.assert_close(optimizer.evaluation_weights()[w], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(optimizer.evaluation_weights()[still], still)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sharpness_aware_weights_lie_rho_up_the_gradient_and_come_back(channels_last: bool) -> None:
    own = weights(channels_last, torch.float32)
    before = [p.detach().clone() for p in own]
    for p in own[:4]:
        p.grad = 3 * torch.randn_like(p)
    norm = sum((p.grad.double() ** 2).sum() for p in own[:4]).sqrt()
    saved = ascend(own, rho=0.05)
    for p, start in zip(own[:4], before, strict=False):
        torch.testing.assert_close(p.detach(), start + 0.05 * p.grad / norm, check_dtype=False, rtol=1e-6, atol=1e-6)
        assert not torch.equal(p, start)
    assert torch.equal(own[4], before[4])
    descend(own, saved)
    assert all(torch.equal(p, start) and p.stride() == start.stride() for p, start in zip(own, before, strict=True))


def test_sharpness_aware_descent_of_a_quadratic_is_as_worked_out_by_hand() -> None:
    """Of w A w / 2: the gradient at w + rho A w / |A w| is A w + rho A A w / |A w|."""
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
    w, expected = nn.Parameter(torch.ones(2).double()), torch.ones(2).double()
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(10):
        w.grad = matrix @ w.detach()
        saved = ascend([w], rho=0.2)
        w.grad = matrix @ w.detach()
        descend([w], saved)
        optimizer.step()
        gradient = matrix @ expected
        expected = expected - 0.1 * (gradient + 0.2 * matrix @ gradient / gradient.norm())
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-9)


def test_a_zero_gradient_moves_no_weight() -> None:
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    ascend([w], rho=0.1)
    assert torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lookahead_moves_both_weights_to_a_point_between(share: float, channels_last: bool) -> None:
    own = weights(channels_last)
    slow = [p.detach().clone() for p in own]
    expected = [p.detach().clone() for p in own]
    optimizer = torch.optim.SGD(own, lr=0.1)
    for step in range(6):
        walk(optimizer, own, range(step, step + 1))
        if step % 2:
            expected = [each + share * (p.detach() - each) for each, p in zip(expected, own, strict=True)]
            lookahead(own, slow, share)
            torch.testing.assert_close([p.detach() for p in own], expected, rtol=1e-12, atol=1e-12)
            assert all(torch.equal(p, each) for p, each in zip(own, slow, strict=True))
    assert not any(each.requires_grad for each in slow)


def quadratic(channels_last: bool, dtype: torch.dtype) -> tuple[list[nn.Parameter], Callable[[], torch.Tensor]]:
    """A convolution and a bias for it, and their loss: the mean squared distance from what another one computes."""
    random = torch.Generator().manual_seed(1)
    images = torch.randn(8, 2, 6, 6, generator=random, dtype=dtype)
    target, start = (torch.randn(3, 2, 3, 3, generator=random, dtype=dtype) for _ in range(2))
    if channels_last:
        images, start = (each.contiguous(memory_format=torch.channels_last) for each in (images, start))
    w, b = nn.Parameter(start), nn.Parameter(torch.ones(3, dtype=dtype))

    def loss() -> torch.Tensor:
        w.grad = b.grad = None
        outputs = nn.functional.conv2d(images, w, b)
        found = ((outputs - nn.functional.conv2d(images, target)) ** 2).mean()
        found.backward()
        if channels_last and w.grad is not None:
            w.grad = w.grad.contiguous(memory_format=torch.channels_last)  # as cuDNN's come
        return found.detach()

    return [w, b], loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("line_search", ["strong_wolfe", "none"])
def test_lbfgs_is_torchs_in_any_layout(line_search: str, dtype: torch.dtype) -> None:
    search = None if line_search == "none" else line_search
    results = {}
    for channels_last in (False, True):
        params, loss = quadratic(channels_last, dtype)
        optimizer = build("lbfgs", params, lr=0.5, max_iterations=3, history=4, line_search=line_search)
        for _ in range(3):
            optimizer.step(loss)
        results[channels_last] = params
    torchs, loss = quadratic(False, dtype)
    reference = torch.optim.LBFGS(torchs, lr=0.5, max_iter=3, max_eval=76, history_size=4, line_search_fn=search)
    for _ in range(3):
        reference.step(loss)
    assert all(torch.equal(one, other) for one, other in zip(results[False], torchs, strict=True))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(results[True], torchs, rtol=tolerance, atol=tolerance, check_stride=False)


def test_lbfgs_finds_the_minimum_of_a_quadratic_in_few_steps() -> None:
    params, loss = quadratic(True, torch.float64)
    optimizer = build("lbfgs", params, max_iterations=1)
    found = [float(optimizer.step(loss)) for _ in range(60)]
    assert found[-1] < 1e-10 * found[0]
    assert found == sorted(found, reverse=True)  # its line search never goes up


@pytest.mark.parametrize("line_search", ["strong_wolfe", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lbfgs_goes_on_from_its_state_with_the_same_bits(line_search: str, channels_last: bool) -> None:
    settings = {"lr": 0.5, "max_iterations": 2, "history": 6, "line_search": line_search}
    straight, loss = quadratic(channels_last, torch.float32)
    optimizer = build("lbfgs", straight, **settings)
    for _ in range(2):
        optimizer.step(loss)
    saved, at = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in straight]
    for _ in range(3):
        optimizer.step(loss)

    assert [*saved["state"]] == [0]
    state = saved["state"][0]
    numbers = sum(p.numel() for p in straight)
    for key, value in state.items():
        if isinstance(value, list):  # tensors alone, so that a file can hold them
            assert all(each.shape in ((), (numbers,)) and each.is_contiguous() for each in value), key
        else:
            assert isinstance(value, int | float) or value.shape in ((), (numbers,)), key
    for stateful in (True, False):
        resumed, loss = quadratic(channels_last, torch.float32)
        optimizer = build("lbfgs", resumed, **settings)
        with torch.no_grad():
            for p, each in zip(resumed, at, strict=True):
                p.copy_(each)
        if stateful:
            optimizer.load_state_dict(copy.deepcopy(saved))
        for _ in range(3):
            optimizer.step(loss)
        assert all(torch.equal(one, other) for one, other in zip(resumed, straight, strict=True)) == stateful
