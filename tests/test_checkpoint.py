"""Checkpoints: what is written is read back, whatever is damaged or hostile is refused, and a run goes on from one."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from dltrain import checkpoint, rundir, trained
from dltrain import config as configs
from dltrain.build import build, build_model
from dltrain.errors import CheckpointError
from dltrain.evaluate import evaluate
from dltrain.groups import Optimizers
from dltrain.runs import new_run
from dltrain.state import Best, Run, _laid_out_as
from dltrain.yamlfile import Document

PAGE = (Path(__file__).parent.parent / "docs" / "checkpoint.md").read_text(encoding="utf-8")


def config(**changes: Any) -> configs.Config:
    """A network with whatever has a state: batch norm, dropout, augmentation, a channels_last layout."""
    layers = [
        {"conv": {"out": 4, "padding": "same"}},
        "batchnorm",
        "relu",
        {"maxpool": 2},
        {"conv": {"out": 6, "padding": "same"}},
        {"dropout": 0.3},
        "flatten",
        {"linear": "classes"},
    ]
    plain = {
        "name": "small",
        "data": {"name": "digits", "limit": 100, "val": 36, "augment": [{"translate": 1}]},
        "model": {"name": "cnn", "layers": layers},
        "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "descent": {"batch_size": 16},
        "train": {"device": "cpu", "precision": "fp32"},
    }
    return configs.check(Document("small.yaml", copy.deepcopy({**plain, **changes})))


def started(settings: configs.Config) -> Run:
    return new_run(build(settings, print))


def train(run: Run, steps: int) -> Run:
    """The loop without its log and its saves."""
    setup, at = run.setup, run.progress
    batches = setup.batches()
    setup.model.train()
    for _ in range(steps):
        ((images, labels, _),) = batches.step(at.epoch, at.step)
        setup.model.zero_grad()
        loss = setup.loss(setup.model(images), labels)
        loss.backward()
        setup.optimizers.step(loss, lambda loss=loss: loss)
        run.sums += torch.stack([loss.detach() * len(labels), torch.tensor(1.0)])
        at.step += 1
        if at.step == batches.steps:
            at.epoch, at.step = at.epoch + 1, 0
            weights = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
            at.best = Best(1 / 3, at.epoch, run.global_step, weights)
    return run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two would be slower on networks as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run() -> Run:
    """A run in the middle of its second epoch."""
    return train(started(config()), 6)


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "step-000000006.safetensors"
    path.write_bytes(run.encode())
    return path


TENSORS = {
    "float32": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "float64": torch.tensor([math.pi, -0.0, math.inf, math.nan], dtype=torch.float64),
    "bfloat16": torch.tensor([[1.5]], dtype=torch.bfloat16),
    "float16": torch.tensor([6e-8], dtype=torch.float16),
    "int64": torch.tensor([2**62, -1]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 5),
    "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).T,
    'names with spaces, ünïcode and "quotes"': torch.tensor([1]),
}
META = {"note": 'a "quoted" text, \\ and ü', "numbers": [1, 0.1 + 0.2, 1e-310, None], "config": {"sha256": "f" * 64}}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_is_written_is_read_back(tmp_path):
    tensors, meta = checkpoint.read(write(tmp_path / "x.safetensors", checkpoint.encode(TENSORS, META)))
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(*(each.flatten().view(torch.uint8) for each in (tensors[name], tensor))), name
    assert meta.pop("format") == 4
    assert re.fullmatch(r"[0-9a-f]{64}", meta.pop("sha256"))
    assert meta == META


def test_tensors_that_share_memory_are_each_written(tmp_path):
    """Two layers may have one weight; safetensors refuses what it takes for an oversight."""
    weight = torch.randn(3, 3)
    content = checkpoint.encode({"a": weight, "b": weight, "c": weight[1:]}, {})
    found, _ = checkpoint.read(write(tmp_path / "x", content))
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight[1:])


def test_no_tensors_at_all(tmp_path):
    assert checkpoint.read(write(tmp_path / "x", checkpoint.encode({}, {})))[0] == {}


def test_the_bytes_are_a_function_of_the_content():
    content = checkpoint.encode(TENSORS, META)
    assert checkpoint.encode(dict(reversed(TENSORS.items())), META) == content
    assert checkpoint.encode({**TENSORS, "scalar": torch.tensor(7.5)}, META) != content
    assert checkpoint.encode(TENSORS, {**META, "note": ""}) != content


SMALL = checkpoint.encode({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}, {"step": 1})


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
def test_every_byte_is_covered(tmp_path, change):
    path = tmp_path / "x.safetensors"
    for position in range(len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[position] ^= change
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
            checkpoint.read(path)
    assert checkpoint.read(write(path, SMALL))[1]["step"] == 1  # it was the change


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointError):
            checkpoint.read(write(tmp_path / "x", SMALL[:length]))


@pytest.mark.parametrize("more", [b"\0", b"x", SMALL])
def test_a_file_with_more_after_its_end_is_refused(tmp_path, more):
    with pytest.raises(CheckpointError, match=rf"{len(SMALL + more)} bytes, its header states {len(SMALL)}"):
        checkpoint.read(write(tmp_path / "x", SMALL + more))


def signed(header: bytes, data: bytes = b"") -> bytes:
    """A file of this header and data with a digest that is right, where the header has room for one."""
    content = struct.pack("<Q", len(header)) + header + data
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def forged(tensors: Any, data: bytes = b"", text: str | None = None) -> bytes:
    """A checkpoint whose header and metadata are what somebody wants them to be."""
    meta = json.dumps({"sha256": "0" * 64, "format": 4}, separators=(",", ":")) if text is None else text
    return signed(json.dumps({"__metadata__": {"dltrain": meta}, **tensors}).encode(), data)


def float32(shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}


def test_a_forged_file_that_is_right_is_read(tmp_path):
    """So that what is refused below is refused for what is wrong with it."""
    path = write(tmp_path / "x", forged(float32([1], 0, 4), struct.pack("<f", 1.5)))
    assert checkpoint.read(path)[0]["a"].tolist() == [1.5]


DIGEST = '"sha256":"' + "0" * 64 + '"'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "0 bytes; empty or cut off", id="empty"),
        pytest.param(b"\0" * 7, "7 bytes; empty or cut off", id="short"),
        pytest.param(bytes(range(256)) * 8, "not a dltrain checkpoint", id="noise"),
        pytest.param(b"\0" * 4096, "no `dltrain` metadata", id="zeros"),
        pytest.param(b"\xff" * 4096, "damaged, or another format", id="ones"),
        pytest.param(struct.pack("<Q", 1 << 62) + b"{}", "not a dltrain checkpoint", id="header-of-exabytes"),
        pytest.param(struct.pack("<Q", 3) + b"{}", "damaged, or another format", id="header-past-the-end"),
        pytest.param(signed(b"{}"), "no `dltrain` metadata", id="no-metadata"),
        pytest.param(signed(b"[]"), "no `dltrain` metadata", id="header-is-a-list"),
        pytest.param(signed(b"[" * 100_000), "no `dltrain` metadata", id="header-nested"),
        pytest.param(signed(b'{"__metadata__": 1}'), "no `dltrain` metadata", id="metadata-is-a-number"),
        pytest.param(
            save_safetensors({"a": torch.ones(2)}, {"format": "pt"}), "no `dltrain` metadata", id="of-another-program"
        ),
        pytest.param(forged({}, text="{" + DIGEST), "no `dltrain` metadata", id="json-cut-off"),
        pytest.param(forged({}, text="{" + DIGEST + "}"), "no `dltrain` metadata", id="no-format"),
        pytest.param(forged({}, text=f'["{DIGEST}"]'), "no `dltrain` metadata", id="a-list"),
        pytest.param(forged({}, text="[" * 100_000), "no `dltrain` metadata", id="nested"),
        pytest.param(forged({}, text="{" + DIGEST + ',"format":[1]}'), "no `dltrain` metadata", id="format-is-a-list"),
        pytest.param(forged({}, text="{" + DIGEST + ',"format":Infinity}'), "no `dltrain` metadata", id="format-inf"),
        pytest.param(forged({}, text='{"format":2}'), "holds no digest", id="no-digest"),
        pytest.param(forged({"a": 5}), "no `dltrain` metadata", id="tensor-is-a-number"),
        pytest.param(forged(float32([1], 0, 8), b"\0" * 4), "its header states", id="data-cut-off"),
        pytest.param(
            forged(float32([2], 0, 4), b"\0" * 4), "not readable as safetensors", id="shape-and-size-disagree"
        ),
        pytest.param(forged(float32([0, 2**63], 0, 0)), "not readable as safetensors", id="a-side-of-2**63"),
        pytest.param(forged(float32([0, 2**62, 2**62], 0, 0)), "not readable as safetensors", id="strides-overflow"),
        pytest.param(forged(float32([1], -4, 0)), "not readable as safetensors", id="negative-offset"),
        pytest.param(forged(float32([2**40], 0, 2**42), b"\0" * 4), "its header states 4398", id="tensor-of-terabytes"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, content, message):
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [0, 1, 2, 10])
def test_another_format_names_the_version(tmp_path, version):
    text = "{" + DIGEST + f',"format":{version}' + "}"
    with pytest.raises(CheckpointError, match=rf"format {version}; this dltrain reads format 4: use the dltrain that"):
        checkpoint.read(write(tmp_path / "x", forged({}, text=text)))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: No such file or directory; expected a checkpoint file"):
        checkpoint.read(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"not a file; expected a checkpoint file"):
        checkpoint.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"Not a directory; expected a checkpoint file"):
        checkpoint.read(write(tmp_path / "file", SMALL) / "x")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, SMALL)
    with pytest.raises(CheckpointError, match=r"not a file"):
        checkpoint.read(tmp_path / "pipe")
    os.close(writer)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        pytest.param(struct.pack("<Q", 1 << 40), 1 << 41, id="header"),
        pytest.param(struct.pack("<Q", 33 << 20), 1 << 41, id="header-above-the-limit"),
        pytest.param(SMALL, 1 << 41, id="after-the-end"),
    ],
)
def test_a_file_of_terabytes_is_refused_in_little_memory(tmp_path, start, size):
    path = write(tmp_path / "x", start)
    os.truncate(path, size)  # a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            checkpoint.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("command", [False, True], ids=["read", "eval"])
def test_nothing_of_a_pickle_is_run(tmp_path, dltrain, zipped, command):
    proof = tmp_path / "proof"
    path = tmp_path / "x.pt"
    torch.save({"model.weight": torch.ones(3), "payload": Payload(proof)}, path, _use_new_zipfile_serialization=zipped)
    if command:
        done = dltrain("eval", path)
        assert (done.code, done.err.count("\n")) == (4, 1)
        assert "a pickle or another format" in done.err
        assert "never loaded" in done.err
    else:
        with pytest.raises(CheckpointError, match=r"a pickle or another format"):
            checkpoint.read(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # it would have been run


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_refused(tmp_path, protocol):
    proof = tmp_path / "proof"
    path = write(tmp_path / "x", pickle.dumps([Payload(proof), b"x" * 1000], protocol))
    with pytest.raises(CheckpointError, match=r"not a dltrain checkpoint"):
        checkpoint.read(path)
    assert not proof.exists()


# -- what a run goes on from

OPTIMIZERS = [
    {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    {"name": "adam"},
    {"name": "adamw", "amsgrad": True},
    {"name": "rmsprop", "momentum": 0.5, "centered": True},
    {"name": "adagrad"},
]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda written: written["name"])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_a_restored_run_goes_on_with_the_same_bits(tmp_path, optim, memory_format):
    chosen = config(optim=optim, train={"device": "cpu", "precision": "fp32", "memory_format": memory_format})
    straight = train(started(chosen), 7)
    stopped = train(started(chosen), 3)
    path = write(tmp_path / "x", stopped.encode())
    torch.manual_seed(999)
    resumed = started(chosen)
    resumed.restore(path, *checkpoint.read(path))
    assert resumed.encode() == path.read_bytes()
    assert train(resumed, 4).encode() == straight.encode()  # weights, buffers, optimizer, best, sums, RNG, position


@pytest.mark.parametrize(
    "part", ["optim.0_conv.weight.momentum_buffer", "sums", "rng.cpu", "model.1_batchnorm.running_var"]
)
def test_a_run_with_another_part_of_state_goes_another_way(saved, part):
    """The comparison above can fail."""
    straight = train(started(config()), 8)
    tensors, meta = checkpoint.read(saved)
    tensors[part] = torch.Generator().manual_seed(999).get_state() if part == "rng.cpu" else tensors[part] + 1
    resumed = started(config())
    resumed.restore(saved, tensors, meta)
    assert train(resumed, 2).encode() != straight.encode()


def test_optimizer_state_is_laid_out_as_its_parameter():
    """Fused optimizers walk the memory of both: other strides would pair every number with another's state."""
    parameter = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    read = torch.randn(4, 3, 5, 5)
    placed = _laid_out_as(parameter, read)
    assert placed.stride() == parameter.stride() != read.stride()
    assert torch.equal(placed, read)


