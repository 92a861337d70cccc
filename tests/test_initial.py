"""How weights start: the distributions, what an init sees of a weight, and what is made from images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dltrain.components  # noqa: F401  registers the initialisations
from dltrain import registry
from dltrain.errors import ConfigError
from dltrain.models.initial import initialise_from_data, wants_data
from dltrain.registry import Item, Section, register


def layer(written: Any, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = Item("layer", "activation").read(written)(shape, 10)
    return module


def model(name: str, shape: tuple[int, ...], outputs: int, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = Section("model").read({"name": name, **settings}).build(shape, outputs)
    return built


def linear(init: Any) -> torch.Tensor:
    """[200, 300]: fan in 300, fan out 200."""
    weight: torch.Tensor = layer({"linear": {"out": 200, "init": init}}, (300,)).weight  # type: ignore[assignment]
    return weight.detach()


@pytest.mark.parametrize(
    ("init", "std"),
    [
        ("kaiming", math.sqrt(2 / 300)),
        ({"kaiming": "fan_out"}, math.sqrt(2 / 200)),
        ({"kaiming": {"nonlinearity": "linear"}}, math.sqrt(1 / 300)),
        ({"kaiming": {"nonlinearity": "tanh"}}, 5 / 3 * math.sqrt(1 / 300)),
        ({"xavier": "normal"}, math.sqrt(2 / 500)),
        ({"xavier": {"distribution": "normal", "gain": 3}}, 3 * math.sqrt(2 / 500)),
        ({"normal": 0.3}, 0.3),
    ],
)
def test_a_normal_init_has_the_papers_deviation(init, std):
    weight = linear(init) / std
    assert weight.mean().item() == pytest.approx(0, abs=0.02)  # 60,000 draws: +- 0.004
    assert weight.std().item() == pytest.approx(1, abs=0.02)
    assert (weight.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.01)
    assert weight.abs().max() > 3.5


@pytest.mark.parametrize(
    ("init", "bound"),
    [
        ({"kaiming": {"distribution": "uniform"}}, math.sqrt(6 / 300)),
        ({"kaiming": {"distribution": "uniform", "mode": "fan_out"}}, math.sqrt(6 / 200)),
        ("xavier", math.sqrt(6 / 500)),
        ({"xavier": {"gain": 2}}, 2 * math.sqrt(6 / 500)),
        ("fan_in", 2.4 / 300),
        ({"fan_in": 1}, 1 / 300),
    ],
)
def test_a_uniform_init_fills_its_interval_and_no_more(init, bound):
    weight = linear(init) / bound
    assert 0.999 < weight.abs().max().item() <= 1.000001
    assert weight.mean().item() == pytest.approx(0, abs=0.02)
    assert (weight.abs() < 0.5).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_truncated_normal_ends_at_two_deviations():
    weight = linear({"trunc_normal": 0.5})
    assert 0.99 < weight.abs().max().item() <= 1
    # of a normal distribution without what lies beyond two deviations
    assert weight.std().item() == pytest.approx(0.5 * 0.8796, abs=0.01)


def test_an_orthogonal_init_keeps_lengths():
    weight = linear({"orthogonal": 2})
    torch.testing.assert_close(weight @ weight.T, 4 * torch.eye(200), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("init", "value"), [("zeros", 0), ({"constant": -0.5}, -0.5)])
def test_a_constant_init_is_constant(init, value):
    assert linear(init).unique().tolist() == [value]


@pytest.mark.parametrize(
    "written",
    [
        {"conv": {"out": 4, "padding": "same", "init": "dirac"}},
        {"conv": {"out": 4, "padding": "same", "kernel": [5, 1], "groups": 2, "init": "dirac"}},
        {"conv": {"out": 4, "padding": "same", "groups": "depthwise", "init": "dirac"}},
        {"conv_transpose": {"out": 4, "padding": 1, "init": "dirac"}},
        {"conv_transpose": {"out": 4, "padding": 1, "groups": 2, "init": "dirac"}},
    ],
)
def test_dirac_is_the_identity(written):
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(layer(written, (4, 6, 5))(x), x)


def test_dirac_leaves_the_outputs_beyond_the_inputs_as_drawn():
    built, drawn = (layer({"conv": {"out": 7, "padding": "same", **own}}, (4, 5, 5)) for own in ({"init": "dirac"}, {}))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(built(x)[:, :4], x)
    assert torch.equal(built.weight[4:], drawn.weight[4:])
    fewer = layer({"conv": {"out": 3, "padding": "same", "init": "dirac"}}, (4, 5, 5))
    assert torch.equal(fewer(x), x[:, :3])


@pytest.mark.parametrize(
    ("written", "fan_in"),
    [
        ({"conv": {"out": 8, "kernel": [3, 5]}}, 6 * 15),
        ({"conv": {"out": 8, "groups": 2}}, 3 * 9),
        ({"conv": {"out": 12, "groups": "depthwise"}}, 9),
        ({"conv_transpose": {"out": 8, "kernel": 3}}, 6 * 9),
        ({"conv_transpose": {"out": 8, "kernel": 3, "groups": 2}}, 3 * 9),
        ({"conv": {"out": 8, "connections": [[0], [1], [2], [3], [4], [5], [0], [1]]}}, 9),
    ],
)
def test_a_fan_is_what_one_output_is_summed_from(written, fan_in):
    ((name, settings),) = written.items()
    weight = layer({name: {**settings, "init": "fan_in"}}, (6, 8, 8)).weight
    assert 0.9 < weight.abs().max().item() * fan_in / 2.4 <= 1.000001


def test_a_connection_tables_fan_is_each_outputs_own():
    settings = {"out": 2, "kernel": 8, "connections": [[0], [0, 1, 2, 3]], "init": "fan_in"}
    weight = layer({"conv": settings}, (4, 9, 9)).weight
    assert 0.9 < weight[:1].abs().max().item() * 64 / 2.4 <= 1.000001
    assert 0.9 < weight[1:].abs().max().item() * 256 / 2.4 <= 1.000001


@pytest.mark.parametrize("name", ["batchnorm", "layernorm", "instancenorm"])
def test_a_norms_scale_may_start_at_zero(name):
    built = layer({name: {"init": "zeros"}}, (3, 4, 4))
    assert not built(torch.randn(2, 3, 4, 4)).any()
    assert layer(name, (3, 4, 4)).weight.tolist() == [1, 1, 1]


def test_a_groupnorms_scale_may_start_at_zero():
    assert not layer({"groupnorm": {"groups": 1, "init": "zeros"}}, (3, 4, 4))(torch.randn(2, 3, 4, 4)).any()


LAYERS = [
    {"conv": {"out": 4, "connections": [[0], [1], [2], [0, 1]]}},
    "batchnorm",
    "prelu",
    {"residual": {"layers": [{"conv": {"out": 6, "stride": 2}}], "shortcut": "projection"}},
    {"conv_transpose": 3},
    {"conv": {"out": 3, "init": {"constant": 7}}},
    "flatten",
    {"linear": "classes"},
]


@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("perceptron", {}, 0),
        ("mlp", {"hidden": [4], "batchnorm": True, "activation": "prelu"}, 0),
        ("cnn", {"layers": LAYERS}, 1),
    ],
)
def test_a_models_init_is_of_all_weights_that_have_none_of_their_own(name, settings, own):
    built = model(name, (3, 9, 9), 10, init={"constant": 0.5}, **settings)
    weighted = [each for each in built.modules() if isinstance(each, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    others = [each for each in built.modules() if isinstance(each, nn.BatchNorm2d | nn.BatchNorm1d | nn.PReLU)]
    values = [each.weight.unique().tolist() for each in weighted]
    assert values.count([0.5]) == len(weighted) - own
    assert values.count([7.0]) == own
    assert not any(each.bias.any() for each in weighted if each.bias is not None)
    assert {each.weight.unique().item() for each in others} <= {1.0, 0.25}


def test_without_an_init_weights_and_biases_are_torchs():
    built = layer({"linear": 5}, (3,))
    torch.manual_seed(0)
    torchs = nn.Linear(3, 5)
    assert torch.equal(built.weight, torchs.weight)
    assert torch.equal(built.bias, torchs.bias)


def test_nothing_starts_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: dict(each) for kind, each in registry._entries.items()})

    @register("init")
    def by_value(weight: torch.Tensor) -> None:
        """What reads its values, which meta tensors have none of."""
        weight.fill_(weight.max().item() + 1)

    with torch.device("meta"):
        for init in ("by_value", "orthogonal", "whitening"):
            assert layer({"conv": {"out": 4, "init": init}}, (3, 5, 5)).weight.is_meta
    assert (layer({"conv": {"out": 4, "init": "by_value"}}, (3, 5, 5)).weight > 1).all()


def pictures(count: int = 300, channels: int = 3) -> torch.Tensor:
    """Images whose neighbouring pixels and channels agree, off zero."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(count, channels, 12, 12, generator=generator)
    return F.avg_pool2d(noise, 3, 1) * torch.tensor([1.0, 2, 3])[:channels, None, None] + noise[:, :1, 1:-1, 1:-1] + 0.5


