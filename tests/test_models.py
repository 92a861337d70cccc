"""Models and layers against numbers worked out by hand and second ways of computing; what wrong lists are told."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dltrain import config as configs
from dltrain.build import build_model
from dltrain.errors import ConfigError
from dltrain.models.layers import shape_after
from dltrain.modules import as_written
from dltrain.registry import Item, Section
from dltrain.yamlfile import Document


def model(name: str, shape: tuple[int, ...], outputs: int, **settings: Any) -> nn.Module:
    return Section("model").read({"name": name, **settings}).build(shape, outputs)


def cnn(layers: list[Any], shape: tuple[int, ...] = (3, 8, 8), outputs: int = 10) -> nn.Module:
    return model("cnn", shape, outputs, layers=layers)


def layer(written: Any, shape: tuple[int, ...], outputs: int = 10) -> nn.Module:
    return Item("layer", "activation").read(written)(shape, outputs).double()


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def config(**changes: Any) -> configs.Config:
    written = {"name": "x", "data": "digits", "model": {"name": "mlp", "hidden": [8]}, "optim": {"name": "adam"}}
    return configs.check(Document("x.yaml", {**written, **changes}))


SMALL_CNN = [
    {"conv": {"out": 4, "kernel": 3, "padding": "same", "bias": False}},  # 3*4*9
    "batchnorm",  # 2*4
    "relu",
    {"maxpool": 2},  # 4x4x4
    {"conv": {"out": 6, "kernel": 3, "groups": 2}},  # 6*2*9 + 6; 6x2x2
    {"dropout": 0.5},
    "flatten",  # 24
    {"linear": "classes"},  # 24*10 + 10
]


@pytest.mark.parametrize(
    ("name", "settings", "shape", "expected"),
    [
        ("perceptron", {}, (1, 28, 28), 784 * 10 + 10),
        ("perceptron", {"bias": False}, (1, 28, 28), 784 * 10),
        ("perceptron", {}, (3, 32, 32), 3072 * 10 + 10),
        ("mlp", {"hidden": []}, (1, 28, 28), 784 * 10 + 10),
        ("mlp", {"hidden": [256, 128]}, (1, 28, 28), 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10),
        ("mlp", {"hidden": [256, 128], "dropout": 0.5, "activation": "gelu"}, (1, 28, 28), 235_146),
        # no bias below a batch norm, which has a scale and a shift of its own
        ("mlp", {"hidden": [20, 30], "batchnorm": True}, (3, 2, 2), 12 * 20 + 40 + 20 * 30 + 60 + 30 * 10 + 10),
        ("cnn", {"layers": SMALL_CNN}, (3, 8, 8), 108 + 8 + 114 + 250),
    ],
)
def test_a_model_has_the_parameters_and_outputs_that_its_settings_say(name, settings, shape, expected):
    built = model(name, shape, 10, **settings)
    assert parameters(built) == expected
    assert built(torch.zeros(7, *shape)).shape == (7, 10)


def test_a_perceptron_is_one_weighted_sum_of_pixels():
    built = model("perceptron", (1, 2, 2), 2)
    built[1].weight.data = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, -1]])
    built[1].bias.data = torch.tensor([0.5, 1])
    assert built(torch.tensor([[[[1.0, 0], [2, 10]]]])).tolist() == [[1 + 6 + 40 + 0.5, -10 + 1]]


def test_an_mlp_is_layers_with_the_activation_between_them():
    built = model("mlp", (1, 3, 3), 4, hidden=[5, 6], activation="tanh").double()
    first, second, last = (module for module in built if isinstance(module, nn.Linear))
    x = images(3, 1, 3, 3)
    hidden = torch.tanh(x.flatten(1) @ first.weight.T + first.bias)
    hidden = torch.tanh(hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(built(x), hidden @ last.weight.T + last.bias)


def test_an_mlp_normalises_before_each_activation_and_drops_after_it():
    built = model("mlp", (1, 3, 3), 4, hidden=[5, 6], batchnorm=True, dropout=0.25)
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(module) for module in built] == [nn.Flatten, *block, *block, nn.Linear]
    assert {module.p for module in built if isinstance(module, nn.Dropout)} == {0.25}


def test_a_convolution_by_hand():
    built = layer({"conv": {"out": 1, "kernel": 2}}, (1, 3, 3))
    built.weight.data = torch.tensor([[[[1.0, 2], [3, 4]]]]).double()
    built.bias.data = torch.tensor([0.5]).double()
    x = torch.tensor([[[[1.0, 0, 2], [0, 1, 0], [3, 0, 1]]]]).double()
    # windows [1 0 / 0 1]  [0 2 / 1 0]  [0 1 / 3 0]  [1 0 / 0 1]
    assert built(x).tolist() == [[[[5.5, 7.5], [11.5, 5.5]]]]


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride, padding, dilation, groups):
    """A convolution as its definition has it, one number at a time."""
    _, _, height, width = x.shape
    out, per_group, kernel, _ = weight.shape
    rows, columns = ((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in (height, width))
    result = torch.zeros(len(x), out, rows, columns, dtype=x.dtype)
    for image, o, r, c in product(range(len(x)), range(out), range(rows), range(columns)):
        total = bias[o].item()
        for i, a, b in product(range(per_group), range(kernel), range(kernel)):
            y, z = r * stride + a * dilation - padding, c * stride + b * dilation - padding
            if 0 <= y < height and 0 <= z < width:
                total += (weight[o, i, a, b] * x[image, o // (out // groups) * per_group + i, y, z]).item()
        result[image, o, r, c] = total
    return result


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "kernel"),
    [(1, 0, 1, 1, 3), (2, 0, 1, 1, 3), (1, 2, 1, 1, 3), (1, 0, 2, 1, 2), (1, 0, 1, 2, 3), (2, 1, 2, 4, 2)],
)
def test_a_convolution_is_its_definition(stride, padding, dilation, groups, kernel):
    settings = {"out": 4, "kernel": kernel, "stride": stride, "dilation": dilation, "groups": groups}
    built = layer({"conv": {**settings, "padding": padding}}, (4, 7, 6))
    x = images(2, 4, 7, 6)
    expected = convolve(x, built.weight, built.bias, stride, padding, dilation, groups)
    torch.testing.assert_close(built(x), expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_gives_the_size_it_promises(padding):
    for kernel, stride, dilation, size in product((1, 3, 5), (1, 2, 3, 4), (1, 2), (9, 10, 11, 12)):
        settings = {"out": 1, "kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
        built = layer({"conv": settings}, (1, size, size + 1))
        reach = 0 if padding == "same" else dilation * (kernel - 1)
        expected = tuple(math.ceil((length - reach) / stride) for length in (size, size + 1))
        assert shape_after(built.float(), (1, size, size + 1)) == (1, *expected), settings


def test_same_padding_is_even_on_both_sides():
    built = layer({"conv": {"out": 1, "kernel": 3, "padding": "same", "bias": False}}, (1, 3, 3))
    built.weight.data = torch.ones(1, 1, 3, 3).double()
    assert built(torch.ones(1, 1, 3, 3).double()).tolist() == [[[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]]


X = torch.arange(-16.0, 0).double().reshape(1, 1, 4, 4)  # -16 … -1: no zero of a padding is smaller


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"maxpool": 2}, [[-11, -9], [-3, -1]]),
        ({"maxpool": {"size": 2, "stride": 1}}, [[-11, -10, -9], [-7, -6, -5], [-3, -2, -1]]),
        ({"maxpool": {"size": 2, "padding": 1}}, [[-16, -14, -13], [-8, -6, -5], [-4, -2, -1]]),
        ({"avgpool": 2}, [[-13.5, -11.5], [-5.5, -3.5]]),
        ({"avgpool": {"size": 3, "stride": 1}}, [[-11, -10], [-7, -6]]),
        ({"sumpool": 2}, [[-54, -46], [-22, -14]]),
        ({"sumpool": {"size": 2, "padding": 1}}, [[-16, -29, -13], [-20, -34, -14], [-4, -5, -1]]),
        ({"adaptive_avgpool": 2}, [[-13.5, -11.5], [-5.5, -3.5]]),
        ({"adaptive_avgpool": 3}, [[-13.5, -12.5, -11.5], [-9.5, -8.5, -7.5], [-5.5, -4.5, -3.5]]),
        ({"upsample": 1}, X[0, 0].tolist()),
        ({"avgpool": {"size": 2, "padding": 1}}, [[-4, -7.25, -3.25], [-5, -8.5, -3.5], [-1, -1.25, -0.25]]),
    ],
)
def test_pooling_by_hand(written, expected):
    assert layer(written, (1, 4, 4))(X).tolist() == [[expected]]


@pytest.mark.parametrize(("kind", "expected"), [("avg", [-8.5, 1.5]), ("max", [-1, 9])])
def test_global_pooling_leaves_one_number_a_channel(kind, expected):
    x = torch.cat((X, X + 10), 1)
    assert layer({"globalpool": kind}, (2, 4, 4))(x).tolist() == [expected]


@pytest.mark.parametrize("shape", [(3, 4, 5), (7,)])
def test_batch_normalisation_is_its_formula(shape):
    built = layer({"batchnorm": {"momentum": 0.2, "eps": 0.01}}, shape)
    built.weight.data = torch.arange(1.0, shape[0] + 1).double()
    built.bias.data = -torch.arange(1.0, shape[0] + 1).double()
    x = images(6, *shape) * 3 + 2
    channels = x.transpose(0, 1).flatten(1)  # [C, everything else]
    mean, count = channels.mean(1), channels.shape[1]
    variance = ((channels - mean[:, None]) ** 2).mean(1)

    def formula(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        size = (-1, *[1] * (len(shape) - 1))
        mean, variance, scale, shift = (v.reshape(size) for v in (mean, variance, built.weight, built.bias))
        return (x - mean) / torch.sqrt(variance + 0.01) * scale + shift

    torch.testing.assert_close(built(x), formula(mean, variance))
    torch.testing.assert_close(built.running_mean, 0.2 * mean)
    torch.testing.assert_close(built.running_var, 0.8 + 0.2 * variance * count / (count - 1))
    torch.testing.assert_close(built.eval()(x), formula(built.running_mean, built.running_var))


def test_dropout_zeroes_its_share_and_scales_up_the_rest():
    built = layer({"dropout": 0.2}, (10_000,))
    torch.manual_seed(0)
    kept = built(torch.ones(1, 10_000))
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    assert (kept == 0).double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(built.eval()(kept), kept)


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("written", "formula"),
    [
        ("relu", lambda x: max(x, 0)),
        ("leaky_relu", lambda x: x if x > 0 else 0.01 * x),
        ({"leaky_relu": 0.3}, lambda x: x if x > 0 else 0.3 * x),
        ("elu", lambda x: x if x > 0 else math.exp(x) - 1),
        ({"elu": {"alpha": 2}}, lambda x: x if x > 0 else 2 * (math.exp(x) - 1)),
        ("tanh", math.tanh),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("gelu", lambda x: x * normal_cdf(x)),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("mish", lambda x: x * math.tanh(math.log1p(math.exp(x)))),
        # the constants of Klambauer et al. 2017, equation 14
        ("selu", lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1))),
        ("celu", lambda x: x if x > 0 else math.exp(x) - 1),
        ({"celu": 2}, lambda x: x if x > 0 else 2 * (math.exp(x / 2) - 1)),
        ("relu6", lambda x: min(max(x, 0), 6)),
        ("softplus", lambda x: math.log1p(math.exp(x))),
        ({"softplus": 3}, lambda x: math.log1p(math.exp(3 * x)) / 3),
        ("prelu", lambda x: x if x > 0 else 0.25 * x),
        ({"prelu": {"slope": -0.5, "shared": True}}, lambda x: x if x > 0 else -0.5 * x),
        ("hardsigmoid", lambda x: min(max(x + 3, 0), 6) / 6),
        ("hardswish", lambda x: x * min(max(x + 3, 0), 6) / 6),
        ("hardtanh", lambda x: min(max(x, -1), 1)),
        ({"hardtanh": {"low": -0.5, "high": 6}}, lambda x: min(max(x, -0.5), 6)),
        ("softshrink", lambda x: math.copysign(max(abs(x) - 0.5, 0), x)),
        ({"softshrink": 0.75}, lambda x: math.copysign(max(abs(x) - 0.75, 0), x)),
        ("hardshrink", lambda x: x if abs(x) > 0.5 else 0),
        ({"hardshrink": 2}, lambda x: x if abs(x) > 2 else 0),
        ("softsign", lambda x: x / (1 + abs(x))),
        ("log_sigmoid", lambda x: -math.log1p(math.exp(-x))),
        ("tanhshrink", lambda x: x - math.tanh(x)),
        ("scaled_tanh", lambda x: 1.7159 * math.tanh(2 / 3 * x)),
        ({"scaled_tanh": {"amplitude": 2, "slope": 3}}, lambda x: 2 * math.tanh(3 * x)),
        ("identity", lambda x: x),
    ],
)
def test_activations_are_their_formulas(written, formula):
    points = [-3.5, -1.0, -0.25, 0.0, 0.5, 2.0, 7.0]
    found = layer(written, (7,))(torch.tensor([points]).double())
    torch.testing.assert_close(
        found, torch.tensor([[formula(x) for x in points]], dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


def test_an_identity_shortcut_adds_the_input():
    written = {"residual": {"layers": [{"conv": {"out": 3, "padding": "same", "bias": False}}]}}
    built = layer(written, (3, 6, 6))
    x = images(2, 3, 6, 6)
    (weight,) = built.parameters()
    torch.testing.assert_close(built(x), F.conv2d(x, weight, padding=1) + x)


@pytest.mark.parametrize(("size", "stride"), [(8, 2), (7, 2), (9, 3), (6, 1)])
def test_a_projection_shortcut_adds_a_normalised_strided_1x1_convolution(size, stride):
    conv = {"conv": {"out": 5, "padding": "same", "stride": stride, "bias": False}}
    built = layer({"residual": {"layers": [conv], "shortcut": "projection"}}, (3, size, size)).eval()
    x = images(2, 3, size, size)
    path, projection, scale, shift = built.parameters()
    assert projection.shape == (5, 3, 1, 1)
    built.shortcut[1].running_mean += 0.5
    built.shortcut[1].running_var *= 4
    shortcut = (F.conv2d(x, projection, stride=stride) - 0.5) / math.sqrt(4 + 1e-5)
    assert (scale.tolist(), shift.tolist()) == ([1] * 5, [0] * 5)
    torch.testing.assert_close(built(x), F.conv2d(x, path, stride=stride, padding=1) + shortcut)


def test_repeat_is_the_layers_written_out_each_with_weights_of_its_own():
    block = [{"conv": {"out": 3, "padding": "same"}}, "relu"]
    torch.manual_seed(0)
    repeated = layer({"repeat": {"times": 3, "layers": block}}, (3, 5, 5))
    torch.manual_seed(0)
    written = nn.Sequential(*[layer(each, (3, 5, 5)) for each in block * 3])
    x = images(2, 3, 5, 5)
    assert torch.equal(repeated(x), written(x))
    weights = [parameter for parameter in repeated.parameters() if parameter.ndim == 4]
    assert len({weight.data_ptr() for weight in weights}) == 3
    assert not torch.equal(weights[0], weights[1])


def test_repeat_takes_each_shape_from_the_one_before():
    halved = {"repeat": {"times": 2, "layers": [{"conv": {"out": 6, "stride": 2, "padding": "same"}}]}}
    assert shape_after(layer(halved, (3, 8, 8)).float(), (3, 8, 8)) == (6, 2, 2)


@pytest.mark.parametrize("outputs", [2, 7])
def test_classes_means_as_many_as_the_model_has_outputs(outputs):
    built = cnn([{"conv": {"out": "classes"}}, "globalpool", {"linear": "classes"}], outputs=outputs)
    assert built[0].out_channels == built[2].out_features == outputs


def test_a_sigmoid_needs_one_output_and_two_classes():
    written = {"name": "mlp", "hidden": [8], "output": "sigmoid"}
    assert build_model(config(model=written, loss="bce"), (1, 8, 8), 2)(torch.zeros(3, 1, 8, 8)).shape == (3, 1)
    with pytest.raises(ConfigError, match=r"sigmoid tells two classes apart, the data has 3"):
        build_model(config(model=written, loss="bce"), (1, 8, 8), 3)


CONV = {"conv": {"out": 4}}


def connected(lists: list[list[int]], **settings: Any) -> dict[str, Any]:
    return {"conv": {"out": 2, "connections": lists, **settings}}


def shortcut(kind: str, layer: Any) -> dict[str, Any]:
    return {"residual": {"layers": [layer], "shortcut": kind}}


@pytest.mark.parametrize(
    ("layers", "index", "name", "shapes", "reason"),
    [
        ([CONV, {"linear": 10}], 1, "linear", "3x8x8 -> 4x6x6", "put `flatten` or `globalpool` before it"),
        (["relu", {"conv": {"out": 4, "kernel": 9}}], 1, "conv", "3x8x8 -> 3x8x8", r"9 x 9\).*greater than"),
        ([{"conv": {"out": 4, "groups": 2}}], 0, "conv", "3x8x8", "groups: 2 divides not both 3 input and 4 output"),
        ([{"conv": {"out": 4, "groups": 3}}], 0, "conv", "3x8x8", "groups: 3 divides not both 3 input and 4 output"),
        ([{"conv": {"out": 4, "kernel": 4, "padding": "same"}}], 0, "conv", "3x8x8", "same needs an odd window"),
        (["flatten", CONV], 1, "conv", "3x8x8 -> 192", "needs an image"),
        (["flatten", {"maxpool": 2}], 1, "maxpool", "3x8x8 -> 192", "needs an image"),
        (["flatten", {"avgpool": 2}], 1, "avgpool", "3x8x8 -> 192", "needs an image"),
        (["flatten", "globalpool"], 1, "globalpool", "3x8x8 -> 192", "needs an image"),
        ([{"maxpool": 4}, {"maxpool": 4}], 1, "maxpool", "3x8x8 -> 3x2x2", "too small"),
        ([{"avgpool": 9}], 0, "avgpool", "3x8x8", "too small"),
        ([{"maxpool": {"size": 2, "padding": 2}}], 0, "maxpool", "3x8x8", "at most half"),
        ([{"residual": {"layers": [CONV]}}], 0, "residual", "3x8x8", "make 4x6x6 of 3x8x8; equal shapes"),
        (
            [{"residual": {"layers": [CONV], "shortcut": "projection"}}],
            0,
            "residual",
            "3x8x8",
            "no strided shortcut makes 4x6x6 of 3x8x8",
        ),
        (
            [{"residual": {"layers": ["flatten"], "shortcut": "projection"}}],
            0,
            "residual",
            "3x8x8",
            "needs an image",
        ),
        (["flatten", {"sumpool": 2}], 1, "sumpool", "3x8x8 -> 192", "needs an image"),
        (["flatten", {"adaptive_avgpool": 2}], 1, "adaptive_avgpool", "3x8x8 -> 192", "needs an image"),
        (["flatten", {"conv_transpose": 2}], 1, "conv_transpose", "3x8x8 -> 192", "needs an image"),
        (["flatten", {"pad": 2}], 1, "pad", "3x8x8 -> 192", "needs an image"),
        (["flatten", {"upsample": 2}], 1, "upsample", "3x8x8 -> 192", "needs an image"),
        (["flatten", "instancenorm"], 1, "instancenorm", "3x8x8 -> 192", "needs an image"),
        (["flatten", "local_response_norm"], 1, "local_response_norm", "3x8x8 -> 192", "needs an image"),
        (["flatten", "squeeze_excitation"], 1, "squeeze_excitation", "3x8x8 -> 192", "needs an image"),
        ([{"rbf": "classes"}], 0, "rbf", "3x8x8", "put `flatten` or `globalpool` before it"),
        ([{"groupnorm": 2}], 0, "groupnorm", "3x8x8", "divisible by num_groups"),
        ([{"maxpool": 8}, "instancenorm"], 1, "instancenorm", "3x8x8 -> 3x1x1", "more than 1 spatial element"),
        ([{"pad": {"pixels": 8, "mode": "reflect"}}], 0, "pad", "3x8x8", "less than the corresponding input dimension"),
        ([{"hardtanh": {"low": 1}}], 0, "hardtanh", "3x8x8", "low: 1 is not below high: 1"),
        ([{"conv": {"out": 4, "groups": "depthwise"}}], 0, "conv", "3x8x8", "groups: 3 divides not both 3 input and 4"),
        ([{"conv": {"out": 4, "kernel": [3, 2], "padding": "same"}}], 0, "conv", "3x8x8", "kernel 3x2"),
        ([connected([[0]])], 0, "conv", "3x8x8", "connections: 1 lists for 2 output channels"),
        ([connected([[0], [1, 3]])], 0, "conv", "3x8x8", r"list 1, \[1, 3\]: expected different .* 0\.\.2"),
        ([connected([[1, 1], [0]])], 0, "conv", "3x8x8", r"list 0, \[1, 1\]: expected different"),
        ([connected([[0], [1], [2]], out=3, groups=3)], 0, "conv", "3x8x8", "connections and groups exclude"),
        ([{"conv_transpose": {"out": 4, "groups": 2}}], 0, "conv_transpose", "3x8x8", "groups: 2 divides not both"),
        ([{"conv_transpose": {"out": 4, "output_padding": 1}}], 0, "conv_transpose", "3x8x8", "output padding must be"),
        ([{"concat": [["identity"], [CONV]]}], 0, "concat", "3x8x8", "the branches make 3x8x8, 4x6x6"),
        ([{"concat": [["identity"], ["flatten"]]}], 0, "concat", "3x8x8", "the branches make 3x8x8, 192"),
        ([{"concat": [["identity"], [{"linear": 3}]]}], 0, "concat", "3x8x8", r"layer 0 \(linear\).*flatten"),
        (
            ["flatten", {"linear": {"out": 3, "init": "dirac"}}],
            1,
            "linear",
            "3x8x8 -> 192",
            "init dirac: needs a convolution",
        ),
        ([{"batchnorm": {"init": "kaiming"}}], 0, "batchnorm", "3x8x8", "init kaiming: Fan in and fan out"),
        (
            [shortcut("pad", {"conv": {"out": 2, "padding": "same"}})],
            0,
            "residual",
            "3x8x8",
            "makes no 2 channels of 3",
        ),
        ([shortcut("pad", CONV)], 0, "residual", "3x8x8", "no strided shortcut makes 4x6x6 of 3x8x8"),
        ([shortcut("auto", "flatten")], 0, "residual", "3x8x8", "needs an image"),
        (
            [CONV, {"repeat": {"times": 9, "layers": [{"maxpool": 2}]}}],
            1,
            "repeat",
            "3x8x8 -> 4x6x6",
            r"layer 2 \(maxpool\): .*too small.* \[shapes so far: 4x6x6 -> 4x3x3 -> 4x1x1\]",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_named_with_the_shapes_up_to_it(layers, index, name, shapes, reason):
    with pytest.raises(ConfigError) as caught:
        cnn([*layers, "flatten", {"linear": "classes"}])
    text = str(caught.value)
    assert text.startswith(f"model cnn: layer {index} ({name}): ")
    assert text.endswith(f"[shapes so far: {shapes}]")
    assert re.search(reason, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("layers", "ends"),
    [
        (["flatten", {"linear": 9}], "layer 1 (linear) ends with 9 numbers"),
        ([CONV], "layer 0 (conv) ends with 4x6x6 numbers"),
    ],
)
def test_a_list_that_ends_with_other_than_the_outputs_says_how_to_end_it(layers, ends):
    with pytest.raises(ConfigError, match=re.escape(f"{ends}, the model needs 10; end with `- linear: classes`")):
        cnn(layers)


@pytest.mark.parametrize("around", [lambda layers: layers, lambda layers: [{"concat": [layers, layers]}]])
def test_repeat_in_repeat_cannot_ask_for_any_number_of_layers(around):
    layers: list[Any] = ["relu"]
    for _ in range(9):
        layers = [{"repeat": {"times": 1000, "layers": around(layers)}}]
    with pytest.raises(ConfigError, match=r"more than 10,000 layers"):
        cnn(layers)


def test_finding_shapes_draws_nothing_counts_nothing_and_leaves_training_mode():
    torch.manual_seed(3)
    built = cnn(SMALL_CNN)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    by_hand = nn.ModuleList(
        [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(24, 10)]
    )
    assert torch.equal(after, torch.get_rng_state())
    for found, expected in zip(built.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    assert all(module.training for module in built.modules())
    assert all(parameter.grad is None for parameter in built.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_module_keeps_its_mode_when_its_shape_is_found(training):
    built = cnn(SMALL_CNN).train(training)
    assert shape_after(built, (3, 8, 8)) == (10,)
    assert {module.training for module in built.modules()} == {training}
    with pytest.raises(RuntimeError):
        shape_after(built, (2, 8, 8))
    assert {module.training for module in built.modules()} == {training}


def test_the_seed_decides_the_weights():
    one, same, other = (build_model(config(seed=seed), (1, 8, 8), 10).state_dict() for seed in (0, 0, 1))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_relu_behind_the_max_pooling_changes_no_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Outputs and all gradients, also where a window has no positive number, equal ones, or padding around it."""
    written = [
        "relu",
        {"maxpool": {"size": 3, "stride": 2, "padding": 1}},
        {"conv": {"out": 4}},
        "relu",
        {"maxpool": 2},
    ]
    network = cnn([*written, "relu", {"maxpool": {"size": 2, "stride": 1}}, "flatten", {"linear": 10}], (3, 15, 15))
    network.to(dtype)
    x = images(6, 3, 15, 15).to(dtype).mul(2).round().contiguous(memory_format=layout)  # whole numbers: many are equal
    x[0] = -1
    called: list[str] = []
    for name, module in network.named_children():
        module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    found = []
    for as_in_the_config in (False, True):
        with as_written(network) if as_in_the_config else nullcontext():
            leaf = x.clone().requires_grad_()
            outputs = network(leaf)
        network.zero_grad()
        outputs.float().square().sum().backward()
        found.append([outputs, leaf.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    names = [name for name, _ in network.named_children()]
    assert called == [names[i] for i in (1, 0, 2, 4, 3, 6, 5, 7, 8)] + names


def test_other_activations_stay_in_front_of_the_max_pooling() -> None:
    network = cnn(["gelu", {"maxpool": 2}, "relu", {"avgpool": 2}, "flatten", {"linear": 10}])
    x = images(2, 3, 8, 8).float()
    expected = x
    for module in network:
        expected = module(expected)
    assert torch.equal(network(x), expected)


def test_the_gradient_of_flatten_goes_back_in_the_layout_of_its_input() -> None:
    x = images(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []
    between = x * 1
    flat = layer("flatten", (3, 4, 5))(between)
    between.register_hook(seen.append)
    flat.backward(images(2, 60, seed=1))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[0], images(2, 60, seed=1).view(2, 3, 4, 5))
    assert not layer("flatten", (5,))(torch.ones(2, 5)).requires_grad
