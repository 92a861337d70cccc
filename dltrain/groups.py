"""Parameter groups: which optimizer, with which settings and schedule, trains each parameter of a model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dltrain.config import Config, Group, multiplier
from dltrain.errors import ConfigError
from dltrain.registry import Component, nearest


@dataclass(frozen=True)
class Part:
    """Parameters that one optimizer trains, by name."""

    names: tuple[str, ...]
    optimizer: torch.optim.Optimizer
    source: Component
    lr: float  # what the schedule multiplies
    schedule: Component

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of their names."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    @cached_property
    def _bare_step(self) -> Callable[..., Any]:
        step: Callable[..., Any] = inspect.unwrap(type(self.optimizer).step)
        return step

    @torch.no_grad()
    def step(self, *closure: Callable[[], float]) -> None:
        """A step of the optimizer, without the hooks that torch wraps it in: they take half as long as SGD itself."""
        self._bare_step(self.optimizer, *closure)


@dataclass(frozen=True)
class Optimizers:
    """All that train a model's parameters, those in no group first."""

    parts: tuple[Part, ...]

    @property
    def lr(self) -> float:
        """The learning rate of the parameters in no group, as last set."""
        rate: float = self.parts[0].optimizer.param_groups[0]["lr"]
        return rate

    def set_rates(self, epoch: float, epochs: float, losses: Sequence[float]) -> None:
        """The learning rates at a position in the run, after epochs with these losses."""
        for part in self.parts:
            rate = part.lr * multiplier(part.schedule, epoch, epochs, losses)
            for group in part.optimizer.param_groups:
                group["lr"] = rate

    def step(self, loss: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
        """One step.

        loss: whose gradient the parameters have
        again: computes loss and gradient anew, at whatever the parameters then are; for optimizers that search
        """
        for part in self.parts:
            if part.source.entry.facts.get("closure"):
                known = [loss]
                part.step(lambda known=known: float(known.pop() if known else again()))  # type: ignore[misc]
            else:
                part.step()

    def state(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(parameter's name, what its optimizer keeps of it) for each that has been stepped."""
        for part in self.parts:
            for name, parameter in zip(part.names, part.parameters, strict=True):
                if parameter in part.optimizer.state:
                    yield name, part.optimizer.state[parameter]

    def load_state(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Puts back what `state` gave."""
        for part in self.parts:
            own = {index: states[name] for index, name in enumerate(part.names) if name in states}
            groups = part.optimizer.state_dict()["param_groups"]
            part.optimizer.load_state_dict({"state": own, "param_groups": groups})
            parameters = part.parameters
            for index, state in own.items():  # torch moves numbers to the parameter's dtype and device: put them back
                numbers = {key: each for key, each in state.items() if isinstance(each, torch.Tensor) and not each.ndim}
                part.optimizer.state[parameters[index]].update(numbers)

    def evaluation_weights(self) -> dict[str, torch.Tensor]:
        """By name, the parameters that are evaluated at other weights than those that are stepped."""
        found: dict[str, torch.Tensor] = {}
        for part in self.parts:
            if part.source.entry.facts.get("averages"):
                averaged: Any = part.optimizer
                weights = averaged.evaluation_weights()
                found |= {name: weights[each] for name, each in zip(part.names, part.parameters, strict=True)}
        return found


def make(model: nn.Module, config: Config) -> Optimizers:
    """The optimizers of a model's parameters that are not frozen.  Raises ConfigError where groups do not fit it."""
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts: list[Part] = []
    for index, group in enumerate(config.optim.groups):
        names = [name for name in left if _fits(group, name, model)]
        if not names:
            raise ConfigError(f"optim.groups.{index}: {_nothing_fits(group, model)}")
        taken = {name: left.pop(name) for name in names}
        parts += _parts(config, group.source, taken, group.schedule or config.schedule, f"optim.groups.{index}")
    rest = _parts(config, config.optim.source, left, config.schedule, "optim") if left else []
    return Optimizers((*rest, *parts))


def sources(config: Config) -> Iterator[tuple[str, Component]]:
    """Each optimizer of a config, and where it is written."""
    yield "optim", config.optim.source
    yield from ((f"optim.groups.{index}", group.source) for index, group in enumerate(config.optim.groups))


def optimizer_of(source: Component, parameters: Sequence[nn.Parameter], where: str) -> torch.optim.Optimizer:
    """Raises ConfigError with the place where an optimizer refuses its settings or parameters."""
    try:
        optimizer: torch.optim.Optimizer = source(parameters)
    except ValueError as error:
        raise ConfigError(f"{where}: {source.name}: {error}") from error
    return optimizer


def _parts(
    config: Config, source: Component, parameters: Mapping[str, nn.Parameter], schedule: Component, where: str
) -> Iterator[Part]:
    """One part; two where norms and biases are to have no weight decay."""
    bare = {}
    if not config.optim.decay_norms_and_biases and "weight_decay" in source.args:
        bare = {name: parameter for name, parameter in parameters.items() if parameter.ndim < 2}
    undecayed = dataclasses.replace(source, args={**source.args, "weight_decay": 0.0})
    whole = {name: parameter for name, parameter in parameters.items() if name not in bare}
    for each, taken in ((source, whole), (undecayed, bare)):
        if taken:
            optimizer = optimizer_of(each, list(taken.values()), where)
            yield Part(tuple(taken), optimizer, each, optimizer.param_groups[0]["lr"], schedule)


def _fits(group: Group, name: str, model: nn.Module) -> bool:
    return (
        (group.match is None or fnmatchcase(name, group.match))
        and (group.kind is None or _kind(model.get_submodule(name.rpartition(".")[0])) == group.kind)
        and (group.ndim is None or model.get_parameter(name).ndim == group.ndim)
    )


def _kind(module: nn.Module) -> str | None:
    """conv, linear or norm, from what its class is called: BatchNorm2d, ConvTranspose2d."""
    return next((kind for kind in ("conv", "linear", "norm") if kind in type(module).__name__.lower()), None)


def _nothing_fits(group: Group, model: nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    if group.match is not None and not any(fnmatchcase(name, group.match) for name in names):
        return no_such(group.match, names)
    return "no parameter fits all of its match, kind and ndim, or those that do are frozen or in a group before it"


def no_such(pattern: str, names: Sequence[str]) -> str:
    """That no parameter has a name of this pattern, and which are there."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"no parameter is called '{pattern}'{nearest(pattern, names) or f'; there is {shown}'}"


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters of these names out of training.  Raises ConfigError where a pattern fits none."""
    names = [name for name, _ in model.named_parameters()]
    for index, pattern in enumerate(patterns):
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigError(f"model.frozen.{index}: {no_such(pattern, names)}")
        for name in fitting:
            model.get_parameter(name).requires_grad_(False)