class Counting(torch.optim.SGD):
    """Keeps a number beside its tensors, as an optimizer of a user's own may."""

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1
        return done


def test_numbers_in_an_optimizers_state_are_kept(tmp_path):
    def counting() -> Run:
        made = started(config())
        (part,) = made.setup.optimizers.parts
        counts = dataclasses.replace(part, optimizer=Counting(made.setup.model.parameters(), lr=0.1, momentum=0.9))
        made.setup = dataclasses.replace(made.setup, optimizers=Optimizers((counts,)))
        return made

    path = write(tmp_path / "x", train(counting(), 3).encode())
    resumed = counting()
    resumed.restore(path, *checkpoint.read(path))
    assert {state["count"] for _, state in resumed.setup.optimizers.state()} == {3}
    assert train(resumed, 2).encode() == train(counting(), 5).encode()


def test_best_weights_are_stored_once(run, tmp_path):
    """Where they are the model's own they are not stored again."""
    at_epochs_end = train(started(config()), 4)
    for made, stored in ((at_epochs_end, False), (run, True)):
        path = write(tmp_path / "x", made.encode())
        tensors, meta = checkpoint.read(path)
        assert any(name.startswith("best.") for name in tensors) == stored
        resumed = started(config())
        resumed.restore(path, tensors, meta)
        best, expected = resumed.progress.best, made.progress.best
        assert best is not None
        assert expected is not None
        assert (best.value, best.epoch, best.step) == (1 / 3, 1, 4)
        assert best.weights.keys() == expected.weights.keys()
        assert all(torch.equal(best.weights[name], tensor) for name, tensor in expected.weights.items())
        train(resumed, 1)  # and do not change with the model
        assert all(torch.equal(best.weights[name], tensor) for name, tensor in expected.weights.items())


