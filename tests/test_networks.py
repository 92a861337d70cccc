"""Shipped networks and torchvision's classifiers, against their papers and against torchvision."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from conftest import Run
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import cfgs, make_layers

from dltrain import config, shipped
from dltrain.build import build_model
from dltrain.models.torchvision import torchvision

# a small one of each family, and a small image that it takes
FAMILIES = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 448,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11": 32,
    "vit_b_16": 32,
}


CIFAR = (3, 32, 32)


def network(name: str, shape: tuple[int, ...] = CIFAR, device: str = "meta") -> nn.Sequential:
    """The model of a shipped config for ten classes."""
    with torch.device(device):
        model = build_model(config.load(shipped.find(name)), shape, 10)
    assert isinstance(model, nn.Sequential)
    return model


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def stages(model: nn.Sequential, shape: tuple[int, ...] = CIFAR) -> list[tuple[int, ...]]:
    """The shapes of one image between the model's layers, each once."""
    x = torch.zeros(2, *shape, device=next(model.parameters()).device)
    shapes = []
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    return [shape for shape, _ in groupby(shapes)]


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers, those of the modules in it first."""
    for child in module.children():
        yield from tensors(child)
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """Every parameter and statistic at random, so that nothing is without effect; for evaluation."""
    torch.manual_seed(0)
    for each in tensors(model):
        if each.dtype.is_floating_point and each.ndim > 1:
            nn.init.kaiming_normal_(each)
        elif each.dtype.is_floating_point:
            nn.init.uniform_(each, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def same_outputs(ours: nn.Module, theirs: nn.Module) -> None:
    """With the same weights, of which each has as many of the same sizes in the same order."""
    drawn(theirs)
    for mine, other in zip(tensors(ours.eval()), tensors(theirs), strict=True):
        assert mine.squeeze().shape == other.squeeze().shape
        mine.copy_(other.view_as(mine))
    images = torch.randn(3, *CIFAR)
    outputs = ours(images)
    assert not torch.allclose(outputs[0], outputs[1], rtol=0.01)
    torch.testing.assert_close(outputs, theirs(images), rtol=1e-4, atol=1e-4 * float(outputs.abs().max()))


# ---- networks from layer lists


def test_lenet5_is_the_published_one() -> None:
    """LeCun et al. 1998, section II.B."""
    model = network("mnist_lenet5", (1, 28, 28))
    assert [parameters(layer) for layer in model if parameters(layer)] == [156, 12, 1_516, 32, 48_120, 10_164]
    assert parameters(model) == 60_000
    maps = [(1, 32, 32), (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120, 1, 1), (120,), (84,), (10,)]
    assert stages(model, (1, 28, 28)) == maps


def test_lenet5_connects_its_maps_as_table_1_says() -> None:
    table = [
        "X...XXX..XXXX.XX",
        "XX...XXX..XXXX.X",
        "XXX...XXX..X.XXX",
        ".XXX..XXXX..X.XX",
        "..XXX..XXXX.XX.X",
        "...XXX..XXXX.XXX",
    ]
    third = network("mnist_lenet5", (1, 28, 28), "cpu")[6]
    maps = torch.ones(1, 6, 14, 14, requires_grad=True)
    for column, output in enumerate(third(maps).sum(dim=(0, 2, 3))):
        (gradient,) = torch.autograd.grad(output, maps, retain_graph=True)
        connected = gradient.abs().sum(dim=(0, 2, 3)) > 0
        assert connected.tolist() == [row[column] == "X" for row in table]


def test_lenet5_answers_with_the_nearest_code() -> None:
    last = network("mnist_lenet5", (1, 28, 28), "cpu")[-1]
    codes = next(last.buffers())
    assert codes.shape == (10, 84)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    features = torch.randn(5, 84)
    torch.testing.assert_close(last(features), -(torch.cdist(features, codes) ** 2), rtol=1e-4, atol=1e-3)
    assert parameters(last) == 0


def test_alexnet_has_torchvisions_convolutions_but_for_the_first() -> None:
    ours = [layer for layer in network("cifar10_alexnet") if isinstance(layer, nn.Conv2d)]
    with torch.device("meta"):
        theirs = [layer for layer in models.alexnet().features if isinstance(layer, nn.Conv2d)]
    assert ours[0].weight.shape == (64, 3, 5, 5)
    assert [layer.weight.shape for layer in ours[1:]] == [layer.weight.shape for layer in theirs[1:]]
    hidden = 256 * 3 * 3 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10
    assert parameters(network("cifar10_alexnet")) == sum(map(parameters, theirs[1:])) + 64 * 75 + 64 + hidden
    maps = [(64, 32, 32), (64, 15, 15), (192, 15, 15), (192, 7, 7), (384, 7, 7), (256, 7, 7), (256, 3, 3)]
    assert stages(network("cifar10_alexnet")) == [*maps, (2304,), (1024,), (10,)]


def test_vgg16_is_torchvisions_up_to_its_head() -> None:
    model = network("cifar10_vgg16", device="cpu")
    theirs = nn.Sequential(make_layers(cfgs["D"], batch_norm=True), nn.Flatten(), nn.Linear(512, 10))
    same_outputs(model, theirs)
    maps = [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    assert [each for each in stages(model) if each in maps] == maps


def test_resnet18_is_torchvisions_with_the_stem_for_small_images() -> None:
    model = network("cifar10_resnet18", device="cpu")
    same_outputs(model, torchvision(CIFAR, 10, arch="resnet18", small_images=True))
    assert parameters(model) == 11_173_962
    assert stages(model) == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512,), (10,)]


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (56, 0.85)])
def test_a_cifar_resnet_has_the_published_size(depth: int, published: float) -> None:
    """He et al. 2016, section 4.2 (map sizes, layers) and table 6 (millions of parameters)."""
    model = network(f"cifar10_resnet{depth}")
    assert round(parameters(model) / 1e6, 2) == published
    assert stages(model) == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64,), (10,)]
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert len(convolutions) + 1 == depth
    n = (depth - 2) // 6
    assert [each.out_channels for each in convolutions] == [16] * (2 * n + 1) + [32] * 2 * n + [64] * 2 * n


def plain_resnet20(conv: nn.Module, norm: nn.Module, *rest: nn.Module) -> Callable[[Tensor], Tensor]:
    """He et al. 2016, figure 2 with option A, of a model's convolutions, norms and linear layer in their order."""

    def forward(x: Tensor) -> Tensor:
        x = F.relu(norm(conv(x)))
        for conv1, norm1, conv2, norm2 in zip(*[iter(rest[:-1])] * 4, strict=True):
            path = norm2(conv2(F.relu(norm1(conv1(x)))))
            if path.shape != x.shape:
                x = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(path[:, x.shape[1] :])], dim=1)
            x = F.relu(path + x)
        return rest[-1](x.mean(dim=(2, 3)))

    return forward


