"""Convolutions of sequences and volumes against those of images, and what stands between them in any dimension."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from test_layers import build, images, layer, randomise
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dltrain import config
from dltrain.build import build_model
from dltrain.device import Placement

PLACES = [(6,), (4, 6), (2, 4, 6)]  # of a sequence, an image, a volume


def test_rows_are_a_sequence_whose_channels_are_their_pixels() -> None:
    image = torch.arange(12.0).view(1, 2, 2, 3)  # two channels of two rows
    sequence = build("rows", (2, 2, 3))(image)
    assert sequence.tolist() == [[[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]]
    upright = build("columns", (2, 3, 2))(image.transpose(2, 3))  # its columns are the rows that it had
    assert torch.equal(upright, sequence)


def test_a_convolution_of_rows_is_one_of_the_image_by_windows_as_wide_as_it() -> None:
    x = images(2, 3, 7, 5)
    built = layer({"conv1d": {"out": 4, "kernel": 3, "stride": 2, "padding": "same"}}, (15, 7))
    wide = built.weight.view(4, 3, 5, 3).transpose(2, 3)  # [out, C, 3, 5]
    expected = F.conv2d(x, wide, built.bias, stride=(2, 1), padding=(1, 0))
    torch.testing.assert_close(built(layer("rows", (3, 7, 5))(x)), expected.squeeze(3))


def test_a_convolution_of_a_volume_sums_those_of_its_frames() -> None:
    x = images(2, 5, 7, 6)
    built = layer({"conv3d": {"out": 4, "kernel": [3, 5, 1], "stride": [1, 2, 1], "padding": "same"}}, (1, 5, 7, 6))
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    frames = [
        sum(
            F.conv2d(padded[:, at + tap, None], built.weight[:, :, tap], stride=(2, 1), padding=(2, 0))
            for tap in range(3)
        )
        for at in range(5)
    ]
    expected = torch.stack(frames, 2) + built.bias[:, None, None, None]
    torch.testing.assert_close(built(layer("volume", (5, 7, 6))(x)), expected)


def test_groups_and_dilation_are_torchs() -> None:
    x = images(2, 4, 9)
    built = layer({"conv1d": {"out": 6, "groups": 2, "dilation": 2, "padding": 1}}, (4, 9))
    torch.testing.assert_close(built(x), F.conv1d(x, built.weight, built.bias, padding=1, dilation=2, groups=2))
    x = images(2, 4, 5, 5, 5)
    built = layer({"conv3d": {"out": 6, "groups": 2, "dilation": 2}}, (4, 5, 5, 5))
    torch.testing.assert_close(built(x), F.conv3d(x, built.weight, built.bias, dilation=2, groups=2))


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("name", "of_window"), [("maxpool", np.max), ("avgpool", np.mean), ("sumpool", np.sum)])
def test_a_pool_is_of_windows_in_every_dimension(name: str, of_window: Any, places: tuple[int, ...]) -> None:
    x = images(2, 3, *places)
    pooled = layer({name: {"size": 2, "stride": 1}}, (3, *places))(x)
    axes = tuple(range(2, 2 + len(places)))
    windows = np.lib.stride_tricks.sliding_window_view(x.numpy(), [2] * len(places), axes)
    expected = of_window(windows, axis=tuple(range(-len(places), 0)))
    np.testing.assert_allclose(pooled.numpy(), expected)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_a_global_pool_leaves_a_number_a_channel(kind: str, places: tuple[int, ...]) -> None:
    x = images(2, 3, *places)
    flat = x.flatten(2)
    expected = flat.mean(2) if kind == "avg" else flat.amax(2)
    torch.testing.assert_close(layer({"globalpool": kind}, (3, *places))(x), expected)


@pytest.mark.parametrize("places", [(6,), (3,), (2, 4, 6)])  # of three places too: as many as channels
@pytest.mark.parametrize(("name", "over"), [("batchnorm", (0, 2)), ("layernorm", (1,))])
def test_a_norm_is_of_a_channels_places_or_of_a_places_channels(
    name: str, over: tuple[int, ...], places: tuple[int, ...]
) -> None:
    x = images(4, 3, *places)
    built = randomise(layer(name, (3, *places))).train()
    flat = x.flatten(2)
    centred = flat - flat.mean(over, keepdim=True)
    normal = centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt()
    expected = built.weight[:, None] * normal + built.bias[:, None]  # type: ignore[index]
    torch.testing.assert_close(built(x), expected.view_as(x))


@pytest.mark.parametrize(
    ("written", "shape", "said"),
    [
        ({"conv1d": 4}, (3, 8, 8), "put `rows` or `columns` before it; got 3x8x8"),
        ({"conv3d": 4}, (3, 8, 8), "put `volume` before it; got 3x8x8"),
        ({"conv3d": 4}, (12,), "put `volume` before it; got 12"),
        ("rows", (12,), "needs an image"),
        ("volume", (3, 8), "needs an image"),
        ("maxpool", (12,), "needs an image (channels x height x width), a sequence or a volume, got 12"),
        ({"conv1d": {"out": 4, "kernel": 4, "padding": "same"}}, (3, 8), "kernel 4 with dilation 1 is even"),
        ({"conv3d": {"out": 4, "kernel": [2, 3, 3], "padding": "same"}}, (1, 4, 8, 8), "kernel 2x3x3 with dilation 1"),
        ({"conv1d": {"out": 4, "groups": 2}}, (3, 8), "groups: 2 divides not both 3 input and 4 output"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(written: Any, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        build(written, shape)


def model_of(*layers: Any, init: str | None = None) -> nn.Module:
    model = {"name": "cnn", "layers": [*layers, "flatten", {"linear": "classes"}], "init": init}
    plain = {"name": "x", "data": "digits", "model": model, "optim": {"name": "sgd", "lr": 0.1}}
    return build_model(config.from_plain(plain, "here"), (4, 8, 8), 10)


@pytest.mark.parametrize("layers", [("rows", {"conv1d": 4}), ("volume", {"conv3d": 4})])
def test_a_models_init_starts_them_too(layers: tuple[Any, ...]) -> None:
    assert all((each == 0).all() for each in model_of(*layers, init="zeros").parameters())


@pytest.mark.parametrize(
    ("layers", "multiplications"),
    [
        (("rows", {"conv1d": {"out": 4, "padding": "same"}}), 4 * 8 * 32 * 3 + 10 * 32),
        (("volume", {"conv3d": {"out": 4, "padding": "same"}}), 4 * 256 * 27 + 10 * 1024),
    ],
)
def test_their_flops_are_counted(layers: tuple[Any, ...], multiplications: int) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model = model_of(*layers)
        built = counter.get_total_flops()  # layers are tried as they are built
        model(torch.zeros(1, 4, 8, 8))
    assert counter.get_total_flops() - built == 2 * multiplications


def test_channels_last_is_for_the_images_of_a_model_that_has_volumes_as_well() -> None:
    model = model_of({"conv": {"out": 4, "padding": "same"}}, "volume", {"conv3d": 2})
    x = images(2, 4, 8, 8).float().to(memory_format=torch.channels_last)
    expected = model(x)
    Placement(torch.device("cpu"), torch.float32, torch.channels_last, {}).take(model)
    first, second, _ = (each for each in model.parameters() if each.ndim > 1)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert second.is_contiguous()
    torch.testing.assert_close(model(x), expected)