DENSE = {"name": "mlp", "hidden": [8]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": DENSE}, r"holds another model's weights: 0_conv\.bias: expected none, found float32 \[4\]; .*"),
        ({"optim": {"name": "adam"}}, r"holds the state of SGD for 0_conv\.weight, the config says Adam"),
        (
            {"data": {"name": "digits", "limit": 100, "val": 36, "classes": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}},
            r"was trained on the classes \['0', .*\], the data has \['9', ",
        ),
        (
            {"data": {"name": "digits", "classes": [0, 1]}},
            r"7_linear\.bias: expected float32 \[2\], found float32 \[10\]",
        ),
    ],
)
def test_a_run_of_other_parts_does_not_go_on_from_it(saved, changes, message):
    other = started(config(**changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        other.restore(saved, *checkpoint.read(saved))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("before", "after", "lacking"),
    [
        ({"name": "adam"}, {"name": "adam", "amsgrad": True}, "max_exp_avg_sq"),
        ({"name": "rmsprop"}, {"name": "rmsprop", "centered": True, "momentum": 0.5}, "grad_avg, momentum_buffer"),
        ({"name": "rmsprop", "centered": True}, {"name": "rmsprop"}, None),
        ({"name": "sgd", "lr": 0.1}, {"name": "sgd", "lr": 0.1, "momentum": 0.9}, None),  # begins with no momentum
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "sgd", "lr": 0.1}, None),
    ],
)
def test_settings_that_need_a_state_which_is_not_there_are_refused(tmp_path, before, after, lacking):
    path = write(tmp_path / "x", train(started(config(optim=before)), 3).encode())
    resumed = started(config(optim=after))
    if lacking:
        with pytest.raises(CheckpointError, match=rf"holds no {lacking} of .*: resume with those it was started with"):
            resumed.restore(path, *checkpoint.read(path))
    else:
        resumed.restore(path, *checkpoint.read(path))
        train(resumed, 2)


