"""Checkpoints: one safetensors file that says what it is, whose every byte is covered by a digest.

The metadata is one JSON text under the key `dltrain`.  Its first member, `sha256`, is the SHA-256 of the whole file
with these 64 digits replaced by zeros.  docs/checkpoint.md describes the rest.  Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dltrain.errors import CheckpointError, OtherFormatError

FORMAT = 4
MAX_HEADER = 32 * 1024 * 1024  # bytes; safetensors itself stops at 100 MB

_ZEROS = b"0" * 64
_DIGEST = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')


def encode(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> bytes:
    """A checkpoint's bytes; a function of its arguments alone."""
    text = json.dumps({"sha256": _ZEROS.decode(), "format": FORMAT, **meta}, separators=(",", ":"))
    raw = safetensors.torch.save(_apart(tensors), {"dltrain": text})
    found = _DIGEST.search(raw)
    assert found is not None
    start, end = found.span(1)
    digest = hashlib.sha256(raw).hexdigest().encode()
    return b"".join([memoryview(raw)[:start], digest, memoryview(raw)[end:]])


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous and each with memory of its own, as safetensors wants them."""
    apart: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        where = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if where in memory else tensor
        memory.add(where)
    return apart


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads and verifies a checkpoint: tensors on the CPU, and its metadata.

    Raises CheckpointError where it is missing, broken, of another kind or of a newer format.
    """
    try:
        if not path.is_file() and path.exists():  # a named pipe would be waited for
            raise CheckpointError(f"{path}: not a file; expected a checkpoint file")
        with path.open("rb") as file:
            head = file.read(8)
            size = path.stat().st_size
            _check_sizes(path, head, size)
            header = file.read(struct.unpack("<Q", head)[0])
            meta, stated = _metadata(path, header)
            if stated != size:
                raise CheckpointError(f"{path}: {size} bytes, its header states {stated}: cut off or damaged")
            raw = head + header + file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected a checkpoint file") from None
    found = _DIGEST.search(header)
    if found is None:
        raise CheckpointError(f"{path}: holds no digest, so it cannot be verified; not written by dltrain")
    start = 8 + found.start(1)
    hasher = hashlib.sha256(raw[:start])
    hasher.update(_ZEROS)
    hasher.update(memoryview(raw)[start + 64 :])
    if hasher.hexdigest().encode() != found[1]:
        raise CheckpointError(f"{path}: its bytes differ from their digest: damaged or changed; use another checkpoint")
    if meta["format"] != FORMAT:  # asked once the digest holds: else a flipped bit would look like another format
        text = f"format {meta['format']}; this dltrain reads format {FORMAT}: use the dltrain that wrote it"
        raise OtherFormatError(f"{path}: {text}")
    try:
        return safetensors.torch.load(raw), meta
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors: {str(error).splitlines()[0]}") from None


def _check_sizes(path: Path, head: bytes, size: int) -> None:
    """Before anything is read by a length that the file states."""
    if len(head) < 8:
        raise CheckpointError(f"{path}: {size} bytes; empty or cut off")
    (length,) = struct.unpack("<Q", head)
    if length > min(MAX_HEADER, size - 8):
        kind = (
            "a pickle or another format" if head[:1] == b"\x80" or head[:2] == b"PK" else "damaged, or another format"
        )
        raise CheckpointError(f"{path}: not a dltrain checkpoint ({kind}); such files are never loaded")


def _metadata(path: Path, header: bytes) -> tuple[dict[str, Any], int]:
    """What `dltrain` says of the file, and the size of the file that the header describes, in bytes."""
    try:
        tensors = json.loads(header)
        meta = json.loads(tensors.pop("__metadata__")["dltrain"])
        version = int(meta["format"])
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{path}: not a dltrain checkpoint: its header has no `dltrain` metadata") from None
    return {**meta, "format": version}, 8 + len(header) + end


def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], assign: bool = False) -> None:
    """Puts parameters and buffers into a model, as load_state_dict does.

    Some modules (torchvision's MNASNet) take weights without their version for those of an older one.
    """
    state = model.state_dict()
    metadata = getattr(state, "_metadata", None)
    state.update(tensors)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, assign=assign)


def check_fit(path: Path, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError where the tensors are not the model's, naming at most five differences."""
    wanted, found = (
        {name: f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") for name, tensor in each.items()}
        for each in (model.state_dict(), tensors)
    )
    wrong = [
        f"{name}: expected {wanted.get(name, 'none')}, found {found.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path}: holds another model's weights: {'; '.join(wrong[:5])}{more}")
