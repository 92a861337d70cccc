"""Layers against formulas, torch's functions and second ways of computing; all of them on the meta device and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dltrain.components  # noqa: F401  registers the layers
from dltrain import registry
from dltrain.models.layers import shape_after
from dltrain.registry import Item, Section

# LeCun et al. 1998, table I: the maps of S2 that each of C3's sixteen maps sees
TABLE = [
    *[[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [0, 4, 5], [0, 1, 5]],
    *[[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [0, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 5]],
    *[[0, 1, 3, 4], [1, 2, 4, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]],
]


def build(written: Any, shape: tuple[int, ...], outputs: int = 10) -> nn.Module:
    module: nn.Module = Item("layer", "activation").read(written)(shape, outputs)
    return module


def layer(written: Any, shape: tuple[int, ...], outputs: int = 10) -> nn.Module:
    return build(written, shape, outputs).double()


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomise(module: nn.Module) -> nn.Module:
    """Every weight away from the 0 and 1 that hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


BLOCK = [{"conv": {"out": 6, "stride": 2, "padding": "same"}}, "relu"]
HALVED = [
    ((4, 6), (4, 3)),
    ((4, 2, 6, 4), (4, 1, 3, 2)),
]  # a sequence and a volume, each with what pooling leaves of it
# each layer and activation with settings unlike its defaults, on images of 4x6x6 or rows of 12
SAMPLES: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
    ({"conv": {"out": 8, "kernel": [3, 1], "padding": "same", "groups": "depthwise"}}, (4, 6, 6), (8, 6, 6)),
    ({"conv": {"out": 2, "connections": [[0, 2], [1, 2, 3]], "stride": 2}}, (4, 6, 6), (2, 2, 2)),
    ({"conv_transpose": {"out": 5, "stride": 2, "padding": 1, "output_padding": 1}}, (4, 6, 6), (5, 12, 12)),
    ({"conv_transpose": "classes"}, (4, 6, 6), (10, 8, 8)),
    ({"linear": {"out": 3, "bias": False}}, (12,), (3,)),
    ({"rbf": "classes"}, (12,), (10,)),
    ({"scale": {"value": 0.25, "bias": True}}, (4, 6, 6), (4, 6, 6)),
    ({"scale": 0.1}, (12,), (12,)),
    ({"multiply": 0.1}, (12,), (12,)),
    ("flatten", (4, 6, 6), (144,)),
    ({"pad": {"pixels": 2, "mode": "reflect"}}, (4, 6, 6), (4, 10, 10)),
    ({"upsample": {"scale": 3, "mode": "bilinear"}}, (4, 6, 6), (4, 18, 18)),
    ({"dropout": 0.1}, (12,), (12,)),
    ({"drop_path": 0.1}, (4, 6, 6), (4, 6, 6)),
    ({"maxpool": 3}, (4, 6, 6), (4, 2, 2)),
    ({"avgpool": 3}, (4, 6, 6), (4, 2, 2)),
    ({"sumpool": 3}, (4, 6, 6), (4, 2, 2)),
    ({"adaptive_avgpool": 5}, (4, 6, 6), (4, 5, 5)),
    ("globalpool", (4, 6, 6), (4,)),
    ("rows", (2, 6, 5), (10, 6)),
    ("columns", (2, 6, 5), (12, 5)),
    ({"reshape": [3, 2, 2]}, (12,), (3, 2, 2)),
    ("volume", (4, 6, 5), (1, 4, 6, 5)),
    ({"conv1d": {"out": 6, "padding": "same", "stride": 2}}, (4, 6), (6, 3)),
    ({"conv3d": {"out": 6, "kernel": [1, 3, 3], "padding": "same", "stride": [2, 1, 1]}}, (2, 4, 6, 5), (6, 2, 6, 5)),
    *(({name: 2}, shape, after) for name in ("maxpool", "avgpool", "sumpool") for shape, after in HALVED),
    *(("globalpool", shape, shape[:1]) for shape, _ in HALVED),
    *((name, shape, shape) for name in ("batchnorm", "layernorm", {"groupnorm": 2}) for shape, _ in HALVED),
    ("batchnorm", (4, 6, 6), (4, 6, 6)),
    ("layernorm", (4, 6, 6), (4, 6, 6)),
    ("layernorm", (12,), (12,)),
    ({"groupnorm": 2}, (4, 6, 6), (4, 6, 6)),
    ("instancenorm", (4, 6, 6), (4, 6, 6)),
    ("local_response_norm", (4, 6, 6), (4, 6, 6)),
    ({"repeat": {"times": 2, "layers": BLOCK}}, (4, 6, 6), (6, 2, 2)),
    ({"residual": {"layers": BLOCK, "shortcut": "projection"}}, (4, 6, 6), (6, 3, 3)),
    ({"residual": {"layers": BLOCK, "shortcut": "pad"}}, (4, 6, 6), (6, 3, 3)),
    ({"residual": {"layers": BLOCK, "shortcut": "auto", "before": ["batchnorm", "relu"]}}, (4, 6, 6), (6, 3, 3)),
    ({"concat": [["identity"], [{"conv": {"out": 3, "padding": 1}}]]}, (4, 6, 6), (7, 6, 6)),
    ({"squeeze_excitation": 2}, (4, 6, 6), (4, 6, 6)),
    *((entry.name, (4, 6, 6), (4, 6, 6)) for entry in registry.entries("activation")),
]


