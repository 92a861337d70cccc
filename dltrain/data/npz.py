"""Arrays of the user's own, in NumPy's npz format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dltrain.data.dataset import Dataset, Split
from dltrain.data.files import Files
from dltrain.data.random import generator
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import PositiveInt, register

if TYPE_CHECKING:
    from collections.abc import Sequence
    from zipfile import ZipInfo

    import numpy

SPLIT = ("x_train", "y_train", "x_test", "y_test")
WHOLE = ("x", "y")
CHANNELS = (1, 3, 4)  # what tells the channels of images from their height and width
MOST_CLASSES = 100_000  # a larger label is a mistake, and a name for each class would fill the memory
Share = Annotated[float, Field(gt=0, lt=1)]


@register("data")
def npz(
    files: Files,
    *,
    path: str,
    test: PositiveInt | Share | None = None,
    layout: Literal["nhwc", "nchw"] | None = None,
    class_names: list[str] | None = None,
) -> Dataset:
    """Arrays of your own: x_train, y_train, x_test and y_test, or x and y, in a file that numpy.savez wrote.

    Images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], labels whole numbers [N] from 0.

    path: the file, absolute or under the data root
    test: images of x and y to hold out for testing, or a fraction; the same ones whatever the run's seed
    layout: whether the channels come last or first; needed where the shape does not tell, as C is 1, 3 or 4
    class_names: one for each label; default: the numbers

    Raises DataError where the file or an array cannot be used, ValueError where a setting does not fit them.
    """
    with files.own(path) as (opened, sha256):
        arrays = _arrays(path, opened)
    names = SPLIT if "x_train" in arrays else WHOLE
    if not arrays.keys() >= set(names):
        found = ", ".join(sorted(arrays)[:20]) or "none"
        raise DataError(f"{path}: expected arrays {', '.join(SPLIT)}, or x and y, found {found}")
    splits = []
    for x, y in zip(names[::2], names[1::2], strict=True):
        images, labels = _images(path, x, arrays[x], layout), _labels(path, y, arrays[y])
        if len(images) != len(labels):
            raise DataError(f"{path}: expected a label for each image, found {len(images)} {x} and {len(labels)} {y}")
        splits.append(Split(images, labels))
    if names is WHOLE:
        if test is None:
            raise ValueError(f"{path} has x and y alone: set test, e.g. to 0.2, to hold images out for testing")
        splits = [*_held_out(splits[0], test)]
    elif test is not None:
        raise ValueError(f"{path} has x_test and y_test: leave out test, which holds images out of x and y")
    count = 1 + max(int(split.labels.max()) for split in splits)
    if class_names is not None and len(class_names) < count:
        raise ValueError(f"class_names: {len(class_names)} names, but {path} has labels 0..{count - 1}")
    classes = tuple(str(label) for label in range(count)) if class_names is None else tuple(class_names)
    train, held_out = splits
    return Dataset(train, held_out, classes, {path: sha256})


def _arrays(path: str, opened: Any) -> dict[str, numpy.ndarray[Any, Any]]:
    """The arrays that have one of our names; nothing is unpickled."""
    import numpy

    try:
        archive = numpy.load(opened, allow_pickle=False)
        _check_size(path, archive.zip.infolist())
        # a member that is no array comes as bytes
        return {name: numpy.asarray(archive[name]) for name in archive.files if name in (*SPLIT, *WHOLE)}
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path}: its arrays do not fit in memory") from None
    except Exception as error:  # a broken zip or header can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        mend = "; save arrays of numbers, not of objects" if "Object arrays" in reason else ""
        raise DataError(f"{path}: not an npz file of arrays, as numpy.savez writes them: {reason}{mend}") from None


def _check_size(path: str, members: Sequence[ZipInfo]) -> None:
    """Raises DataError where the arrays would fill the memory: a few kilobytes can unpack to anything."""
    import psutil

    wanted = sum(member.file_size for member in members if member.filename.removesuffix(".npy") in (*SPLIT, *WHOLE))
    free = psutil.virtual_memory().available
    if wanted > free:
        raise DataError(f"{path}: its arrays have {wanted:,} bytes, and {free:,} of memory are free")


def _images(
    path: str, name: str, array: numpy.ndarray[Any, Any], layout: Literal["nhwc", "nchw"] | None
) -> torch.Tensor:
    """uint8 `[N, C, H, W]`; it shares the array's memory unless the channels come last."""
    if array.dtype != "uint8":
        mend = "; multiply values in 0..1 by 255 and save them as uint8" if array.dtype.kind == "f" else ""
        raise DataError(f"{path}: {name}: expected uint8 images, found {array.dtype}{mend}")
    if array.ndim not in (3, 4) or not array.size:
        raise DataError(f"{path}: {name}: expected images [N, H, W], [N, H, W, C] or [N, C, H, W], found {array.shape}")
    images = torch.from_numpy(array)
    if array.ndim == 3:
        return images.unsqueeze(1)
    if layout is None:
        fitting = [each for each, at in (("nhwc", 3), ("nchw", 1)) if array.shape[at] in CHANNELS]
        if len(fitting) != 1:
            raise ValueError(
                f"{path}: {name} {array.shape} does not tell where its channels are: set layout: nhwc or nchw"
            )
        layout = "nhwc" if fitting == ["nhwc"] else "nchw"
    return images.permute(0, 3, 1, 2).contiguous() if layout == "nhwc" else images


def _labels(path: str, name: str, array: numpy.ndarray[Any, Any]) -> torch.Tensor:
    """int64 `[N]`, also of `[N, 1]`, as Keras has the labels of CIFAR."""
    if array.dtype.kind not in "iu" or not array.size or array.shape not in ((array.size,), (array.size, 1)):
        raise DataError(f"{path}: {name}: expected whole numbers [N], found {array.dtype} {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MOST_CLASSES:
        raise DataError(
            f"{path}: {name}: expected labels from 0 to {MOST_CLASSES - 1}, found {low if low < 0 else high}"
        )
    return torch.from_numpy(array.astype("int64")).view(-1)


def _held_out(split: Split, test: float) -> tuple[Split, Split]:
    count = round(test * len(split)) if isinstance(test, float) else test
    if not 0 < count < len(split):
        raise ValueError(f"test: {test} of {len(split)} images leaves an empty split")
    order = torch.randperm(len(split), generator=generator("npz test"))
    return split.subset(order[count:].sort().values), split.subset(order[:count].sort().values)
