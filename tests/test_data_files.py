from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest
from data_files import write_cifar10, write_mnist

from dltrain.data import files as files_module
from dltrain.data.cifar import cifar10
from dltrain.data.download import File
from dltrain.data.files import REMEMBERED, Files, Layout, Presence, Published, State, data_root, state
from dltrain.data.mnist import mnist
from dltrain.errors import DataError
from dltrain.registry import find

CONTENT = b"sixteen bytes or more of a file\n" * 4
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ONE_FILE = Published("One file", 1, 1, (Layout("folder", (File("file", len(CONTENT), DIGEST),)),))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def hashed(monkeypatch):
    """The contents that were hashed, in turn."""
    contents = []

    class Hashlib:
        @staticmethod
        def sha256(content):
            contents.append(bytes(content))
            return hashlib.sha256(content)

    monkeypatch.setattr(files_module, "hashlib", Hashlib)
    return contents


def read(root, **changes):
    source = Files(root, **{"download": False} | changes).open(ONE_FILE)
    return source, source.read("file")


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("/given", "/environment", "/given"),
        (None, "/environment", "/environment"),
        (None, "~/environment", "/home/someone/environment"),
        ("~/given", None, "/home/someone/given"),
        (None, "", "/home/someone/cache/dltrain/data"),
        (None, None, "/home/someone/cache/dltrain/data"),
    ],
)
def test_the_root_is_given_or_in_the_environment_or_in_the_cache(monkeypatch, given, environment, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("/home/someone/cache") / name)
    monkeypatch.delenv("DLTRAIN_DATA", raising=False)
    if environment is not None:
        monkeypatch.setenv("DLTRAIN_DATA", environment)
    assert data_root(given) == Path(expected)


def test_a_published_file_is_read_and_verified(tmp_path, path):
    source, content = read(tmp_path)
    assert content == CONTENT
    assert source.verified
    assert source.sha256 == {"folder/file": f"sha256:{DIGEST}"}


def test_a_gzipped_file_counts_as_what_it_holds(tmp_path, path):
    path.with_name("file.gz").write_bytes(gzip.compress(CONTENT, 1))
    path.unlink()
    source, content = read(tmp_path)
    assert content == CONTENT
    assert source.verified
    assert source.sha256 == {"folder/file": f"sha256:{DIGEST}"}


def test_the_uncompressed_file_is_preferred(tmp_path, path):
    path.with_name("file.gz").write_bytes(b"not even gzip")
    assert read(tmp_path)[1] == CONTENT


def test_a_wrong_checksum_is_an_error_that_names_both(tmp_path, path):
    path.write_bytes(CONTENT[::-1])
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    for part in (str(path), DIGEST, found, "data.verify: false accepts another copy"):
        assert part in str(caught.value)


def test_another_copy_is_accepted_on_request_and_noted_once(tmp_path, path):
    path.write_bytes(b"another copy")
    notes = []
    source, content = read(tmp_path, verify=False, report=notes.append)
    assert content == b"another copy"
    source.read("file")
    assert not source.verified
    assert source.sha256 == {"folder/file": f"sha256:{hashlib.sha256(content).hexdigest()}"}
    assert len(notes) == 1
    assert "not the published file" in notes[0]


def test_the_published_file_is_verified_also_where_it_need_not_be(tmp_path, path):
    notes = []
    assert read(tmp_path, verify=False, report=notes.append)[0].verified
    assert notes == []


@pytest.mark.parametrize("gz", [False, True])
def test_an_unchanged_file_is_hashed_once(tmp_path, path, hashed, gz):
    if gz:
        path.with_name("file.gz").write_bytes(gzip.compress(CONTENT))
        path.unlink()
    first, again = read(tmp_path)[0], read(tmp_path)[0]
    assert hashed == [CONTENT]
    assert first.sha256 == again.sha256
    assert again.verified
    read(tmp_path, recheck=True)
    assert hashed == [CONTENT, CONTENT]


