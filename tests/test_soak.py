"""Load: what holds for a small run holds for a long one, a large one and many at once.

`pytest -m soak -s` prints the figures that docs/reliability.md has.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from conftest import Run as Command
from data_files import idx, write_cifar10, write_file, write_mnist, write_svhn, write_usps

from dltrain import checkpoint, cli, config, rundir, shipped, trained
from dltrain.data.cifar import cifar10
from dltrain.data.files import Files
from dltrain.data.mnist import mnist
from dltrain.data.npz import npz
from dltrain.data.svhn import svhn
from dltrain.data.usps import usps
from dltrain.errors import CheckpointError, ConfigError, DataError

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="counts handles and limits memory as Linux does"),
]

MINUTE = 60.0  # seconds
MB = 1 << 20

SMALL = """
data: {name: digits, limit: 64, val: 0}
model: {name: mlp, hidden: [16]}
optim: {name: adam, lr: 1e-3}
schedule: {name: constant}
descent: {batch_size: 64}
train: {epochs: %d, checkpoint_every_steps: 1}
tensorboard: {filters: false}
"""


def start(*arguments: object, cwd: Path, **settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-m", "dltrain", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_two_thousand_epochs_with_a_save_each_stay_level(tmp_path: Path) -> None:
    """Memory, open files and threads of the second half are those of the quarter before it."""
    (tmp_path / "small.yaml").write_text(SMALL % 2000)
    began = time.monotonic()
    process = start("train", "small.yaml", "--out", "run", "-q", cwd=tmp_path)
    watched = psutil.Process(process.pid)
    samples = []  # (epoch, bytes in memory, open files, threads)
    while process.poll() is None:
        metrics = tmp_path / "run/metrics.jsonl"
        epoch = max((line["step"] for line in rundir.records(tmp_path / "run")), default=0) if metrics.exists() else 0
        try:
            with watched.oneshot():
                samples.append((epoch, watched.memory_info().rss, watched.num_fds(), watched.num_threads()))
        except psutil.Error:
            break
        assert time.monotonic() - began < 3 * MINUTE
        time.sleep(0.2)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 2000
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step-000001999.safetensors", "step-000002000.safetensors"]
    quarter = [each for each in samples if 500 <= each[0] < 1000]
    half = [each for each in samples if 1000 <= each[0] < 1990]  # the pictures of the end take some memory
    assert min(len(quarter), len(half)) >= 10
    memory, later = (statistics.median(each[1] for each in part) for part in (quarter, half))
    files, threads = ([max(each[at] for each in part) for part in (quarter, half)] for at in (2, 3))
    print(
        f"\n2000 epochs in {time.monotonic() - began:.0f} s: {memory / MB:.1f} MB, then {later / MB:.1f} MB; "
        f"{files} files; {threads} threads"
    )
    assert later < memory + 8 * MB
    assert files[1] <= files[0]
    assert threads[1] <= threads[0]


def test_every_eval_beside_a_run_that_saves_each_step_reads_a_whole_checkpoint(
    dltrain: Command, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL % 1_000_000)
    process = start("train", "small.yaml", "--out", "run", "-q", cwd=tmp_path)
    try:
        while not rundir.steps(tmp_path / "run"):
            assert process.poll() is None
            time.sleep(0.05)
        found = []
        began = time.monotonic()
        while time.monotonic() - began < MINUTE:
            done = dltrain("eval", "run", "--json")
            assert (done.code, done.err) == (0, "")
            found.append(json.loads(done.out)["step"])
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert found == sorted(found)
    assert len(set(found)) > 20  # the run went on meanwhile
    print(f"\n{len(found)} evaluations, none failed, while a run saved {found[-1] - found[0]} checkpoints")


def test_eight_runs_start_together_on_one_data_folder(tmp_path: Path) -> None:
    """In one second, without --out: each has a folder of its own, and all have the same weights."""
    write_mnist(tmp_path / "data", 600, 100, gz=True)
    data = "data: {name: mnist, verify: false, val: 100}\n"
    text = f"{data}model: perceptron\noptim: {{name: sgd, lr: 0.1}}\ntrain: {{epochs: 2}}\n"
    (tmp_path / "small.yaml").write_text(text)
    began = time.monotonic()
    data = str(tmp_path / "data")
    processes = [start("train", "small.yaml", "-q", cwd=tmp_path, DLTRAIN_DATA=data) for _ in range(8)]
    ended = [(process.communicate(timeout=3 * MINUTE)[1], process.returncode) for process in processes]
    assert ended == [("", 0)] * 8
    runs = list((tmp_path / "runs/small").iterdir())
    assert len(runs) == 8
    first, *others = [checkpoint.read(rundir.steps(run)[0])[0] for run in runs]
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []
    assert len(json.loads((tmp_path / "data/.dltrain-verified.json").read_text())) >= 1
    assert not list((tmp_path / "data").glob("*.json.*"))
    print(f"\neight runs in {time.monotonic() - began:.0f} s, {len(runs)} folders, the same weights")


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with a million images of noise in MNIST's format: 784 MB."""
    root = tmp_path_factory.mktemp("million")
    write_mnist(root, 1, 1000)
    folder = root / "MNIST/raw"
    block = np.random.default_rng(0).integers(0, 256, 784 * 10_000, dtype=np.uint8).tobytes()
    with (folder / "train-images-idx3-ubyte").open("wb") as file:
        file.write(struct.pack(">4I", 0x0803, 1_000_000, 28, 28))
        for _ in range(100):
            file.write(block)
    write_file(folder / "train-labels-idx1-ubyte", idx(np.arange(1_000_000) % 10))
    yield root
    (folder / "train-images-idx3-ubyte").unlink()


