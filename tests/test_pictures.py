"""Image files as pixels: every format, mode and turn, sizes, and files that are broken."""

from __future__ import annotations

import io
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import BLUE, GREEN, RED, draw, noise
from PIL import Image
from torchvision.transforms import functional

from dltrain.data import pictures
from dltrain.data.pictures import Header, Unreadable, attempt, decode, fitted, in_parallel, read, read_header


def pixels(path, size=None, fit="crop", channels=None):
    """A file as an image folder has it, [C, H, W]: of its own size and channels where none are given."""
    height, width, gray = read_header(path)
    shape = (channels or (1 if gray else 3), *(size or (height, width)))
    return fitted(decode(read(path), shape), shape, fit)


# Formats


@pytest.mark.parametrize("name", ["one.png", "one.PNG", "one.jpg", "one.JPEG", "one.bmp", "one.webp", "one.gif"])
def test_every_kind_of_file_is_read(tmp_path, name):
    found = pixels(draw(tmp_path / name, Image.new("RGB", (4, 6), (200, 40, 40))))
    assert (found.shape, found.dtype) == ((3, 6, 4), np.uint8)
    assert np.abs(found[:, 3, 2].astype(int) - (200, 40, 40)).max() <= 3  # what JPEG and WebP lose


def test_a_name_may_say_another_format(tmp_path):
    path = draw(tmp_path / "one.png", Image.new("RGB", (4, 6), RED)).rename(tmp_path / "one.jpg")
    assert pixels(path)[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("work", [read_header, lambda path: decode(read(path), (3, 6, 4))])
def test_a_format_that_pillow_knows_and_we_do_not_is_refused(tmp_path, work):
    path = draw(tmp_path / "one.tiff", Image.new("RGB", (4, 6))).rename(tmp_path / "one.png")
    assert attempt(work, path) == Unreadable("not one of PNG, JPEG, BMP, WEBP, GIF")


# Modes


def gray16(values):
    return Image.fromarray(np.array(values, np.uint16))


def palette(colours, transparent=None):
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def row(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


MODES = {
    "1": (row("1", 0, 255), [[[0, 255]]]),
    "L": (row("L", 7, 200), [[[7, 200]]]),
    "L, one value transparent": (row("L", 7, 200), [[[255, 200]]]),
    "LA": (row("LA", (7, 255), (0, 0), (0, 51)), [[[7, 255, 204]]]),
    "I;16": (gray16([[0, 65535, 257 * 100, 257 * 100 + 129]]), [[[0, 255, 100, 101]]]),
    "P": (palette([RED, BLUE]), [[[255, 0]], [[0, 0]], [[0, 255]]]),
    "P, one colour transparent": (palette([RED, BLUE], transparent=0), [[[255, 0]], [[255, 0]], [[255, 255]]]),
    "RGB": (row("RGB", RED, GREEN), [[[255, 0]], [[0, 255]], [[0, 0]]]),
    "RGBA": (row("RGBA", (*RED, 128), (*GREEN, 255)), [[[255, 0]], [[127, 255]], [[127, 0]]]),  # (1 - 128 / 255) * 255
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_gray_or_rgb_on_white(tmp_path, mode):
    image, expected = MODES[mode]
    path = draw(tmp_path / "one.png", image, **({"transparency": 7} if "one value" in mode else {}))
    assert pixels(path).tolist() == expected


def test_cmyk_becomes_rgb(tmp_path):
    path = draw(tmp_path / "one.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert np.abs(pixels(path).astype(int) - np.array(RED)[:, None, None]).max() <= 3


def test_colour_becomes_gray_by_its_luma_and_gray_colour_of_three_equals(tmp_path):
    path = draw(tmp_path / "colour.png", noise(0))
    luma = noise(0) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision
    assert np.abs(pixels(path, channels=1)[0] - luma).max() <= 0.51
    path = draw(tmp_path / "gray.png", noise(0, channels=1))
    assert np.array_equal(pixels(path, channels=3), np.repeat(pixels(path), 3, 0))


def test_of_a_film_the_first_picture_is_taken(tmp_path):
    film = [Image.new("RGB", (4, 6), colour) for colour in (RED, BLUE)]
    path = draw(tmp_path / "one.gif", film[0], save_all=True, append_images=film[1:])
    assert pixels(path)[:, 0, 0].tolist() == list(RED)


# Turns and sizes


TURNS = {  # EXIF 2.32, 4.6.4, tag Orientation: which sides of what is seen the stored row 0 and column 0 are
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", ["one.png", "one.webp", "one.jpg"])
def test_images_are_turned_as_exif_says(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.kron(noise(3, 2, 3), np.ones((8, 8, 1), np.uint8))  # 16x24, of flat squares that JPEG keeps
    lossless = {"quality": 100} | ({"lossless": True} if name == "one.webp" else {"subsampling": 0})
    path = draw(tmp_path / name, stored, exif=exif, **({} if name == "one.png" else lossless))
    expected = TURNS[orientation](stored).transpose(2, 0, 1)
    assert read_header(path) == Header(*expected.shape[1:], gray=False)
    assert np.abs(pixels(path).astype(int) - expected).max() <= (5 if name == "one.jpg" else 0)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (7, 9)])
@pytest.mark.parametrize("size", [[10, 20], [20, 10], [16, 16]])
def test_fit_agrees_with_cropping_or_padding_by_hand(tmp_path, height, width, size):
    image = Image.fromarray(noise(1, height, width))
    path = draw(tmp_path / "one.png", image)
    found = {fit: pixels(path, size, fit) for fit in ("crop", "pad", "stretch")}
    high, wide = size

    def resized(part, high=high, wide=wide):
        return np.asarray(functional.resize(part, [high, wide])).transpose(2, 0, 1).astype(int)

    assert np.abs(found["stretch"] - resized(image)).max() <= 1
    by_hand = image.resize((wide, high), Image.Resampling.BILINEAR, box=middle(image, wide / high))
    assert np.array_equal(found["crop"], np.asarray(by_hand).transpose(2, 0, 1))
    scale = min(high / height, wide / width)
    inner = round(height * scale), round(width * scale)
    top, left = round((high - inner[0]) / 2), round((wide - inner[1]) / 2)
    padded = np.zeros((3, high, wide), int)
    padded[:, top : top + inner[0], left : left + inner[1]] = resized(image, *inner)
    assert np.abs(found["pad"] - padded).max() <= 1


def middle(image, ratio):
    """The largest box in the middle whose width is `ratio` times its height: left, upper, right, lower."""
    width, height = min(image.width, image.height * ratio), min(image.height, image.width / ratio)
    return (
        (image.width - width) / 2,
        (image.height - height) / 2,
        (image.width + width) / 2,
        (image.height + height) / 2,
    )


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    smooth = Image.fromarray(noise(5, 4, 6)).resize((960, 640), Image.Resampling.BICUBIC)
    path = draw(tmp_path / "one.jpg", smooth, quality=95)
    sizes = {16: (120, 80), 40: (120, 80), 160: (480, 320), 320: (960, 640), 640: (960, 640)}
    assert {side: decode(read(path), (3, 16, side)).size for side in sizes} == sizes
    assert decode(read(path), (3, 160, 16)).size == (480, 320)
    found = pixels(path, [16, 24]).astype(int)
    assert np.abs(found - np.asarray(smooth.resize((24, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)).max() <= 4


# Broken files


def claims(width, height):
    """A PNG whose header states that size."""
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content.getvalue()[24:29]
    return content.getvalue()[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content.getvalue()[33:]


WORK = pytest.mark.parametrize("work", [read_header, lambda path: decode(read(path), (3, 8, 8))])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((10_000, 10_000), r"10,000 x 10,000 pixels, expected at most 89,478,485"),
        ((100_000, 100_000), "exceeds limit"),  # Pillow's own words, for more than twice as many
        ((2**31 - 1, 2**31 - 1), "exceeds limit"),
    ],
)
@WORK
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, size, reason, work):
    assert reason in attempt(work, draw(tmp_path / "one.png", claims(*size))).reason


@WORK
def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path, work):
    path = draw(tmp_path / "one.png", noise(0))
    with path.open("r+b") as opened:
        opened.truncate(2**40)  # a hole: takes no space
    assert attempt(work, path) == Unreadable("1,099,511,627,776 bytes, expected at most 1,073,741,824")


@WORK
def test_a_file_that_is_not_there_is_said_to_be_absent(tmp_path, work):
    assert attempt(work, tmp_path / "one.png") == Unreadable("No such file or directory")


def test_a_failure_without_words_is_told_by_its_name_and_in_one_line():
    def fail(error):
        raise error

    assert attempt(fail, KeyError()) == Unreadable("KeyError")
    assert attempt(fail, ValueError("one\n  two")) == Unreadable("one two")
    with pytest.raises(KeyboardInterrupt):
        attempt(fail, KeyboardInterrupt())


def encoded(kind, **options):
    content = io.BytesIO()
    Image.fromarray(noise(0, 12, 12)).save(content, kind, **options)
    return content.getvalue()


WHOLE = [encoded("PNG"), encoded("JPEG"), encoded("JPEG", progressive=True), *map(encoded, ("BMP", "GIF", "WEBP"))]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_image_ends_in_an_image_or_a_reason(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    found = attempt(lambda path: pixels(path, [8, 8]), draw(tmp_path / "broken.png", bytes(content)))
    if isinstance(found, Unreadable):
        assert found.reason
        assert found.reason.isprintable()
    else:
        assert found.shape in ((1, 8, 8), (3, 8, 8))


# In parallel


@pytest.mark.parametrize("size", [1, 3, 10, 100])
@pytest.mark.parametrize("items", [0, 1, 10, 50])
def test_results_come_in_order_and_failures_in_their_place(items, size):
    def work(item):
        if item % 7 == 3:
            raise ValueError(f"no {item}")
        return item * item

    expected = [Unreadable(f"no {item}") if item % 7 == 3 else item * item for item in range(items)]
    assert list(in_parallel(work, range(items), size, "working", print)) == expected


def test_no_more_is_begun_than_will_soon_be_taken(monkeypatch):
    """What nobody takes would fill the memory."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    begun = []

    class Items(list):
        def __getitem__(self, place):
            begun.append(place)
            return super().__getitem__(place)

    results = in_parallel(str, Items(range(1000)), 5, "working", print)
    next(results)
    assert len(begun) == 2 * 2
    assert list(results) == [str(number) for number in range(1, 1000)]
    assert len(begun) == 200


def test_who_takes_no_more_does_not_wait_for_the_rest(monkeypatch):
    done = []
    stopped = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait=wait)

    def work(item):
        if item:
            stopped.wait(20)
        done.append(item)

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(pictures, "ThreadPoolExecutor", Pool)
    results = in_parallel(work, range(100), 1, "working", print)
    next(results)
    results.close()
    assert stopped.is_set()
    assert len(done) <= 1 + 4  # what four threads were at


def test_threads_work_at_the_same_time(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    barrier = threading.Barrier(3, timeout=20)  # opens when three have come to it
    assert not any(isinstance(each, Unreadable) for each in in_parallel(lambda _: barrier.wait(), "abc", 1, "", print))


def test_progress_is_told_in_lines(monkeypatch, capfd):
    monkeypatch.setattr(pictures, "REPORT_EVERY", 0)
    notes = []
    list(in_parallel(str, range(2020), 1000, "decoding", notes.append))
    assert notes == [f"decoding: {done} of 2,020 images" for done in ("1,000", "2,000", "2,020")]
    assert capfd.readouterr().err == ""


def test_progress_is_told_every_five_seconds(monkeypatch):
    clock = count(step=2)  # seconds, each time that it is looked at
    monkeypatch.setattr(pictures.time, "monotonic", lambda: next(clock))
    notes = []
    list(in_parallel(str, range(6), 1, "decoding", notes.append))
    assert notes == ["decoding: 3 of 6 images", "decoding: 6 of 6 images"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr(pictures, "REPORT_EVERY", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    notes = []
    list(in_parallel(str, range(20), 5, "decoding", notes.append))
    out, err = capfd.readouterr()
    assert out == ""
    assert "decoding" in err
    assert "20/20" in err
    assert notes == []
