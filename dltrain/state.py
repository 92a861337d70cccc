"""The state of a run in mid-training: into a checkpoint and back, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dltrain import checkpoint
from dltrain.build import Setup
from dltrain.device import bits_depend_on, environment
from dltrain.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


@dataclass
class Best:
    """The weights that are kept: those with the best value of what `train.choose_by` names."""

    value: float
    epoch: int  # counted from 1
    step: int
    weights: Tensors


@dataclass
class Progress:
    """Where a run stands.  Everything that a step or a log line depends on, beside model, optimizer and RNG."""

    epoch: int = 0  # epochs that are complete
    step: int = 0  # steps of the next epoch that are complete
    seconds: float = 0.0  # spent in training steps
    epoch_seconds: float = 0.0  # of these, in this epoch
    loss_sum: float = 0.0  # over this epoch's images, read at the last log line
    correct: float = 0.0
    seen: int = 0  # this epoch's images at the last log line
    logged_seconds: float = 0.0  # epoch_seconds at the last log line
    best: Best | None = None


@dataclass
class Run:
    """A run: its parts, where it stands, and the sums that live on the device between two log lines."""

    setup: Setup
    optimizer: torch.optim.Optimizer
    sums: torch.Tensor  # [2]: loss and correct predictions summed over this epoch's images
    progress: Progress = field(default_factory=Progress)

    def encode(self) -> bytes:
        """The checkpoint that `restore` goes on from."""
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.setup.model.named_parameters()}
        tensors = {f"model.{name}": tensor for name, tensor in self.setup.model.state_dict().items()}
        scalars: dict[str, dict[str, Any]] = {}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optim.{names[parameter]}.{key}"] = value
                else:
                    scalars.setdefault(names[parameter], {})[key] = value
        tensors["sums"] = self.sums
        tensors |= {f"rng.{name}": state for name, state in _rng_states(self.setup.placement.device).items()}
        best, at = self.progress.best, self.global_step
        if best and best.step != at:  # else they are the model's own
            tensors |= {f"best.{name}": tensor for name, tensor in best.weights.items()}
        progress = dataclasses.replace(self.progress, best=None)
        meta = {
            **self._about(at),
            "progress": {key: value for key, value in vars(progress).items() if key != "best"},
            "best": best and {"value": best.value, "epoch": best.epoch, "step": best.step},
            "optimizer": {"class": type(self.optimizer).__name__, "scalars": scalars},
            "bits": bits_depend_on(self.setup.placement.device),
        }
        return checkpoint.encode(tensors, meta)

    def encode_weights(self, weights: Mapping[str, torch.Tensor], step: int) -> bytes:
        """A checkpoint of weights alone, to evaluate and not to go on from."""
        return checkpoint.encode({f"model.{name}": tensor for name, tensor in weights.items()}, self._about(step))

    def _about(self, step: int) -> dict[str, Any]:
        data = self.setup.data
        return {
            "step": step,
            "config": self.setup.config.plain(),
            "classes": data.classes,
            "shape": data.shape,
            "normalisation": dataclasses.asdict(data.normalisation),
            "data": {"files": data.files, "verified": data.verified},
            "environment": environment(self.setup.placement),
        }

    @property
    def global_step(self) -> int:
        """Steps taken since the start of the run."""
        return self.progress.epoch * self.setup.steps_per_epoch + self.progress.step

    def restore(self, path: Path, tensors: Tensors, meta: Mapping[str, Any]) -> None:
        """Puts everything where the checkpoint has it.  Raises CheckpointError where it does not fit."""
        model, device = self.setup.model, self.setup.placement.device
        groups = {"model": {}, "optim": {}, "best": {}, "rng": {}, "sums": {}}  # type: dict[str, Tensors]
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        if "progress" not in meta:
            raise CheckpointError(f"{path}: holds weights to evaluate, not a run to go on with")
        checkpoint.check_fit(path, model, groups["model"])
        written = meta["optimizer"]
        if written["class"] != type(self.optimizer).__name__:
            text = f"the state of {written['class']}, the config's optimizer is {type(self.optimizer).__name__}"
            raise CheckpointError(f"{path}: holds {text}")
        model.load_state_dict(groups["model"])
        state: dict[int, dict[str, Any]] = {}
        for index, (name, _) in enumerate(model.named_parameters()):
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in groups["optim"].items()
                if key.rpartition(".")[0] == name
            }
            if own or name in written["scalars"]:
                state[index] = own | written["scalars"].get(name, {})
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.sums.copy_(tensors["sums"])
        self.progress = Progress(**meta["progress"])
        if meta["best"]:
            weights = groups["best"] or groups["model"]
            self.progress.best = Best(
                **meta["best"], weights={name: tensor.to(device) for name, tensor in weights.items()}
            )
        _set_rng_states(device, groups["rng"])


def _rng_states(device: torch.device) -> Tensors:
    """The states of torch's global generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_rng_states(device: torch.device, states: Tensors) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
