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
from dltrain.registry import Component

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
            "bits": bits_depend_on(self.setup.placement),
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
        if "progress" not in meta:
            raise CheckpointError(f"{path}: holds weights to evaluate, not a run to go on with")
        try:
            self._restore(path, tensors, meta)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            first_line, _, _ = str(error).partition("\n")
            reason = f"{type(error).__name__}: {first_line}"
            raise CheckpointError(f"{path}: does not hold the whole state of a run ({reason})") from error

    def _restore(self, path: Path, tensors: Tensors, meta: Mapping[str, Any]) -> None:
        model, device = self.setup.model, self.setup.placement.device
        groups: dict[str, Tensors] = {"model": {}, "optim": {}, "best": {}, "rng": {}, "sums": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        checkpoint.check_fit(path, model, groups["model"])
        if groups["best"]:
            checkpoint.check_fit(path, model, groups["best"])
        classes, written, own_class = self.setup.data.classes, meta["optimizer"], type(self.optimizer).__name__
        if tuple(meta["classes"]) != classes:
            raise CheckpointError(f"{path}: was trained on the classes {meta['classes']}, the data has {list(classes)}")
        if written["class"] != own_class:
            text = f"the state of {written['class']}, the config's optimizer is {own_class}"
            raise CheckpointError(f"{path}: holds {text}")
        model.load_state_dict(groups["model"])
        state: dict[int, dict[str, Any]] = {}
        for index, (name, parameter) in enumerate(model.named_parameters()):
            own = {
                key.removeprefix(f"{name}."): _laid_out_as(parameter, tensor)
                for key, tensor in groups["optim"].items()
                if key.rpartition(".")[0] == name
            }
            if own or name in written["scalars"]:
                state[index] = own | written["scalars"].get(name, {})
        needed = _state_keys(self.setup.config.optim)
        if lacking := {key for own in state.values() for key in needed - own.keys()}:
            text = f"of {own_class}'s state, which these settings of optim need: resume with those it was started with"
            raise CheckpointError(f"{path}: holds no {', '.join(sorted(lacking))} {text}")
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.sums.copy_(tensors["sums"])
        self.progress = Progress(**meta["progress"])
        if meta["best"]:
            weights = groups["best"] or groups["model"]
            self.progress.best = Best(
                **meta["best"], weights={name: tensor.to(device) for name, tensor in weights.items()}
            )
        _set_rng_states(device, groups["rng"])


def _state_keys(optim: Component) -> set[str]:
    """What the optimizer keeps of a parameter, found by a step of a trial parameter."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer: torch.optim.Optimizer = optim([parameter])
    optimizer.step()
    return set(optimizer.state[parameter])


def _laid_out_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parameter's strides: fused optimizers walk both in the order of memory and compare neither.

    A step count, which has no dimensions, stays as it is.
    """
    if not tensor.ndim:
        return tensor
    if tensor.shape != parameter.shape:
        raise ValueError(f"optimizer state {list(tensor.shape)} of a parameter {list(parameter.shape)}")
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


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
