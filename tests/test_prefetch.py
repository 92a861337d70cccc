"""Images that stay where they are: the same batches as from the device, made ahead, by a thread that goes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Run
from image_files import pets, read_pets

import dltrain.components  # noqa: F401  registers augmentations
from dltrain import build, checkpoint, rundir
from dltrain.data import prefetch
from dltrain.data.batches import Batches, Normalise
from dltrain.data.dataset import Split
from dltrain.data.prefetch import AHEAD, Ahead, Stream, free_memory, where_images_live
from dltrain.data.prepare import measure_normalisation
from dltrain.errors import ConfigError
from dltrain.registry import Item
from dltrain.tasks import Classification

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
AUGMENT = ["flip", {"translate": 2}, {"mixup": 0.4}]
WAIT = 30  # seconds, after which a test fails that would wait for ever


def noise(images: int) -> Split:
    pixels = torch.randint(256, (images, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(pixels, torch.arange(images) % 3)


def batches(split: Split, resident: bool, device: torch.device = CPU, step_size: int = 6, **changes: Any) -> Batches:
    given: dict[str, Any] = {
        "micro_size": 4,
        "augment": [Item("augmentation", "mixing").read(each) for each in AUGMENT],
    }
    normalise = Normalise(measure_normalisation(split.images), device, torch.channels_last)
    settings = {"seed": 3, "step_size": step_size, "classes": 3, "balance": False} | given | changes
    return Batches(
        split, normalise, task=Classification((1, 1, 1), 10, "softmax"), resident=resident, device=device, **settings
    )


def same(one: Any, other: Any) -> bool:
    """Two steps are the same bits."""
    return all(
        torch.equal(images, images_) and torch.equal(targets, targets_) and share == share_
        for (images, targets, share), (images_, targets_, share_) in zip(one, other, strict=True)
    )


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "dltrain images"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    if threads():
        gc.collect()
    assert threads() == []


# Where images live

GB = 10**9


@pytest.mark.parametrize(
    ("size", "device", "free", "mapped", "where", "why"),
    [
        (50 * GB, "cpu", 1 * GB, False, "resident", "in memory"),
        (10 * GB, "cpu", 20 * GB, True, "resident", "mapped from a file, 10,000 MB, at most half of 20,000 MB free"),
        (11 * GB, "cpu", 20 * GB, True, "streamed", "mapped from a file, 11,000 MB, more than half of 20,000 MB free"),
        (10 * GB, "cuda", 20 * GB, False, "resident", "10,000 MB, at most half of 20,000 MB free"),
        (11 * GB, "cuda", 20 * GB, False, "streamed", "11,000 MB, more than half of 20,000 MB free"),
        (11 * GB, "mps", 20 * GB, True, "streamed", "mapped from a file, 11,000 MB, more than half of 20,000 MB free"),
    ],
)
def test_images_live_on_the_device_where_they_take_at_most_half_of_what_is_free(
    size: int, device: str, free: int, mapped: bool, where: str, why: str
) -> None:
    assert where_images_live(size, device, free, mapped) == (where, why)
    assert where_images_live(size, device, max(free, size), mapped, True) == ("resident", "asked for")
    assert where_images_live(size, device, free, mapped, False) == ("streamed", "asked for")


def test_images_that_do_not_fit_are_not_made_resident() -> None:
    assert where_images_live(5 * GB, "cpu", 1 * GB, True, True)[0] == "resident"  # they stay mapped
    said = r"data\.resident: true: 5,000 MB of images, and 1,000 MB free on the cuda device; set it to auto"
    with pytest.raises(ConfigError, match=said):
        where_images_live(5 * GB, "cuda", 1 * GB, False, True)


def test_free_memory_is_what_the_device_says_and_what_torch_keeps_for_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=123)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert free_memory(CPU) == 123
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 33)
    assert free_memory(torch.device("cuda", 0)) == 1007
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 900)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 200)
    assert free_memory(torch.device("mps")) == 700


# The same batches


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"micro_size": 6}, {"step_size": 1, "micro_size": 1}, {"step_size": 20}, {"balance": True}], ids=str
)
def test_streamed_batches_are_those_of_resident_images(device: torch.device, changes: dict[str, Any]) -> None:
    changes = {"augment": []} | changes if changes.get("micro_size") == 1 else changes  # one image mixes with none
    split = noise(20)
    resident, streamed = (batches(split, where, device, **changes) for where in (True, False))
    for epoch in range(3):
        for step in range(resident.steps):
            assert same(streamed.step(epoch, step), resident.step(epoch, step))


def test_in_whatever_order_steps_are_asked_for() -> None:
    split = noise(20)
    resident, streamed = batches(split, True), batches(split, False)
    order = [(0, 2), (0, 3), (0, 0), (0, 0), (1, 1), (0, 1), (0, 2), (5, 3), (6, 0), (0, 0), (0, 1)]
    for at in order:
        assert same(streamed.step(*at), resident.step(*at))
        next(streamed.step(0, 0))  # as the pictures of an epoch do
        next(streamed.step(*at))
        assert same(streamed.step(*at), resident.step(*at))


def test_steps_that_are_taken_by_turns_do_not_mix() -> None:
    split = noise(20)
    resident, streamed = batches(split, True), batches(split, False)
    found = list(zip(streamed.step(0, 0), streamed.step(1, 1), streamed.step(0, 1), strict=True))
    for number, at in enumerate([(0, 0), (1, 1), (0, 1)]):
        assert same([parts[number] for parts in found], resident.step(*at))


def test_images_that_do_not_lie_in_one_block() -> None:
    split = noise(20)
    other = Split(split.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), split.labels)
    assert not other.images.is_contiguous()
    assert same(batches(other, False).step(0, 1), batches(split, True).step(0, 1))


# The thread


def test_a_thread_cuts_ahead_and_no_further_than_it_may() -> None:
    made = taken = most = 0
    full, stop = threading.Event(), 1000

    def items() -> Iterator[int]:
        nonlocal made, most
        for number in range(stop):
            made += 1
            most = max(most, made - taken)
            if made == AHEAD:
                full.set()
            yield number

    ahead = Ahead(items(), AHEAD)
    assert full.wait(WAIT)  # though none is asked for
    for number in range(stop):
        taken += 1
        assert next(ahead) == number
    assert most <= AHEAD
    with pytest.raises(StopIteration):
        next(ahead)


def test_the_next_steps_are_cut_while_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, third = [], threading.Event()
    real = prefetch._cut

    def counted(images: Any, index: torch.Tensor, *where: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        cut.append(index.tolist())
        if len(cut) == AHEAD:
            third.set()
        return real(images, index, *where)

    monkeypatch.setattr(prefetch, "_cut", counted)
    made = batches(noise(20), False)
    next(made.step(0, 0))
    assert third.wait(WAIT)
    order = made.order(0).tolist()
    assert cut[:AHEAD] == [order[:4], order[4:6], order[6:10]]
    for step in range(made.steps):
        list(made.step(0, step))
    assert sorted(number for part in cut[-7:] for number in part) == list(
        range(20)
    )  # twenty images in steps of 4 and 2


class Odd(BaseException):
    """As KeyboardInterrupt is, no Exception."""


@pytest.mark.parametrize("kind", [OSError, MemoryError, Odd])
def test_what_goes_wrong_in_the_thread_is_raised_where_its_images_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    split = noise(20)
    resident, streamed = batches(split, True), batches(split, False)
    bad = resident.order(0)[8].item()
    real = prefetch._cut

    def broken(images: Any, index: torch.Tensor, *where: Any) -> Any:
        if bad in index:
            raise kind("pets.images")
        return real(images, index, *where)

    with monkeypatch.context() as patch:
        patch.setattr(prefetch, "_cut", broken)
        assert same(streamed.step(0, 0), resident.step(0, 0))
        for _ in range(2):  # and again, rather than wait for a thread that has ended
            with pytest.raises(kind, match=r"pets\.images"):
                list(streamed.step(0, 1))
    assert same(streamed.step(0, 1), resident.step(0, 1))


def test_the_thread_goes_when_its_epoch_ends_or_nobody_has_the_batches() -> None:
    made = batches(noise(20), False)
    for step in range(made.steps):
        assert len(threads()) <= 1
        list(made.step(0, step))
    for thread in threads():
        thread.join(WAIT)
    assert threads() == []
    next(made.step(1, 0))
    next(made.step(0, 1))
    assert len(threads()) == 1
    del made
    assert threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_loop_that_is_interrupted_leaves_no_thread(error: type[BaseException]) -> None:
    def train() -> None:
        for _ in batches(noise(200), False).step(0, 0):
            assert threads()
            raise error

    with pytest.raises(error):
        train()
    gc.collect()
    assert threads() == []


ENDS = """
import torch
from dltrain.data.prefetch import Stream
stream = Stream(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), 5, 5, torch.device("cpu"))
kept = stream.cut(0, torch.arange(1000), 0)
"""


def test_a_program_ends_that_still_has_a_stream() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# On CUDA


class Watched:
    """A CUDA stream, or what an event of one is, that notes what is asked of it."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def record_event(self) -> int:
        self.told.append("copied")
        return len(self.told)

    def wait_event(self, event: int) -> None:
        self.told.append(("waits for", event))