LIMITED = """
import resource, sys
import psutil, torch
limit = psutil.Process().memory_info().data + int(sys.argv[1])  # what torch has taken by now, and so much more
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # not RLIMIT_AS: its libraries alone map gigabytes
from dltrain import cli
code = cli.run(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
sys.exit(code)
"""


@pytest.mark.parametrize(("limit", "code"), [(1280, 0), (512, 3)])
def test_a_million_images_take_memory_for_themselves_or_are_refused(
    million: Path, tmp_path: Path, limit: int, code: int
) -> None:
    data = "data: {name: mnist, verify: false}\n"
    text = f"{data}model: perceptron\noptim: {{name: sgd, lr: 0.1}}\ndescent: {{batch_size: 1000}}\n"
    (tmp_path / "small.yaml").write_text(f"{text}train: {{epochs: 1}}\n")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit * MB), "train", "small.yaml", "--out", "run", "-q"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DLTRAIN_DATA": str(million)},
        capture_output=True,
        text=True,
        timeout=3 * MINUTE,
    )
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == bool(code)
    assert "Traceback" not in done.stderr
    took = f"{time.monotonic() - began:.0f} s, {done.stdout.splitlines()[-1]} MB resident at most"
    print(f"\na million images, {limit} MB of data at most: exit {code}; {took}")


class Parser(NamedTuple):
    """Something that reads files from strangers, and the one error that it may raise.

    write: puts good files of these names under a folder; read: reads them there, after one of them was changed
    unpack, pack: from a file to what is changed in it half of the time, and back, past what would refuse any change
    """

    error: type[Exception]
    files: str
    write: Callable[[Path], object]
    read: Callable[[Path, Path], object]
    unpack: Callable[[bytes], bytes] = bytes
    pack: Callable[[bytes], bytes] = bytes


def terms(root: Path) -> Files:
    return Files(root, verify=False, download=False)


def write_configs(root: Path) -> None:
    for name in shipped.names():
        (root / f"{name}.yaml").write_bytes(shipped.find(name).read_bytes())


def write_checkpoints(root: Path) -> None:
    (root / "small.yaml").write_text(SMALL % 2)
    assert cli.run(["train", str(root / "small.yaml"), "--out", str(root / "run"), "-q"]) == 0


