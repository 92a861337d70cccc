from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run
from torch import nn

from dltrain import checkpoint, compiling, rundir
from dltrain.compiling import choose, seconds_of_a_step
from dltrain.device import Placement
from dltrain.errors import DeviceError

CPU = Placement(torch.device("cpu"), torch.float32, torch.contiguous_format, {})
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU by a C++ compiler")


def test_a_short_run_is_not_compiled_nor_tried() -> None:
    def never() -> float:
        raise AssertionError

    assert choose(0.1, 5999, never) == ("off", "about 600 s of steps do not repay compiling")


@pytest.mark.parametrize(("share", "mode"), [(0.94, "default"), (0.96, "off"), (1.3, "off")])
def test_a_long_run_is_compiled_where_that_is_faster(share: float, mode: str) -> None:
    found = choose(0.1, 12000, lambda: 0.1 * share)
    assert found == (mode, f"a compiled step took {share:.2f} of the time, in a run of about 20 minutes")


def test_what_cannot_be_compiled_is_not() -> None:
    def fail() -> float:
        raise DeviceError("train.compile: the step could not be compiled: no compiler")

    assert choose(1.0, 6000, fail) == ("off", "train.compile: the step could not be compiled: no compiler")


def test_timing_a_step_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, random = torch.rand(5, 1, 8, 8), torch.get_rng_state()
    assert (
        seconds_of_a_step(model, nn.functional.cross_entropy, CPU, images, torch.zeros(len(images), dtype=torch.int64))
        > 0
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@needs_compiler
def test_a_compiled_step_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    images, targets = torch.randn(7, 8), torch.randint(3, (7,))
    found = []
    for make in (compiling.eager, lambda *parts: compiling.compiled(*parts, "default", True)):
        model.zero_grad()
        loss, outputs = make(model, nn.functional.cross_entropy, CPU)(images, targets)
        loss.backward()
        found.append([loss.detach(), outputs.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_torch_cannot_compile_is_said_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def broken(function: object, **settings: object) -> object:
        def call(*arguments: object) -> object:
            raise TorchDynamoException("no working C++ compiler\nfound")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    forward = compiling.compiled(nn.Identity(), nn.functional.cross_entropy, CPU, "default", True)
    with pytest.raises(
        DeviceError, match=r"could not be compiled: .*no working C\+\+ compiler; set train.compile: off"
    ):
        forward(torch.randn(2, 3), torch.tensor([0, 1]))


@needs_compiler
def test_a_compiled_run_resumes_to_the_same_bits_and_refuses_another_choice(dltrain: Run, tmp_path: Path) -> None:
    config = tmp_path / "compiled.yaml"
    config.write_text(
        "data: {name: digits, limit: 300}\nmodel: {name: mlp, hidden: [8], dropout: 0.2}\noptim: {name: sgd, lr: 0.1}\n"
        "descent: {batch_size: 64}\n"
        "train: {epochs: 2, device: cpu, precision: fp32, compile: default, checkpoint_every_steps: 3}\n"
    )
    assert dltrain("train", config, "--out", "straight", "-q").code == 0
    shutil.copytree("straight", "killed")
    for path in rundir.steps(Path("killed"))[:1]:
        path.unlink()  # back to an earlier step
    (Path("killed") / "summary.json").unlink()
    refused = dltrain("train", "--resume", "killed", "-q", "--set", "train.compile=off")
    assert (refused.code, 'compile: "default" -> "off"' in refused.err) == (4, True)
    assert dltrain("train", "--resume", "killed", "-q").code == 0
    one, other = (checkpoint.read(rundir.steps(Path(name))[0])[0] for name in ("straight", "killed"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
