"""Image files of any size and mode as uint8 `[C, H, W]`, decoded by Pillow in parallel."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from dltrain.data.download import REPORT_EVERY, Report
from dltrain.data.files import LARGEST

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Fit = Literal["crop", "pad", "stretch"]
Shape = tuple[int, int, int]  # channels, height, width

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")  # what a file may be, whatever its name says: Pillow reads far more
MOST_PIXELS = (1 << 28) // 3  # of one image, as Pillow has it: 256 MiB of RGB


class Header(NamedTuple):
    """Height and width of an image as it is to be seen, and whether it is gray."""

    height: int
    width: int
    gray: bool


class Unreadable(NamedTuple):
    """In place of a result: why a file has none."""

    reason: str


def read_header(path: Path) -> Header:
    """Does not decode the pixels, so an EXIF orientation that comes after those of a PNG is not seen."""
    import PIL.Image

    _check_bytes(path.stat().st_size)
    with PIL.Image.open(path, formats=FORMATS) as image:
        _check_pixels(image)
        width, height = image.size
        # asked for EXIF that may come after the pixels, Pillow decodes a PNG
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) >= 5
        gray = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        return Header(width, height, gray) if turned else Header(height, width, gray)


def read(path: Path) -> bytes:
    """The file's bytes; raises ValueError where it is too large to be an image."""
    with path.open("rb") as opened:
        _check_bytes(os.fstat(opened.fileno()).st_size)
        return opened.read()


def _check_bytes(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, expected at most {LARGEST:,}")


def _check_pixels(image: Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels, expected at most {MOST_PIXELS:,}")


def decode(content: bytes, shape: Shape) -> Image:
    """The image of a file's bytes, upright, gray or RGB as the shape says; to be given the shape's size by `fitted`.

    Transparent pixels are laid on white; 16 bits become 8 by value / 257, rounded.  A JPEG that is far larger than the
    shape is decoded smaller, not below twice its longer side.  Raises whatever Pillow raises of a broken image.
    """
    import numpy as np
    import PIL.Image
    from PIL import ImageOps

    channels, *size = shape
    image: Image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    _check_pixels(image)
    image.draft(None, (2 * max(size), 2 * max(size)))  # libjpeg skips frequencies: eight times smaller, at most
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def fitted(image: Image, shape: Shape, fit: Fit) -> np.ndarray[Any, Any]:
    """uint8 `[C, H, W]` of that shape, bilinear with antialiasing; an image of that size is left as it is."""
    import numpy as np
    from PIL import ImageOps
    from PIL.Image import Resampling

    channels, height, width = shape
    if fit == "crop":
        image = ImageOps.fit(image, (width, height), Resampling.BILINEAR)
    elif fit == "pad":
        image = ImageOps.pad(image, (width, height), Resampling.BILINEAR)
    else:
        image = image.resize((width, height), Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def attempt(work: Callable[[_Item], _Result], item: _Item) -> _Result | Unreadable:
    """`work(item)`, or why it failed."""
    from PIL import UnidentifiedImageError

    try:
        return work(item)
    except UnidentifiedImageError:
        return Unreadable(f"not one of {', '.join(FORMATS)}")
    except Exception as error:  # a broken image makes Pillow raise almost anything
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return Unreadable(" ".join(reason.split()))


def in_parallel(
    work: Callable[[_Item], _Result], items: Sequence[_Item], size: int, what: str, report: Report
) -> Iterator[_Result | Unreadable]:
    """`work` of each item, in order, `size` of them at a time in one of as many threads as there are processors.

    Pillow lets other threads run while it decodes.  On two processors two threads take half the time of one for JPEGs
    of 500x375, and about the same for 32x32, where two processes took half at best; but processes cannot be started
    from everywhere: a script that does not guard its main part would start itself again.
    """

    def several(part: Sequence[_Item]) -> list[_Result | Unreadable]:
        return [attempt(work, each) for each in part]

    threads = os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    parts = (items[start : start + size] for start in range(0, len(items), size))
    waiting: deque[Future[list[_Result | Unreadable]]] = deque()
    done = 0
    try:
        with _progress(what, len(items), report) as tell:
            while True:
                # two parts for each thread: what is ready and not yet taken stays small
                waiting += [pool.submit(several, part) for part in islice(parts, 2 * threads - len(waiting))]
                if not waiting:
                    return
                found = waiting.popleft().result()
                yield from found
                done += len(found)
                tell(done)
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _progress(what: str, total: int, report: Report) -> Iterator[Callable[[int], None]]:
    """Shows how many are done: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    reported = time.monotonic()

    def line(done: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= REPORT_EVERY:
            reported = time.monotonic()
            report(f"{what}: {done:,} of {total:,} images")

    yield line
