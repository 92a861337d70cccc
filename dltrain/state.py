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
from dltrain.groups import Part
from dltrain.plugins import digests

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
    score_sum: float = 0.0
    seen: int = 0  # this epoch's images at the last log line
    logged_seconds: float = 0.0  # epoch_seconds at the last log line
    losses: list[float] = field(default_factory=list)  # of each complete epoch: val's, or training's without val
    best: Best | None = None


@dataclass
class Run:
    """A run: its parts, where it stands, and the sums of its epoch so far."""

    setup: Setup
    sums: torch.Tensor  # float64 [2] on the CPU: loss and the task's score summed over this epoch's images
    average: Tensors | None = None  # running average of the model's state, where train.average asks for one
    slow: Tensors | None = None  # parameters at the last look back, where optim.lookahead asks for it
    progress: Progress = field(default_factory=Progress)
    batched_seeds: int = 1  # runs that take each step as one, this among them

    def encode(self, generators: Tensors | None = None) -> bytes:
        """The checkpoint that `restore` goes on from.

        generators: what `generators` gave, where several processes have asked for it together
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.setup.model.state_dict().items()}
        for group, kept in (("average", self.average), ("slow", self.slow)):
            tensors |= {f"{group}.{name}": tensor for name, tensor in (kept or {}).items()}
        scalars: dict[str, dict[str, Any]] = {}
        for name, state in self.setup.optimizers.state():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optim.{name}.{key}"] = value
                elif isinstance(value, list):
                    tensors |= {
                        f"optim.{name}.{key}[{i}]": each for i, each in enumerate(value) if torch.is_tensor(each)
                    }
                    plain = ["tensor" if torch.is_tensor(each) else each for each in value]
                    scalars.setdefault(name, {})[key] = plain
                else:
                    scalars.setdefault(name, {})[key] = value
        tensors["sums"] = self.sums
        tensors |= {f"rng.{name}": state for name, state in (generators or self.generators()).items()}
        best, at = self.progress.best, self.global_step
        own = self.setup.model.state_dict()  # what the best weights are at their step, but where averages are evaluated
        if best and not all(torch.equal(tensor, own[name]) for name, tensor in best.weights.items()):
            tensors |= {f"best.{name}": tensor for name, tensor in best.weights.items()}
        progress = dataclasses.replace(self.progress, best=None)
        meta = {
            **self._about(at),
            "progress": {key: value for key, value in vars(progress).items() if key != "best"},
            "best": best and {"value": best.value, "epoch": best.epoch, "step": best.step},
            "optimizers": self._classes(),
            "scalars": scalars,
        }
        return checkpoint.encode(tensors, meta)

    def generators(self) -> Tensors:
        """The states of torch's global generators, which dropout draws from: of several processes a row each."""
        gather = self.setup.processes.gather
        states = {name: gather(state) for name, state in _rng_states(self.setup.placement.device).items()}
        return {name: torch.stack(rows) if len(rows) > 1 else rows[0] for name, rows in states.items()}

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
            "bits": self.bits(),
        }

    def bits(self) -> dict[str, Any]:
        """What must be the same for the run to end in the same bits, beside its config and data."""
        world = self.setup.processes.world
        plugins = digests(self.setup.config.plugins)
        shared = {"processes": world, "batched_seeds": self.batched_seeds}
        return {**bits_depend_on(self.setup.placement), "plugins": plugins, **shared}

    def _classes(self) -> dict[str, str]:
        """The optimizer of each parameter that has one."""
        parts = self.setup.optimizers.parts
        return {name: type(part.optimizer).__name__ for part in parts for name in part.names}

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
        kinds = ("model", "average", "slow", "optim", "best", "rng", "sums")
        groups: dict[str, Tensors] = {kind: {} for kind in kinds}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        for group in ("model", "average", "best"):
            if group == "model" or groups[group]:
                checkpoint.check_fit(path, model, groups[group])
        classes, written = self.setup.data.classes, meta["optimizers"]
        if tuple(meta["classes"]) != classes:
            raise CheckpointError(f"{path}: was trained on the classes {meta['classes']}, the data has {list(classes)}")
        for name, own_class in self._classes().items():
            if written.get(name) != own_class:
                text = f"the state of {written.get(name, 'no optimizer')} for {name}, the config says {own_class}"
                raise CheckpointError(f"{path}: holds {text}")
        checkpoint.load_weights(model, groups["model"])
        for group, kept in (("average", self.average), ("slow", self.slow)):
            for name, tensor in (kept or {}).items():
                tensor.copy_(groups[group][name])
        states: dict[str, dict[str, Any]] = {}
        for part in self.setup.optimizers.parts:
            own = {name: _read_state(part, model, name, groups["optim"], meta["scalars"]) for name in part.names}
            own = {name: state for name, state in own.items() if state}
            needed = _trial_state(part, model) if own else {}
            if lacking := {key for state in own.values() for key in needed.keys() - state.keys()}:
                text = "state, which these settings of optim need: resume with those it was started with"
                raise CheckpointError(
                    f"{path}: holds no {', '.join(sorted(lacking))} of {type(part.optimizer).__name__}'s {text}"
                )
            for key, value in needed.items():
                if isinstance(value, torch.Tensor) and not value.ndim:  # a count, on the CPU or the device
                    own = {name: {**state, key: state[key].to(value)} for name, state in own.items()}
            states |= own
        self.setup.optimizers.load_state(states)
        self.sums.copy_(tensors["sums"])
        self.progress = Progress(**meta["progress"])
        if meta["best"]:
            weights = groups["best"] or groups["model"]
            self.progress.best = Best(
                **meta["best"], weights={name: tensor.to(device) for name, tensor in weights.items()}
            )
        rank = self.setup.processes.rank
        rows = {
            name: each if each.ndim == 1 else each[rank % len(each)].clone() for name, each in groups["rng"].items()
        }
        if rank == 0 or any(each.ndim == 2 for each in groups["rng"].values()):  # else all would draw the same
            _set_rng_states(device, rows)


def _read_state(
    part: Part, model: torch.nn.Module, name: str, tensors: Tensors, scalars: Mapping[str, Any]
) -> dict[str, Any]:
    """What the part's optimizer keeps of a parameter, as it keeps it."""
    parameter = model.get_parameter(name)
    state: dict[str, Any] = dict(scalars.get(name, {}))
    for key, value in state.items():
        if isinstance(value, list):
            state[key] = [tensors[f"{name}.{key}[{i}]"] if each == "tensor" else each for i, each in enumerate(value)]
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
    for key, tensor in own.items():
        if "[" not in key:  # else in one of the lists above
            # what searches keeps vectors of all parameters under the first one
            state[key] = tensor if part.source.entry.facts.get("closure") else _laid_out_as(parameter, tensor)
    return state


def _trial_state(part: Part, model: torch.nn.Module) -> Mapping[str, Any]:
    """What the part's optimizer keeps of a parameter, found by a step of a trial parameter."""
    if part.source.entry.facts.get("closure"):
        return {}
    parameter = torch.nn.Parameter(torch.zeros_like(model.get_parameter(part.names[0])))
    parameter.grad = torch.zeros_like(parameter)
    optimizer: torch.optim.Optimizer = part.source([parameter])
    optimizer.step()
    state: Mapping[str, Any] = optimizer.state[parameter]
    return state


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