def plain_wrn16_4(conv: nn.Module, *rest: nn.Module) -> Callable[[Tensor], Tensor]:
    """Zagoruyko & Komodakis 2016, figure 1 (d) and table 1, likewise; the first block of a group projects."""

    def forward(x: Tensor) -> Tensor:
        layers = iter(rest)
        x = conv(x)
        for block in range(6):
            norm1, conv1, norm2, conv2 = islice(layers, 4)
            active = F.relu(norm1(x))
            x = conv2(F.relu(norm2(conv1(active)))) + (x if block % 2 else next(layers)(active))
        norm, linear = layers
        return linear(F.relu(norm(x)).mean(dim=(2, 3)))

    return forward


@torch.no_grad()
@pytest.mark.parametrize(("name", "plain"), [("cifar10_resnet20", plain_resnet20), ("cifar10_wrn16_4", plain_wrn16_4)])
def test_residual_networks_compute_what_their_papers_draw(name: str, plain: Callable[..., Any]) -> None:
    model = drawn(network(name, device="cpu"))
    layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    images = torch.randn(3, *CIFAR)
    outputs = model(images)
    assert not torch.allclose(outputs[0], outputs[1], rtol=0.01)
    torch.testing.assert_close(plain(*layers)(images), outputs, rtol=1e-4, atol=1e-4 * float(outputs.abs().max()))


def test_wide_resnet_has_the_published_size() -> None:
    """Zagoruyko & Komodakis 2016, table 1."""
    model = network("cifar10_wrn16_4")
    assert stages(model) == [(16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256,), (10,)]
    group1 = 16 * 2 + 9 * 16 * 64 + 64 * 2 + 9 * 64 * 64 + 16 * 64 + 2 * (64 * 2 + 9 * 64 * 64)
    group2 = 64 * 2 + 9 * 64 * 128 + 128 * 2 + 9 * 128 * 128 + 64 * 128 + 2 * (128 * 2 + 9 * 128 * 128)
    group3 = 128 * 2 + 9 * 128 * 256 + 256 * 2 + 9 * 256 * 256 + 128 * 256 + 2 * (256 * 2 + 9 * 256 * 256)
    assert parameters(model) == 9 * 3 * 16 + group1 + group2 + group3 + 256 * 2 + 256 * 10 + 10 == 2_748_890