def test_another_copy_is_hashed_once_and_refused_later(tmp_path, path, hashed):
    path.write_bytes(CONTENT[::-1])
    read(tmp_path, verify=False)
    source = read(tmp_path, verify=False)[0]
    assert hashed == [CONTENT[::-1]]
    assert not source.verified
    with pytest.raises(DataError, match="not the published file"):
        read(tmp_path)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_hashed_again(tmp_path, path, change):
    read(tmp_path)
    before = path.stat()
    path.write_bytes(CONTENT[:-1] if change == "size" else CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    with pytest.raises(DataError, match="not the published file"):
        read(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, path, monkeypatch):
    read(tmp_path)
    remembered = (tmp_path / REMEMBERED).read_bytes()
    real, calls = os.fstat, []

    def changing(descriptor):
        calls.append(descriptor)
        os.utime(path, ns=(0, len(calls)))
        return real(descriptor)

    monkeypatch.setattr(files_module.os, "fstat", changing)
    read(tmp_path)
    assert len(calls) == 2
    assert (tmp_path / REMEMBERED).read_bytes() == remembered


@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", "null", "[" * 100_000, '{"folder/file": 3}', '{"folder/file": {"size": {}}}', "\xff"],
)
def test_a_broken_memory_is_ignored_and_written_anew(tmp_path, path, hashed, broken):
    (tmp_path / REMEMBERED).write_bytes(broken.encode("latin-1"))
    for _ in range(2):
        assert read(tmp_path)[0].verified
    assert hashed == [CONTENT]
    assert [path.name for path in tmp_path.glob(REMEMBERED + "*")] == [REMEMBERED]


@pytest.mark.parametrize(
    ("digest", "verify"), [(None, True), ("0" * 64, True), (None, False), ("", False), ("0" * 63, False)]
)
def test_a_remembered_digest_that_is_wrong_refuses_nothing(tmp_path, path, digest, verify):
    read(tmp_path)
    memory = json.loads((tmp_path / REMEMBERED).read_text())
    memory["folder/file"]["sha256"] = digest
    (tmp_path / REMEMBERED).write_text(json.dumps(memory))
    assert read(tmp_path, verify=verify)[0].sha256 == {"folder/file": f"sha256:{DIGEST}"}


def test_what_other_data_sets_remember_is_kept(tmp_path, path):
    write_mnist(tmp_path)
    mnist(Files(tmp_path, verify=False))
    read(tmp_path)
    assert set(json.loads((tmp_path / REMEMBERED).read_text())) == {
        "folder/file",
        *(f"MNIST/raw/{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
    }


def test_a_root_that_cannot_be_written_is_read_all_the_same(tmp_path, path, hashed):
    (tmp_path / REMEMBERED).mkdir()
    for _ in range(2):
        assert read(tmp_path)[0].verified
    assert hashed == [CONTENT, CONTENT]
    assert [path.name for path in tmp_path.glob(REMEMBERED + "*")] == [REMEMBERED]


def bomb(size):
    """Gzip of `size` zeros behind the file's first bytes."""
    return gzip.compress(CONTENT + bytes(size), 1)


@pytest.mark.parametrize(
    ("changes", "size", "limit"),
    [
        ({}, None, len(CONTENT)),
        ({}, 20, 20),
        ({}, 10**9, len(CONTENT)),
        ({"verify": False}, 20, 20),
        ({"verify": False}, None, 10_000),
        ({"verify": False}, 10**9, 10_000),
    ],
)
def test_no_more_than_expected_is_inflated(tmp_path, path, monkeypatch, changes, size, limit):
    monkeypatch.setattr(files_module, "LARGEST", 10_000)
    path.unlink()
    path.with_name("file.gz").write_bytes(bomb(2**22))
    inflated = []

    class Counting(gzip.GzipFile):
        def read(self, size=-1):
            content = super().read(size)
            inflated.append(len(content))
            return content

    monkeypatch.setattr(files_module.gzip, "GzipFile", Counting)
    source = Files(tmp_path, download=False, **changes).open(ONE_FILE)
    with pytest.raises(DataError, match=f"file.gz: expected at most {limit} bytes uncompressed, found more"):
        source.read("file", None if size is None else lambda header: size)
    assert sum(inflated) == limit + 1


def test_a_file_too_large_to_be_one_is_not_read(tmp_path, path):
    with path.open("wb") as out:
        out.truncate(2**40)  # a hole: takes no space
    with pytest.raises(DataError, match=f"expected at most {2**30} bytes, found {2**40}"):
        read(tmp_path)


def test_a_file_larger_than_memory_is_an_error(tmp_path, path):
    with path.open("wb") as out:
        out.truncate(2**43)
    with pytest.raises(DataError, match=f"file: {2**43} bytes do not fit in memory"):
        Files(tmp_path).open(ONE_FILE).read("file", lambda header: 2**43)


def test_a_file_without_a_published_checksum_is_hashed_once(tmp_path, path, hashed):
    unpublished = Published("One file", 1, 1, (Layout("folder", (File("file", len(CONTENT)),)),))
    notes = []
    for _ in range(2):
        source = Files(tmp_path, report=notes.append).open(unpublished)
        source.read("file")
        assert not source.verified
    assert hashed == [CONTENT]
    assert notes == 2 * [f"One file: {path}: has no published checksum: its structure is checked, not its contents"]


@pytest.mark.parametrize("kind", ["absent", "a folder", "a pipe"])
def test_what_is_no_file_is_missing(tmp_path, path, kind):
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    if kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(DataError, match="One file: file not found"):
        read(tmp_path)


def test_missing_files_are_named_with_the_way_out(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        mnist(Files(tmp_path, download=False))
    message = str(caught.value)
    assert message.startswith(f"MNIST: t10k-labels-idx1-ubyte not found in {tmp_path}/MNIST/raw: ")
    for part in ("data.root", "$DLTRAIN_DATA", "configs/digits_mlp.yaml", "configs/digits_cnn.yaml"):
        assert part in message
    with pytest.raises(DataError, match=f"or cifar-10-python.tar.gz in {tmp_path},"):
        cifar10(Files(tmp_path, download=False))


def test_presence_is_told_from_names_alone(tmp_path):
    def presence(name):
        return state(find(name, "data"), tmp_path)

    import dltrain.data.digits  # noqa: F401  # registers it

    raw, pickled, binary = (tmp_path / name for name in ("MNIST/raw", "cifar-10-batches-py", "cifar-10-batches-bin"))
    assert presence("digits") == Presence(State.EMBEDDED, None)
    assert presence("mnist") == Presence(State.ABSENT, raw)
    assert presence("cifar10") == Presence(State.ABSENT, pickled)
    write_mnist(tmp_path, gz=True)
    assert presence("mnist") == Presence(State.PRESENT, raw)
    for path in raw.iterdir():
        path.write_bytes(b"")
    assert presence("mnist") == Presence(State.PRESENT, raw)
    path.unlink()
    assert presence("mnist") == Presence(State.INCOMPLETE, raw)
    write_cifar10(tmp_path, layout="binary")
    assert presence("cifar10") == Presence(State.PRESENT, binary)
    (binary / "test_batch.bin").unlink()
    assert presence("cifar10") == Presence(State.INCOMPLETE, binary)


IN_ROOT = Published("One file", 1, 1, (Layout("", (File("file", len(CONTENT), DIGEST),)),))


@pytest.fixture
def opening(tmp_path, monkeypatch):
    """Opens the file in the root and reads it; `opening.hashed` has how often it was hashed."""
    (tmp_path / "file").write_bytes(CONTENT)
    hashed = []
    monkeypatch.setattr(files_module, "_hash", lambda opened, real=files_module._hash: hashed.append(1) or real(opened))

    def opens(**changes):
        source = Files(tmp_path, **{"download": False} | changes).open(IN_ROOT)
        with source.opened("file") as opened:
            return source, opened.read()

    opens.hashed = hashed
    return opens


def test_an_opened_file_is_verified_first(tmp_path, opening):
    source, content = opening()
    assert content == CONTENT
    assert source.verified
    assert source.sha256 == {"file": f"sha256:{DIGEST}"}
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=f"{tmp_path}/file: not the published file: expected SHA-256 {DIGEST}"):
        opening()
    source, content = opening(verify=False)
    assert content == CONTENT[:-1]
    assert not source.verified


def test_an_opened_file_is_hashed_once_while_it_does_not_change(tmp_path, opening):
    opening()
    opening()
    assert len(opening.hashed) == 1
    source, _ = opening(recheck=True)
    with source.opened("file") as opened:
        assert opened.read() == CONTENT
    assert len(opening.hashed) == 2  # once for one source


@pytest.mark.parametrize("error", [EOFError("ended"), gzip.BadGzipFile("ended"), zlib.error("ended")])
def test_what_goes_wrong_in_an_open_file_is_a_data_error(tmp_path, opening, error):
    source, _ = opening()
    with pytest.raises(DataError, match=f"{tmp_path}/file: cannot be read: ended"), source.opened("file"):
        raise error
    with pytest.raises(DataError, match=f"{tmp_path}/file: {len(CONTENT)} bytes do not fit in memory"):  # noqa: SIM117
        with source.opened("file"):
            raise MemoryError


def test_a_file_of_the_users_own_is_hashed_once(tmp_path, opening):
    for root, name in (
        (tmp_path, "file"),
        (tmp_path, str(tmp_path / "file")),
        (tmp_path / "absent", str(tmp_path / "file")),
    ):
        for _ in range(2):
            with Files(root).own(name) as (opened, sha256):
                assert opened.read() == CONTENT
                assert sha256 == f"sha256:{DIGEST}"
    assert len(opening.hashed) == 1 + 1 + 2  # what is under no root is not remembered
    with Files(tmp_path, recheck=True).own("file"):
        assert len(opening.hashed) == 5


def test_data_of_the_users_own_has_no_folder(tmp_path):
    import dltrain.data.npz  # noqa: F401  # registers it

    assert state(find("npz", "data"), tmp_path) == Presence(State.OWN, None)