def test_at_most_five_differences_are_named(saved):
    tensors, _ = checkpoint.read(saved)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_fit(saved, torch.nn.Linear(2, 2), weights)
    assert str(caught.value).count("expected") == 5
    assert str(caught.value).endswith(f"; and {len(weights) + 2 - 5} more")


def test_weights_alone_are_not_a_run(run, tmp_path):
    path = write(tmp_path / "best.safetensors", run.encode_weights(run.setup.model.state_dict(), 6))
    with pytest.raises(CheckpointError, match=r"holds weights to evaluate, not a run to go on with"):
        started(config()).restore(path, *checkpoint.read(path))


def without(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda tensors, meta: (tensors if name in tensors else meta).pop(name)


@pytest.mark.parametrize(
    "change",
    [
        *map(without, ["sums", "rng.cpu", "optimizers", "scalars", "best", "classes"]),
        lambda tensors, meta: meta["progress"].update(surprise=1),
        lambda tensors, meta: meta["best"].pop("value"),
        lambda tensors, meta: tensors.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}),
        lambda tensors, meta: tensors.update({"sums": torch.zeros(3)}),
        lambda tensors, meta: tensors.update({"unknown.x": torch.zeros(3)}),
        lambda tensors, meta: tensors.update({"optim.0_conv.weight.momentum_buffer": torch.zeros(3, 3)}),
        lambda tensors, meta: tensors.pop("best.7_linear.weight"),
        lambda tensors, meta: tensors.update({"model.7_linear.bias": torch.zeros(10, dtype=torch.float64)}),
    ],
)
def test_a_state_that_is_not_whole_is_refused(saved, change):
    tensors, meta = checkpoint.read(saved)
    change(tensors, meta)
    with pytest.raises(CheckpointError, match=r"does not hold the whole state|another model's weights"):
        started(config()).restore(saved, tensors, meta)


