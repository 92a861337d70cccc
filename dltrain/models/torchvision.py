"""torchvision's classifiers, by name."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, get_type_hints

from dltrain.lazy import nn, torch
from dltrain.models.activations import Shape
from dltrain.models.layers import shape_after, show
from dltrain.registry import register, suggest


@register("model")
def torchvision(shape: Shape, outputs: int, *, arch: str, small_images: bool = False) -> nn.Module:
    """A classifier of torchvision's, from freshly drawn weights: nothing is downloaded.

    Its last layer has as many outputs as the data needs, and its first convolution as many input channels.

    arch: its name in torchvision.models: `resnet18`, `densenet121`, `vit_b_16`, …
    small_images: a stem of one 3x3 convolution with stride 1 and no pooling, so that a CIFAR image is not shrunk to a
        quarter before the first block (He et al. 2016, section 4.2); resnet, resnext, wide_resnet and densenet only

    GoogLeNet and Inception come without their auxiliary outputs.  A first convolution that is replaced is drawn as
    torch draws one.

    Raises ValueError where torchvision cannot be imported, has no such classifier, or the classifier takes no images
    of this size.
    """
    try:
        from torchvision import models  # type: ignore[import-untyped]
    except Exception as error:
        # beside a torch that it was not built for: ImportError, OSError, AttributeError or RuntimeError
        reason = str(error).partition("\n")[0]
        text = f"torchvision cannot be imported ({type(error).__name__}: {reason})"
        raise ValueError(f"{text}; `dltrain check-gpu` says what to install") from None

    known = models.list_models(module=models)
    if arch not in known:
        raise ValueError(f"unknown arch '{arch}'{suggest(arch, known)}")
    builder = models.get_model_builder(arch)
    family = get_type_hints(builder)["return"]
    pool = {models.ResNet: "maxpool", models.DenseNet: "features.pool0"}.get(family, "")
    if small_images and not pool:
        mend = "leave it out, or take a resnet, resnext, wide_resnet or densenet"
        raise ValueError(f"small_images: {arch} has no stem for small images: {mend}")
    channels, height, width = shape
    settings = {
        "image_size": height,  # vision transformers, which refuse another width when they run
        "input_size": (height, width),  # MaxViT
        "aux_logits": False,  # with them GoogLeNet and Inception give tuples while training
        "init_weights": True,  # both warn where it is left out
    }
    takes = inspect.signature(family).parameters
    # RegNet works its widths out with tensors, and on the meta device (a checkpoint is being read) they hold no numbers
    place = torch.device("cpu") if family is models.RegNet else nullcontext()
    try:
        with place:
            model: nn.Module = builder(
                weights=None, num_classes=outputs, **{name: value for name, value in settings.items() if name in takes}
            )
        model.to(torch.get_default_device())
        if channels != 3:
            _replace_first_conv(model, in_channels=channels)
        if small_images:
            _replace_first_conv(model, kernel_size=3, stride=1, padding=1)
            model.set_submodule(pool, nn.Identity())
        shape_after(model, shape)
    except (AssertionError, RuntimeError, ValueError) as error:  # vision transformers assert
        reason = str(error).partition("\n")[0].rstrip(".!")
        raise ValueError(f"{arch} takes no images of {show(shape)}: {reason}; choose another arch or size") from None
    return model


def _replace_first_conv(model: nn.Module, **changes: Any) -> None:
    """In its place comes a new one with its settings but for the changes."""
    name, conv = next((name, each) for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    settings: dict[str, Any] = {
        setting: getattr(conv, setting)
        for setting in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    }
    model.set_submodule(name, nn.Conv2d(**{**settings, "bias": conv.bias is not None, **changes}))