def test_convnext_is_torchvisions_with_smaller_patches() -> None:
    model = network("cifar10_convnext", device="cpu")
    settings = [CNBlockConfig(64, 128, 2), CNBlockConfig(128, 256, 4), CNBlockConfig(256, None, 2)]
    theirs = models.ConvNeXt(settings, num_classes=10)
    theirs.features[0][0] = nn.Conv2d(3, 64, 2, 2)
    same_outputs(model, theirs)
    assert stages(model) == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (256,), (10,)]


# ---- torchvision's classifiers


def test_the_families_are_torchvisions() -> None:
    classes = {arch: get_type_hints(models.get_model_builder(arch))["return"] for arch in models.list_models(models)}
    assert {classes[arch] for arch in FAMILIES} == set(classes.values())


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_classifier_has_the_published_parameters(arch: str) -> None:
    auxiliary = {"inception_v3": 3_326_696}  # counted with the published weights, and left out here
    with torch.device("meta"):
        model = torchvision((3, 224, 224), 1000, arch=arch)
    assert parameters(model) == models.get_model_weights(arch).DEFAULT.meta["num_params"] - auxiliary.get(arch, 0)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_classifier_trains_on_gray_images_of_any_number_of_classes(arch: str) -> None:
    size = FAMILIES[arch]
    with torch.device("meta"):
        model = torchvision((1, size, size), 7, arch=arch)
        outputs = model(torch.zeros(2, 1, size, size))
        assert outputs.shape == (2, 7)
        outputs.sum().backward()
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("alexnet", (3, 62, 62)),
        ("inception_v3", (3, 74, 74)),
        ("maxvit_t", (3, 32, 32)),
        ("vit_b_16", (3, 28, 28)),
        ("vit_b_16", (3, 32, 64)),
    ],
)
def test_a_classifier_that_takes_no_such_images_says_so(arch: str, shape: tuple[int, ...]) -> None:
    size = "x".join(map(str, shape))
    with torch.device("meta"), pytest.raises(ValueError, match=rf"\A{arch} takes no images of {size}: [^\n]+\Z"):
        torchvision(shape, 10, arch=arch)


@pytest.mark.parametrize(
    ("arch", "first_block"),
    [
        ("resnet18", "layer1"),
        ("resnext50_32x4d", "layer1"),
        ("wide_resnet50_2", "layer1"),
        ("densenet121", "features.denseblock1"),
    ],
)
@pytest.mark.parametrize(("small_images", "entering"), [(False, 8), (True, 32)])
def test_small_images_reach_the_first_block_unshrunk(
    arch: str, first_block: str, small_images: bool, entering: int
) -> None:
    with torch.device("meta"):
        model = torchvision((1, 32, 32), 10, arch=arch, small_images=small_images)
        seen: list[torch.Size] = []
        model.get_submodule(first_block).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        model(torch.zeros(2, 1, 32, 32))
    assert seen == [(2, 64, entering, entering)]
    if small_images:
        assert next(m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)) == (64, 1, 3, 3)


def test_what_small_images_cannot_change_is_refused() -> None:
    with pytest.raises(ValueError, match="small_images: alexnet has no stem for small images: leave it out"):
        torchvision((3, 64, 64), 10, arch="alexnet", small_images=True)


def test_an_unknown_arch_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown arch 'resnet181'; did you mean 'resnet18'"):
        torchvision((3, 32, 32), 10, arch="resnet181")


@pytest.mark.parametrize("failure", ["RuntimeError", "ImportError", "AttributeError"])
def test_a_torchvision_that_cannot_be_imported_is_named(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """As beside a torch that it was not built for."""
    for name in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    broken = tmp_path / "site" / "torchvision" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text(f"raise {failure}('operator torchvision::nms does not exist\\nand so on')\n")
    monkeypatch.syspath_prepend(broken.parent.parent)
    done = dltrain("train", "digits_cnn", "--set", "model={name: torchvision, arch: resnet18}")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: model torchvision: torchvision cannot be imported")
    assert f"({failure}: operator torchvision::nms does not exist); `dltrain check-gpu`" in done.err


def test_a_classifier_trains_and_its_checkpoint_is_read(dltrain: Run) -> None:
    Path("net.yaml").write_text("""
        data: {name: digits, limit: 100, val: 20}
        model: {name: torchvision, arch: shufflenet_v2_x0_5}
        descent: {variant: batch}
        optim: {name: sgd, lr: 0.01}
        train: {epochs: 1, precision: fp32}
    """)
    done = dltrain("train", "net.yaml", "--json", "--out", "run")
    assert done.code == 0, done.err
    assert json.loads(dltrain("eval", "run", "--json").out)["loss"] == json.loads(done.out)["test"]["loss"]