# -- what a model is made from


@pytest.mark.parametrize("kind", ["step", "best"])
def test_a_file_alone_gives_the_model_back(run, tmp_path, kind):
    setup = run.setup
    content = run.encode() if kind == "step" else run.encode_weights(setup.model.state_dict(), 6)
    path = write(tmp_path / "moved.safetensors", content)
    model = trained.load(path, "cpu", print)
    expected = setup.evaluate(setup.data.test)
    found = evaluate(model.model, setup.data.test, model.normalise, model.placement, model.config.loss, model.task)
    assert torch.equal(found.outputs, expected.outputs)
    assert found.scores() == expected.scores()
    assert (model.classes, model.shape, model.step) == (setup.data.classes, (1, 8, 8), 6)
    assert model.config == setup.config
    assert not model.model.training


def test_a_model_takes_no_memory_before_it_is_known_to_fit(saved, monkeypatch):
    devices = []

    def watched(*arguments: Any) -> torch.nn.Module:
        model = build_model(*arguments)
        devices.extend(parameter.device.type for parameter in model.parameters())
        return model

    monkeypatch.setattr(trained, "build_model", watched)
    model = trained.load(saved, "cpu", print)
    assert set(devices) == {"meta"}
    assert {parameter.device.type for parameter in model.model.parameters()} == {"cpu"}