def whitened(out: int, eps: float = 1e-9, **settings: Any) -> nn.Module:
    init = {"whitening": eps}
    layers = [{"conv": {"out": out, "kernel": 2, "init": init, **settings}}, "globalpool", {"linear": "classes"}]
    return model("cnn", (3, 10, 10), 10, layers=layers)


def covariance(outputs: torch.Tensor) -> torch.Tensor:
    return torch.cov(outputs.transpose(0, 1).flatten(1).double(), correction=0)


def test_whitened_windows_are_uncorrelated_and_of_variance_one():
    built, images = whitened(12), pictures()
    initialise_from_data(built, images)
    torch.testing.assert_close(covariance(built[0](images)), torch.eye(12).double(), rtol=1e-3, atol=1e-3)
    assert not built[0].bias.any()


def test_whitening_has_each_filters_negative_after_all_filters():
    built, images = whitened(24), pictures()
    initialise_from_data(built, images)
    weight = built[0].weight
    assert torch.equal(weight[12:], -weight[:12])
    torch.testing.assert_close(covariance(built[0](images))[:12, :12], torch.eye(12).double(), rtol=1e-3, atol=1e-3)


def test_whitening_begins_with_the_direction_of_most_variance_and_eps_damps_the_rest():
    images = pictures()
    built, damped = whitened(5), whitened(5, eps=0.5)
    for each in (built, damped):
        initialise_from_data(each, images)
    windows = F.unfold(images, 2).transpose(1, 2).flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(torch.cov(windows.T, correction=0))
    largest = variances.flip(0)[:5]
    filters = built[0].weight.flatten(1).double()
    torch.testing.assert_close(filters.square().sum(1), 1 / largest, rtol=1e-4, atol=0)
    aligned = (filters * largest.sqrt()[:, None]) @ directions.flip(1)[:, :5]
    torch.testing.assert_close(aligned.abs(), torch.eye(5).double(), rtol=1e-3, atol=1e-3)
    shrunk = (largest / (largest + 0.5)).diag()
    torch.testing.assert_close(covariance(damped[0](images)), shrunk, rtol=1e-3, atol=1e-3)