def test_every_layer_and_activation_has_a_sample() -> None:
    sampled = {written if isinstance(written, str) else next(iter(written)) for written, _, _ in SAMPLES}
    shipped = [entry for kind in ("layer", "activation") for entry in registry.entries(kind)]
    assert sampled == {entry.name for entry in shipped if entry.factory.__module__.startswith("dltrain.")}


@pytest.mark.parametrize(("written", "shape", "after"), SAMPLES)
def test_a_layer_is_the_same_after_its_weights_went_through_the_meta_device(written, shape, after):
    """Which is how a checkpoint's model is built; and it trains, in bfloat16 and channels_last as well."""
    built = build(written, shape)
    assert shape_after(built, shape) == after
    with torch.device("meta"):
        loaded = build(written, shape)
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())
    loaded.load_state_dict(built.state_dict(), assign=True)
    x = images(3, *shape).float()
    assert torch.equal(loaded.eval()(x), built.eval()(x))
    if len(shape) == 3:
        x = x.to(memory_format=torch.channels_last)
        built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(built(x), loaded(x))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = built.train()(x)
    result.float().square().sum().backward()
    assert result.shape == (3, *after)
    assert all(parameter.grad is not None for parameter in built.parameters())
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("mode", "numpys"), [("zeros", "constant"), ("reflect", "reflect"), ("replicate", "edge"), ("circular", "wrap")]
)
def test_padding_is_numpys_alone_and_around_a_convolution(mode, numpys):
    x = images(2, 3, 5, 4)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode=numpys))
    assert torch.equal(layer({"pad": {"pixels": 2, "mode": mode}}, (3, 5, 4))(x), padded)
    conv = layer({"conv": {"out": 4, "kernel": 5, "padding": "same", "padding_mode": mode}}, (3, 5, 4))
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias))


def test_a_rectangular_window_has_its_height_first_and_keeps_the_size():
    built = layer({"conv": {"out": 1, "kernel": [1, 3], "padding": "same", "bias": False}}, (1, 2, 3))
    built.weight.data = torch.tensor([[[[1.0, 10, 100]]]]).double()
    assert built(torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]]).double()).tolist() == [[[[210, 321, 32], [540, 654, 65]]]]


def test_depthwise_is_each_channel_alone():
    built = layer({"conv": {"out": 6, "groups": "depthwise"}}, (3, 5, 5))
    x = images(2, 3, 5, 5)
    alone = [
        F.conv2d(x[:, c : c + 1], built.weight[2 * c : 2 * c + 2], built.bias[2 * c : 2 * c + 2]) for c in range(3)
    ]
    assert built.weight.shape == (6, 1, 3, 3)
    torch.testing.assert_close(built(x), torch.cat(alone, 1))


def test_lenets_c3_has_the_papers_parameters_and_is_a_convolution_with_holes():
    built = layer({"conv": {"out": 16, "kernel": 5, "connections": TABLE}}, (6, 14, 14))
    assert parameters(built) == 1516
    x = images(2, 6, 14, 14)
    dense = torch.zeros(16, 6, 5, 5, dtype=torch.float64)
    pieces = iter(built.weight.detach())
    for out, sources in enumerate(TABLE):
        for source in sources:
            dense[out, source] = next(pieces)
    dense.requires_grad_()
    expected = F.conv2d(x, dense, built.bias)
    torch.testing.assert_close(built(x), expected)
    built(x).square().sum().backward()
    expected.square().sum().backward()
    kept = torch.cat([dense.grad[out, sources] for out, sources in enumerate(TABLE)])
    torch.testing.assert_close(built.weight.grad, kept)