def test_what_is_computed_waits_for_its_own_copy_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls in their order, where there is no CUDA: on a CPU copies are done at once."""
    told: list[Any] = []
    pinned: list[bool] = []
    real = torch.empty

    def empty(*size: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return real(*size, **options)

    monkeypatch.setattr(prefetch.torch, "empty", empty, raising=False)
    monkeypatch.setattr(prefetch.torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(prefetch.torch.cuda, "current_stream", lambda device: Watched(told))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda images, stream: told.append(("kept for", type(stream))), raising=False
    )
    split = noise(4)
    stream = Stream(split.images, 4, 4, CPU)
    stream.copies = Watched(told)  # type: ignore[assignment]
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(stream.cut(0, order, 0), split.images[order])
    assert told == ["copied", ("waits for", 1), ("kept for", Watched)]
    assert pinned == [True]


@pytest.mark.cuda
def test_images_on_a_busy_device_are_whole_and_not_written_over() -> None:
    """Without the wait they would be read too soon; without the record the next copies would come into their memory."""
    split = noise(4000)
    device = torch.device("cuda", 0)
    stream, order = Stream(split.images, 50, 50, device), torch.randperm(4000)
    sums = []
    for place in range(0, 4000, 50):
        images = stream.cut(0, order, place)
        torch.cuda._sleep(10_000_000)  # cycles, so that all copies are done long before
        sums.append(images.sum((1, 2, 3)))
        del images
    assert torch.equal(torch.cat(sums).cpu(), split.images[order].sum((1, 2, 3)))


# Runs

CONFIG = """
data: {name: folder, path: pets, augment: [flip]}
model: {name: mlp, hidden: [8]}
optim: {name: sgd, lr: 0.01, momentum: 0.9}
descent: {batch_size: 4, micro_batch_size: 3}
train: {epochs: 2}
"""


def weights(path: str) -> dict[str, torch.Tensor]:
    return checkpoint.read(rundir.steps(Path(path))[0])[0]


def test_a_folder_larger_than_memory_is_streamed_to_the_same_weights(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    pets(tmp_path / "data", each=5)
    (tmp_path / "c.yaml").write_text(CONFIG)
    train = read_pets(tmp_path / "data").train
    assert train.mapped
    assert not train.subset(torch.arange(3)).mapped  # which copies them
    cut: list[int] = []
    real = prefetch._cut

    def noted(images: Any, index: torch.Tensor, *where: Any) -> Any:
        cut.extend(index.tolist())
        return real(images, index, *where)

    monkeypatch.setattr(prefetch, "_cut", noted)
    assert dltrain("train", "c.yaml", "--out", "resident", "-q").code == 0
    assert cut == []
    with monkeypatch.context() as patch:
        patch.setattr(build, "free_memory", lambda device: train.images.nbytes)
        done = dltrain("train", "c.yaml", "--out", "streamed")
    assert done.code == 0
    assert sorted({*cut}) == [*range(10)]
    assert "images: streamed (mapped from a file, 0 MB, more than half of 0 MB free)" in done.err + done.out
    # it stops, and goes on elsewhere
    first = ("--set", "train.epochs=1", "--set", "data.resident=false")
    assert dltrain("train", "c.yaml", "--out", "other", "-q", *first).code == 0
    asked = json.loads(Path("other/environment.json").read_text())["images"]
    more = ("--set", "train.epochs=2", "--set", "data.resident=true")
    assert dltrain("train", "--resume", "other", "-q", *more).code == 0
    where = [json.loads(Path(name, "environment.json").read_text())["images"] for name in ("resident", "other")]
    assert asked == "streamed (asked for)"
    assert where[0].startswith("resident (mapped from a file, 0 MB, at most half of ")
    assert where[1] == "resident (asked for)"
    expected = weights("resident")
    for name in ("streamed", "other"):
        found = weights(name)
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_where_images_live_is_auto_true_or_false(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    for wrong in ("yes", "1", "cpu", "null"):
        done = dltrain("config", "check", "c.yaml", "--set", f"data.resident={wrong}")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "data.resident" in done.err