def test_the_weights_of_a_run_folder_are_those_that_it_chose(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint"):
        trained.load(tmp_path, "auto", print)
    folder = rundir.RunFolder(tmp_path / "run", resume=False)
    for step in (4, 6):
        folder.save(step, run.encode_weights(run.setup.model.state_dict(), step))
    assert trained.load(folder.path, "cpu", print).step == 6
    folder.write("best.safetensors", run.encode_weights(run.setup.model.state_dict(), 3))
    assert trained.load(folder.path, "cpu", print).step == 3


def test_a_wrong_device_is_a_usage_error_of_one_line(saved, dltrain):
    done = dltrain("eval", saved, "--device", "gpu")
    assert (done.code, done.err) == (2, "error: device gpu: expected auto, cpu, mps, cuda or cuda:N\n")


def test_data_of_other_classes_is_refused(run, tmp_path):
    changed = copy.deepcopy(checkpoint.read(write(tmp_path / "x", run.encode())))
    tensors, meta = changed
    meta["classes"][0] = "zero"
    model = trained.load(write(tmp_path / "x", rewritten(tensors, meta)), "cpu", print)
    with pytest.raises(
        CheckpointError, match=r"was trained on 10 classes of \[1, 8, 8\] images, .* names them otherwise"
    ):
        trained.judge(model, "test", None, print)


def rewritten(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> bytes:
    """The checkpoint anew, with a digest that is right."""
    return checkpoint.encode(tensors, {key: value for key, value in meta.items() if key not in ("sha256", "format")})


def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value at a place of the metadata; DELETE takes away what is there."""
    *parts, last = path.split(".")

    def change(meta: dict[str, Any]) -> None:
        for part in parts:
            meta = meta[part]
        if value is DELETE:
            del meta[last]
        else:
            meta[last] = value

    return change


DELETE = object()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def layers(*written: Any) -> Callable[[dict[str, Any]], None]:
    return at("config.model", {"name": "cnn", "layers": list(written)})


def dense(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return at("config.model", {"name": "mlp", "hidden": [8], **changes})


HOSTILE = {
    **{f"no {name}": at(name, DELETE) for name in ("step", "config", "classes", "shape", "normalisation", "data")},
    "no mean": at("normalisation.mean", DELETE),
    "no files": at("data.files", DELETE),
    **{f"config {value!r}": at("config", value) for value in (None, 1, "x", [], [["a", 1]], {})},
    "config unknown key": at("config.surprise", 1),
    "config unknown model": at("config.model", {"name": "os.system"}),
    "config lone surrogate": at("config.model.\ud800", 1),
    "config nested": at("config.data.augment", nested(900)),
    "seed": at("config.seed", 2**64),
    "hidden of a billion": dense(hidden=[10**9]),
    "hidden of 10**18": dense(hidden=[10**18]),
    "hidden of 10**30": dense(hidden=[10**30]),
    "hidden of 0": dense(hidden=[0]),
    "channels of 10**30": layers({"conv": 10**30}),
    "padding of 10**9": layers({"conv": {"out": 1, "padding": 10**9}}),
    "padding of 10**30": layers({"conv": {"out": 1, "padding": 10**30}}),
    "window of 10**30": layers({"maxpool": 10**30}),
    "no layers": layers(),
    "repeat": layers({"repeat": {"times": 10**12, "layers": ["relu"]}}),
    "repeat in repeat": layers(
        {"repeat": {"times": 10**5, "layers": [{"repeat": {"times": 10**5, "layers": ["relu"]}}]}}
    ),
    "another loss": at("config.loss", {"name": "bce"}),
    "weights of other classes": at("config.loss", {"name": "cross_entropy", "class_weights": [1, 2]}),
    "sigmoid": at("config.model.output", "sigmoid"),
    **{f"classes {str(value)[:20]}": at("classes", value) for value in ("0123456789", {}, None, 10, [[1]] * 10, ["a"])},
    "classes fewer": at("classes", ["a", "b"]),
    **{
        f"shape {value}": at("shape", value)
        for value in (
            [1, 8],
            [8, 8, 1, 1],
            [1, 8, 0],
            [-1, -8, 8],
            [1, 8, 8.0],
            "188",
            None,
            [1, 8, math.inf],
            [1, 8, math.nan],
            [10**30, 8, 8],
            [1, 4096, 4097],
            [3, 8, 8],
        )
    },
    **{
        f"std {str(value)[:9]}": at("normalisation.std", value)
        for value in ([0.0], [-1.0], [math.nan], [math.inf], [10**400], ["1"], [True], "1", None, [], [1.0, 1.0])
    },
    "mean infinite": at("normalisation.mean", [-math.inf]),
    "means for three channels": at("normalisation.mean", [0.1, 0.2, 0.3]),
    "step infinite": at("step", math.inf),
    "step negative": at("step", -1),
    "files a list": at("data.files", []),
    "files of numbers": at("data.files", {"a": 1}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_metadata_is_refused_in_one_line(run, tmp_path, change):
    path = write(tmp_path / "x.safetensors", run.encode_weights(run.setup.model.state_dict(), 6))
    tensors, meta = checkpoint.read(path)
    change(meta)
    path.write_bytes(rewritten(tensors, meta))
    with pytest.raises(CheckpointError) as caught:
        trained.load(path, "cpu", print)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.7_linear.bias", None),
        ("model.7_linear.bias", torch.zeros(11)),
        ("model.7_linear.bias", torch.zeros(10, dtype=torch.int64)),
        ("model.7_linear.bias", torch.zeros(10, dtype=torch.float64)),
        ("model.surprise", torch.zeros(1)),
    ],
)
def test_weights_that_are_not_the_models_are_refused(saved, name, tensor):
    tensors, meta = checkpoint.read(saved)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    saved.write_bytes(rewritten(tensors, meta))
    with pytest.raises(CheckpointError, match=rf"another model's weights: {name.removeprefix('model.')}: expected "):
        trained.load(saved, "cpu", print)


# -- generated input

FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
BYTES = st.lists(st.tuples(st.integers(0, len(SMALL) + 16), st.binary(max_size=8), st.integers(0, 8)), max_size=4)


@FUZZ
@given(edits=BYTES, resign=st.booleans())
def test_whatever_the_bytes_are_they_are_read_or_refused(tmp_path, edits, resign):
    content = SMALL.replace(re.search(rb"[0-9a-f]{64}", SMALL)[0], b"0" * 64) if resign else SMALL
    for position, new, removed in edits:
        content = content[:position] + new + content[position + removed :]
    if resign:  # what lies behind the digest must hold by itself
        content = content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)
    path = write(tmp_path / "x", content)
    try:
        checkpoint.read(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert resign or content == SMALL


@FUZZ
@given(content=st.binary(max_size=400))
def test_noise_is_refused(tmp_path, content):
    for each in (content, struct.pack("<Q", len(content)) + content, signed(b'{"__metadata__":{"dltrain":' + content)):
        with pytest.raises(CheckpointError):
            checkpoint.read(write(tmp_path / "x", each))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_whatever_the_metadata_are_they_give_a_model_or_are_refused(run, tmp_path, data):
    tensors, meta = checkpoint.read(write(tmp_path / "x", run.encode_weights(run.setup.model.state_dict(), 6)))
    meta.pop("environment")
    place: Any = meta
    key = data.draw(st.sampled_from(["step", "config", "classes", "shape", "normalisation", "data"]))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(JSON)
    path = write(tmp_path / "x", rewritten(tensors, meta))
    try:
        trained.load(path, "cpu", print)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


# -- what docs/checkpoint.md says


@pytest.fixture(scope="module")
def read_checkpoint() -> Callable[[Path], Any]:
    """The page's own function."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert not re.search("torch|dltrain import|import dltrain", code)
    names: dict[str, Any] = {}
    exec(code, names)
    found: Callable[[Path], Any] = names["read_checkpoint"]
    return found


def test_the_pages_code_reads_a_checkpoint_without_dltrain(saved, read_checkpoint):
    tensors, meta = read_checkpoint(saved)
    expected, expected_meta = checkpoint.read(saved)
    assert meta == expected_meta
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(tensors[name]), tensor)


def test_the_pages_code_finds_damage(tmp_path, read_checkpoint):
    assert read_checkpoint(write(tmp_path / "x", SMALL))[1]["step"] == 1
    for position in range(len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[position] ^= 1
        with pytest.raises((ValueError, KeyError)):
            read_checkpoint(write(tmp_path / "x", damaged))
    with pytest.raises(ValueError, match=r"format 5"):
        read_checkpoint(write(tmp_path / "x", forged({}, text="{" + DIGEST + ',"format":5}')))


def table(heading: str) -> dict[str, str]:
    """The first column's names -> the second column, of the table under a heading of the page."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: kind.strip() for names, kind in rows for name in re.findall(r"`([^`]+)`", names)}


def test_the_page_names_everything_that_is_in_a_checkpoint(run, read_checkpoint, tmp_path):
    best = read_checkpoint(write(tmp_path / "best", run.encode_weights(run.setup.model.state_dict(), 6)))
    settings = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "lookahead": {}}
    whole = train(started(config(optim=settings, train={"device": "cpu", "average": "ema"})), 3)
    whole.progress.best = Best(0.5, 1, 2, {name: 2 * each for name, each in whole.setup.model.state_dict().items()})
    step = read_checkpoint(write(tmp_path / "step", whole.encode()))
    fields, tensors = table("Metadata"), table("Tensors")
    assert list(step[1]) == list(fields)
    assert set(best[1]) == {name for name, kind in fields.items() if kind == "both"}
    assert set(fields.values()) == {"both", "step"}
    for name in step[1]["progress"]:
        assert f"`{name}`" in PAGE.split("`progress` counts")[1].split("\n## ")[0]

    def pattern(name: str) -> str:
        return re.escape(name).replace("NAME", r".+").replace("KEY", r"\w+")

    both = [pattern(name) for name, kind in tensors.items() if kind == "both"]
    assert {name for name in best[0] if not any(re.fullmatch(each, name) for each in both)} == set()
    for name in step[0]:
        assert any(re.fullmatch(pattern(each), name) for each in tensors), name
    for each in set(tensors) - {"rng.cuda", "rng.mps"}:
        assert any(re.fullmatch(pattern(each), name) for name in step[0]), each


def test_a_model_computes_what_the_page_says(run, saved, read_checkpoint):
    """A perceptron's outputs from the file's numbers alone."""
    perceptron = train(started(config(model="perceptron")), 6)
    tensors, meta = read_checkpoint(write(saved, perceptron.encode()))
    setup = perceptron.setup
    pixels = setup.data.test.images.numpy()
    (mean,), (std,) = meta["normalisation"]["mean"], meta["normalisation"]["std"]
    x = ((pixels / 255 - mean) / std).reshape(len(pixels), -1)
    outputs = x @ tensors["model.1.weight"].T + tensors["model.1.bias"]
    expected = setup.evaluate(setup.data.test)
    torch.testing.assert_close(torch.from_numpy(outputs).float(), expected.outputs, rtol=1e-4, atol=1e-5)