def write_npz(root: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {"x": draw.integers(0, 256, (4, 3, 5, 5), np.uint8), "y": np.arange(4) % 2}
    np.savez(root / "stored.npz", **arrays)
    np.savez_compressed(root / "packed.npz", **arrays)


def unsigned(content: bytes) -> bytes:
    return re.sub(rb"[0-9a-f]{64}", b"0" * 64, content, count=1)


def signed(content: bytes) -> bytes:
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


PARSERS = {
    "YAML": Parser(ConfigError, "*.yaml", write_configs, lambda root, path: config.load(path, [])),
    "IDX": Parser(DataError, "*ubyte", lambda root: write_mnist(root, 3, 2), lambda root, path: mnist(terms(root))),
    "gzipped IDX": Parser(
        DataError,
        "*ubyte.gz",
        lambda root: write_mnist(root, 3, 2, gz=True),
        lambda root, path: mnist(terms(root)),
        gzip.decompress,
        gzip.compress,
    ),
    "CIFAR": Parser(
        DataError, "*batch*", lambda root: write_cifar10(root, 5, 1), lambda root, path: cifar10(terms(root))
    ),
    "SVHN": Parser(DataError, "*.mat", lambda root: write_svhn(root, 2, 1), lambda root, path: svhn(terms(root))),
    "USPS": Parser(
        DataError,
        "*.bz2",
        lambda root: write_usps(root, 2, 1),
        lambda root, path: usps(terms(root)),
        bz2.decompress,
        bz2.compress,
    ),
    "npz": Parser(
        DataError, "*.npz", write_npz, lambda root, path: npz(terms(root), path=path.name, test=1, layout="nchw")
    ),
    "checkpoint": Parser(
        CheckpointError,
        "*.safetensors",
        write_checkpoints,
        lambda root, path: trained.load(path, "cpu", print),
        unsigned,
        signed,
    ),
}
NUMBERS = [struct.pack(form, number) for form in "<>" for form in (f"{form}I", f"{form}Q") for number in (0, 1, 2**31)]
PIECES = [
    *NUMBERS,
    *(bytes([byte]) for byte in range(256)),
    *(b"\xff" * count for count in (2, 4, 8)),
    *(b"{", b"}", b"[", b"]", b": ", b"- ", b"\n", b"&a ", b"*a ", b"!!python/object ", b"<<: ", b"'", b'"', b"#"),
    *(b"-1", b"1e999", b".nan", b"null", b"true", b"9" * 30, "\N{SNOWMAN}".encode(), b"\xed\xa0\x80"),
]


def changed(content: bytes, draw: random.Random) -> bytes:
    """With one to four pieces put in, taken out, written over or said twice; often near an end, where headers are."""
    for _ in range(draw.randint(1, 4)):
        near = min(len(content), 200)
        at = draw.choice([draw.randint(0, near), len(content) - draw.randint(0, near), draw.randint(0, len(content))])
        piece, length = draw.choice(PIECES), draw.choice([1, 4, 8, draw.randint(0, 1 + len(content) // 4)])
        content = draw.choice(
            [
                content[:at] + piece + content[at:],
                content[:at] + piece + content[at + len(piece) :],
                content[:at] + content[at + length :],
                content[:at] + content[at : at + length] + content[at:],
                content[:at],
            ]
        )
    return content


@pytest.mark.parametrize("name", PARSERS)
def test_a_minute_of_changed_files_raises_only_what_is_documented(name: str, tmp_path: Path) -> None:
    parser = PARSERS[name]
    parser.write(tmp_path)
    good = {path: path.read_bytes() for path in sorted(tmp_path.rglob(parser.files)) if path.is_file()}
    for path in good:
        parser.read(tmp_path, path)
    draw = random.Random(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = refused = 0
    slowest = 0.0
    ends = time.monotonic() + MINUTE
    while (began := time.monotonic()) < ends:
        path = draw.choice(list(good))
        packed = draw.random() < 0.5
        content = parser.pack(changed(parser.unpack(good[path]), draw)) if packed else changed(good[path], draw)
        path.write_bytes(content)
        began = time.monotonic()
        try:
            parser.read(tmp_path, path)
            read += 1
        except parser.error as error:
            assert str(error).isprintable() or parser.error is ConfigError  # noqa: PT017  one line; configs have many
            refused += 1
        except Exception:
            (tmp_path / "culprit").write_bytes(content)
            print(f"\n{path.name}: {tmp_path / 'culprit'}")
            raise
        slowest = max(slowest, time.monotonic() - began)
        path.write_bytes(good[path])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{name}: {refused} refused, {read} read, the slowest in {slowest:.2f} s, {grown:.0f} MB more memory")
    assert refused > 100
    assert read
    assert slowest < 5
    assert grown < 512
