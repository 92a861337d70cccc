"""Where the training images live: on the device, or elsewhere and cut and brought there ahead of their step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from dltrain.errors import ConfigError
from dltrain.lazy import torch

SHARE = 0.5  # of free memory, for images: what a step takes besides is known only once the first is done
AHEAD = 3  # micro-batches: one that is cut, one that is copied, one that is there

Asked = Literal["auto"] | bool
Item = TypeVar("Item")


def where_images_live(
    size: int, device: str, free: int, mapped: bool, asked: Asked = "auto"
) -> tuple[Literal["resident", "streamed"], str]:
    """Whether the training images are `resident` on the device or `streamed` to it, and why.

    What is in a CPU's memory stays there.  Else images are resident where they take at most half of what is free; the
    rest is for weights, gradients, the optimizer's state and activations.

    size: of the images, in bytes; device: its type; free: bytes of its memory
    mapped: the images are mapped from a file, and read as they are used
    asked: `data.resident`

    Raises ConfigError where images are to be resident and a device other than the CPU has no room for them.
    """
    if asked is True and device != "cpu" and size > free:
        found = f"{_megabytes(size)} of images, and {_megabytes(free)} free on the {device} device"
        raise ConfigError(f"data.resident: true: {found}; set it to auto")
    if asked != "auto":
        return "resident" if asked else "streamed", "asked for"
    if device == "cpu" and not mapped:
        return "resident", "in memory"
    kind = "mapped from a file, " if mapped else ""
    if size <= SHARE * free:
        return "resident", f"{kind}{_megabytes(size)}, at most half of {_megabytes(free)} free"
    return "streamed", f"{kind}{_megabytes(size)}, more than half of {_megabytes(free)} free"


def free_memory(device: torch.device) -> int:
    """Bytes of the device's memory that nothing uses; of a CPU, also what the system would give up for others."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import psutil

    return int(psutil.virtual_memory().available)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


class Stream:
    """Images that stay on the host; a thread cuts each micro-batch and copies it to the device ahead of its step.

    It goes on from one to the next until the epoch ends; asked for any other, it begins anew there.
    """

    def __init__(self, images: torch.Tensor, step_size: int, micro_size: int, device: torch.device) -> None:
        """images: uint8 `[N, C, H, W]` on the CPU"""
        self.images = images.contiguous()  # NumPy would copy all of others at each cut
        self.step_size = step_size
        self.micro_size = micro_size
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Ahead[_Cut] | None = None
        self._next = (-1, 0)  # epoch and place of what the thread gives next

    def cut(self, epoch: int, order: torch.Tensor, place: int) -> torch.Tensor:
        """The micro-batch that begins at a place in the epoch's order: uint8 `[B, C, H, W]` on the device.

        order: int64 `[N]` on the CPU

        Raises what the thread raised.
        """
        ahead = self._from(epoch, order, place)
        self._next = (-1, 0)  # where the thread fails, the next call begins anew
        images = _arrived(*next(ahead), self.device)
        self._next = (epoch, place + len(images))
        return images

    def _from(self, epoch: int, order: torch.Tensor, place: int) -> Ahead[_Cut]:
        if self._ahead and self._next == (epoch, place):
            return self._ahead
        parts = _parts(order, place, self.step_size, self.micro_size)
        images, device, copies = self.images.numpy(), self.device, self.copies
        self._ahead = Ahead((_cut(images, part, device, copies) for part in parts), AHEAD)
        return self._ahead


def _parts(order: torch.Tensor, place: int, step_size: int, micro_size: int) -> Iterator[torch.Tensor]:
    """The images int64 `[B]` of each micro-batch from a place in the epoch's order on."""
    while place < len(order):
        end = min(place + micro_size, (place // step_size + 1) * step_size)
        yield order[place:end]
        place = end


_Cut: TypeAlias = "tuple[torch.Tensor, torch.cuda.Event | None]"  # and what has happened once it is on the device


def _cut(images: Any, index: torch.Tensor, device: torch.device, copies: torch.cuda.Stream | None) -> _Cut:
    """The images of a micro-batch, on their way to the device.

    NumPy cuts in this thread alone, and without Python's lock.  Nothing here may be an operation that torch shares out
    among threads: it would make a second set of them, and OpenMP, once there are more of its threads than cores, lets
    them sleep between operations (a MNIST batch on two cores then takes 270 us instead of 33).
    """
    host = torch.empty((len(index), *images.shape[1:]), dtype=torch.uint8, pin_memory=copies is not None)
    images.take(index.numpy(), axis=0, out=host.numpy(), mode="clip")  # the other modes write to a buffer first
    if copies is None:
        return host, None
    with torch.cuda.stream(copies):
        # torch keeps the pinned memory until the copy is done
        return host.to(device, non_blocking=True), copies.record_event()


def _arrived(images: torch.Tensor, copied: torch.cuda.Event | None, device: torch.device) -> torch.Tensor:
    """The images on the device, where what is computed next sees them whole."""
    if copied is None:
        return images.to(device)
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)  # the device waits, not this thread
    images.record_stream(computing)  # their memory is the next copy's only when what is computed of them is done
    return images


class Ahead(Generic[Item]):
    """What an iterator yields, made in a thread ahead of who takes it.

    What the iterator raises, StopIteration among it, is raised at its turn; nothing is to be taken after it.  The
    thread ends then, and when this object is dropped or the program ends; so the iterator must not refer to it.
    """

    def __init__(self, items: Iterator[Item], ahead: int) -> None:
        """ahead: the most items that are made, or being made, and not taken"""
        self._made: SimpleQueue[Item | _Raised] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(ahead):
            self._room.put(None)
        closed = Event()
        make = (items, self._made, self._room, closed)
        thread = Thread(target=_make, args=make, name="dltrain images", daemon=True)
        weakref.finalize(self, _end, thread, self._room, closed)
        thread.start()

    def __next__(self) -> Item:
        item = self._made.get()
        if isinstance(item, _Raised):
            raise item.error
        self._room.put(None)
        return item


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _make(items: Iterator[Item], made: SimpleQueue[Item | _Raised], room: SimpleQueue[None], closed: Event) -> None:
    try:
        while True:
            room.get()
            if closed.is_set():
                return
            made.put(next(items))
    except BaseException as error:  # whatever it is, who waits must not wait for ever
        made.put(_Raised(error))


def _end(thread: Thread, room: SimpleQueue[None], closed: Event) -> None:
    closed.set()
    room.put(None)
    if thread is not current_thread():  # the garbage collector may run in any
        thread.join()