def test_layers_start_in_order_each_from_what_the_ones_before_it_give():
    conv = {"kernel": 3, "padding": 1, "stride": 2, "init": {"whitening": 1e-9}}
    layers = [
        {"conv": {"out": 5, **conv}},
        {
            "residual": {
                "shortcut": "projection",
                "layers": ["batchnorm", "elu", {"conv": {**conv, "out": 4, "kernel": 1, "padding": 0}}],
            }
        },
        "flatten",
        {"linear": "classes"},
    ]
    built, images = model("cnn", (3, 10, 10), 10, layers=layers), pictures(200)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    assert wants_data(built)
    initialise_from_data(built, images)
    changed = {name for name, tensor in built.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0_conv.weight", "1_residual.path.2_conv.weight"}
    assert all(module.training for module in built.modules())
    assert not any(module._forward_pre_hooks for module in built.modules())
    inside = built.eval()[1].path[:2](built[0](images)).double()
    weight = built[1].path[2].weight.double()
    torch.testing.assert_close(covariance(F.conv2d(inside, weight)), torch.eye(4).double(), rtol=1e-3, atol=1e-3)


def test_a_model_without_whitening_wants_no_data():
    built = model(
        "cnn", (3, 10, 10), 10, layers=[{"conv": {"out": 4}}, "flatten", {"linear": "classes"}], init="kaiming"
    )
    assert not wants_data(built)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (
            [{"conv": {"out": 25, "kernel": 2, "init": "whitening"}}],
            "layer '0_conv': init whitening: windows of 12 numbers have 12 eigenvectors: at most 24 channels, not 25",
        ),
        (
            ["relu", {"conv": {"out": 6, "groups": 3, "init": "whitening"}}],
            "layer '1_conv': init whitening: needs a conv",
        ),
        ([{"conv": {"out": 1, "connections": [[0]], "init": "whitening"}}], "init whitening: needs a convolution"),
        (
            [{"conv_transpose": {"out": 3, "init": "whitening"}}],
            "layer '0_conv_transpose': init whitening: needs a conv",
        ),
    ],
)
def test_what_cannot_be_whitened_is_told_with_its_layer(layers, said):
    built = model("cnn", (3, 10, 10), 10, layers=[*layers, "globalpool", {"linear": "classes"}])
    with pytest.raises(ConfigError) as caught:
        initialise_from_data(built, pictures(5))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_pre_hooks for module in built.modules())