@pytest.mark.parametrize(
    ("stride", "padding", "output_padding", "groups"), [(1, 0, 0, 1), (2, 1, 1, 1), (3, 2, 0, 2), (2, 0, 0, 2)]
)
def test_a_transposed_convolution_is_the_adjoint_of_the_convolution(stride, padding, output_padding, groups):
    """<conv(x), y> = <x, transposed(y)> for the same weights."""
    settings = {"out": 6, "stride": stride, "padding": padding, "output_padding": output_padding, "groups": groups}
    built = layer({"conv_transpose": {**settings, "bias": False}}, (4, 5, 5))
    y = images(2, 4, 5, 5)
    transposed = built(y)
    x = images(*transposed.shape, seed=1)
    convolved = F.conv2d(x, built.weight, stride=stride, padding=padding, groups=groups)
    assert transposed.shape[-1] == 4 * stride - 2 * padding + 3 + output_padding
    torch.testing.assert_close((convolved * y).sum(), (x * transposed).sum())


def test_upsampling_repeats_pixels_or_interpolates_between_them():
    x = torch.tensor([[[[0.0, 4], [8, 12]]]]).double()
    nearest = [[0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 12, 12], [8, 8, 12, 12]]
    assert layer("upsample", (1, 2, 2))(x).tolist() == [[nearest]]
    # new pixels lie a quarter of a pixel beside the old ones; the outermost repeat the edge
    bilinear = [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    assert layer({"upsample": {"mode": "bilinear"}}, (1, 2, 2))(x).tolist() == [[bilinear]]


def test_adaptive_pooling_has_windows_that_overlap_where_the_size_is_no_multiple():
    x = torch.arange(25.0).double().reshape(1, 1, 5, 5)
    # windows from floor(5 i / 3) to ceil(5 (i + 1) / 3): rows and columns 0-1, 1-3, 3-4
    rows = [slice(0, 2), slice(1, 4), slice(3, 5)]
    expected = [[x[0, 0, r, c].mean().item() for c in rows] for r in rows]
    assert layer({"adaptive_avgpool": 3}, (1, 5, 5))(x).tolist() == [[expected]]


def normalised(x: torch.Tensor, over: tuple[int, ...], eps: float) -> torch.Tensor:
    mean = x.mean(over, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(over, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("written", "shape", "normalise"),
    [
        ({"layernorm": 0.01}, (4, 3, 5), lambda x: normalised(x, (1,), 0.01)),
        ({"layernorm": 0.01}, (4,), lambda x: normalised(x, (1,), 0.01)),
        ({"instancenorm": 0.01}, (4, 3, 5), lambda x: normalised(x, (2, 3), 0.01)),
        (
            {"groupnorm": {"groups": 2, "eps": 0.01}},
            (4, 3, 5),
            lambda x: torch.cat([normalised(half, (1, 2, 3), 0.01) for half in (x[:, :2], x[:, 2:])], 1),
        ),
        (
            {"groupnorm": {"groups": 2, "eps": 0.01}},
            (4,),
            lambda x: torch.cat([normalised(half, (1,), 0.01) for half in (x[:, :2], x[:, 2:])], 1),
        ),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_is_its_formula_with_a_scale_and_a_shift_a_channel(written, shape, normalise, training):
    built = randomise(layer(written, shape)).train(training)
    x = images(3, *shape) * 2 + 1
    scale, shift = (tensor.reshape(-1, *[1] * (len(shape) - 1)) for tensor in (built.weight, built.bias))
    assert parameters(built) == 8
    torch.testing.assert_close(built(x), normalise(x) * scale + shift)


def test_local_response_normalisation_is_the_papers_formula():
    """Krizhevsky et al. 2012, section 3.3: b_i = a_i / (k + alpha sum_j a_j^2)^beta, j from i - n/2 to i + n/2."""
    x = images(2, 7, 3, 3)
    for settings in ({}, {"size": 3, "alpha": 0.3, "beta": 0.5, "k": 1.5}):
        n, alpha, beta, k = ({"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0} | settings).values()
        expected = torch.empty_like(x)
        for i in range(7):
            near = x[:, max(0, i - int(n) // 2) : i + int(n) // 2 + 1]
            expected[:, i] = x[:, i] / (k + alpha * (near**2).sum(1)) ** beta
        torch.testing.assert_close(layer({"local_response_norm": settings}, (7, 3, 3))(x), expected)


def test_softmax_is_over_channels():
    x = images(2, 3, 4, 4)
    shares = layer("softmax", (3, 4, 4))(x)
    torch.testing.assert_close(shares, x.exp() / x.exp().sum(1, keepdim=True))
    assert layer("softmax", (5,))(images(2, 5)).sum(1).tolist() == pytest.approx([1, 1])


def test_prelu_learns_a_slope_for_each_channel_or_one_for_all():
    built = layer("prelu", (3, 2, 2))
    assert (parameters(built), parameters(layer({"prelu": {"shared": True}}, (3, 2, 2)))) == (3, 1)
    built.weight.data = torch.tensor([0.5, 2, -1]).double()
    assert built(-torch.ones(1, 3, 2, 2).double())[0, :, 0, 0].tolist() == [-0.5, -2, 1]


def test_a_scale_starts_at_its_value_and_has_a_number_a_channel():
    built = layer({"scale": {"value": 0.25, "bias": True}}, (6, 2, 3))
    x = images(2, 6, 2, 3)
    assert parameters(built) == 12  # LeNet-5's S2
    torch.testing.assert_close(built(x), x * 0.25)
    built.bias.data += torch.arange(6.0)
    built.weight.data[2] = 3
    torch.testing.assert_close(built(x)[:, 2], x[:, 2] * 3 + 2)
    assert parameters(layer({"scale": 1e-6}, (5,))) == 5


def test_multiply_is_by_a_number_that_is_not_learned():
    built = layer({"multiply": -0.125}, (4,))
    assert built(torch.tensor([[0.0, 1, -2, 8]])).tolist() == [[0, -0.125, 0.25, -1]]
    assert not built.state_dict()


def test_drop_path_drops_whole_images_and_scales_up_the_others():
    built = layer({"drop_path": 0.2}, (2, 3, 3))
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    kept = built(x).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(kept.amin(1), kept.amax(1))
    assert (kept[:, 0] == 0).double().mean().item() == pytest.approx(0.2, abs=0.03)
    assert built.eval()(x) is x


def test_concat_puts_the_branches_beside_each_other():
    conv = {"conv": {"out": 3, "padding": "same"}}
    built = layer(
        {"concat": {"branches": [["identity"], [conv, "relu"], [{"conv": {"out": 2, "kernel": 1}}]]}}, (4, 5, 5)
    )
    x = images(2, 4, 5, 5)
    wide, wide_bias, narrow, narrow_bias = built.parameters()
    expected = [x, F.conv2d(x, wide, wide_bias, padding=1).relu(), F.conv2d(x, narrow, narrow_bias)]
    torch.testing.assert_close(built(x), torch.cat(expected, 1))
    assert layer({"concat": [[{"linear": 2}], ["relu"]]}, (3,))(images(2, 3)).shape == (2, 5)


def test_squeeze_excitation_is_its_formula():
    """Hu et al. 2018, section 3: s = sigmoid(W2 relu(W1 mean(x))), x s."""
    built = layer({"squeeze_excitation": 3}, (7, 4, 4))
    x = images(2, 7, 4, 4)
    first, first_bias, second, second_bias = (
        tensor.flatten(1) if tensor.ndim == 4 else tensor for tensor in built.parameters()
    )
    assert first.shape == (2, 7)
    hidden = (x.mean((2, 3)) @ first.T + first_bias).relu()
    gates = 1 / (1 + torch.exp(-(hidden @ second.T + second_bias)))
    torch.testing.assert_close(built(x), x * gates[:, :, None, None])
    assert parameters(layer("squeeze_excitation", (4, 2, 2))) == 4 + 1 + 4 + 4  # never fewer than one hidden number


def test_rbf_outputs_are_minus_squared_distances_to_fixed_codes():
    torch.manual_seed(5)
    built = layer({"rbf": "classes"}, (84,), outputs=10)
    torch.manual_seed(5)
    same = layer({"rbf": "classes"}, (84,), outputs=10)
    x = images(3, 84)
    codes = built.codes
    assert not list(built.parameters())
    assert torch.equal(codes, same.codes)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert codes.mean().abs() < 0.15  # as many of one as of the other: 840 tosses deviate by 0.035
    expected = [
        [-sum((a - b) ** 2 for a, b in zip(row, code, strict=True)) for code in codes.tolist()] for row in x.tolist()
    ]
    torch.testing.assert_close(built(x), torch.tensor(expected).double())


@pytest.mark.parametrize(("size", "stride"), [(8, 2), (7, 2), (9, 3), (6, 1)])
def test_a_pad_shortcut_has_no_parameters_and_fills_up_with_zeros(size, stride):
    """Option A of He et al. 2016, section 4.1."""
    conv = {"conv": {"out": 5, "padding": "same", "stride": stride, "bias": False}}
    built = layer({"residual": {"layers": [conv], "shortcut": "pad"}}, (3, size, size))
    x = images(2, 3, size, size)
    (weight,) = built.parameters()
    added = built(x) - F.conv2d(x, weight, stride=stride, padding=1)
    torch.testing.assert_close(added[:, :3], x[:, :, ::stride, ::stride])
    torch.testing.assert_close(added[:, 3:], torch.zeros_like(added[:, 3:]))


@pytest.mark.parametrize(("out", "count"), [(3, 3 * 3 * 9), (5, 3 * 5 * 9 + 3 * 5 + 2 * 5)])
def test_an_auto_shortcut_projects_where_the_shapes_differ(out, count):
    conv = {"conv": {"out": out, "padding": "same", "bias": False}}
    built = layer({"residual": {"layers": [conv], "shortcut": "auto"}}, (3, 6, 6))
    assert parameters(built) == count
    if out == 3:
        x = images(2, 3, 6, 6)
        torch.testing.assert_close(built(x) - x, F.conv2d(x, *built.parameters(), padding=1))


@pytest.mark.parametrize(
    ("shortcut", "out"),
    [*((kind, 3) for kind in ("identity", "auto", "projection", "pad")), ("auto", 5), ("projection", 5), ("pad", 5)],
)
def test_pre_activation_is_shared_with_a_projection_alone(shortcut, out):
    """Zagoruyko & Komodakis 2016, section 2, after He et al. 2016, "Identity mappings", figure 1."""
    conv = {"conv": {"out": out, "padding": "same", "bias": False}}
    before = ["batchnorm", "relu"]
    built = randomise(layer({"residual": {"before": before, "layers": [conv], "shortcut": shortcut}}, (3, 6, 6))).eval()
    norm = next(module for module in built.modules() if isinstance(module, nn.BatchNorm2d))
    weights = {weight.shape[-1]: weight for weight in built.parameters() if weight.ndim == 4}
    x = images(2, 3, 6, 6)
    active = norm(x).relu()
    path = F.conv2d(active, weights[3], padding=1)
    projects = shortcut == "projection" or (shortcut == "auto" and out == 5)
    assert sorted(weights) == ([1, 3] if projects else [3])
    assert parameters(built) == 6 + 27 * out + (3 * out if projects else 0)
    shortcut_path = F.conv2d(active, weights[1]) if projects else F.pad(x, (0, 0, 0, 0, 0, out - 3))
    torch.testing.assert_close(built(x), path + shortcut_path)


def test_what_lists_are_given_is_what_a_config_writes_back():
    model = Section("model").read(
        {
            "name": "cnn",
            "init": {"kaiming": "fan_out"},
            "layers": [
                {"conv": {"out": 2, "kernel": [3, 1], "connections": [[0], [0]], "init": {"normal": 0.1}}},
                {"residual": {"before": ["relu"], "layers": [{"batchnorm": {"init": "zeros"}}]}},
                {"concat": [["identity"], [{"scale": 2}]]},
                "flatten",
                {"linear": {"out": "classes", "init": "orthogonal"}},
            ],
        }
    )
    written = Section("model").write(model)
    assert Section("model").read(written) == model
    assert written["layers"][1]["residual"]["layers"] == [
        {"batchnorm": {"momentum": 0.1, "eps": 1e-5, "init": "zeros"}}
    ]
    assert math.isclose(written["layers"][0]["conv"]["init"]["normal"]["std"], 0.1)
