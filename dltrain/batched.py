"""Several runs of one config that take each step as one: the same layers, with weights for each seed.

Weights, buffers and the optimizer's state of all runs lie in tensors with a first dimension for the run, `[K, …]`, of
which each run's own model has views.  Forward and backward pass are torch.func's vmap over that dimension, so that a
step of K small models launches as many operations as a step of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch.func import functional_call

from dltrain import runs
from dltrain.averaging import Followers, training_mode
from dltrain.build import Setup
from dltrain.errors import DivergedError, Stopped
from dltrain.groups import Optimizers, Part, optimizer_of
from dltrain.logs import Log
from dltrain.rundir import RunFolder
from dltrain.state import Run
from dltrain.step import UNREAD, diverged
from dltrain.train import Clock, choose_last, end_epoch, is_over, log_step, save, stop_signals


def why_not(setup: Setup) -> str | None:
    """Why runs of this setup cannot take their steps as one; None where they can, as far as their config says."""
    config = setup.config
    for part in setup.optimizers.parts:
        if not part.source.entry.facts.get("elementwise"):
            return f"optim: {part.source.name} does not update each number of a weight by itself"
        if part.schedule.kind == "feedback":
            return f"schedule: {part.schedule.name} sets each seed another learning rate"
    if config.optim.sam_rho:
        return "optim.sam_rho looks for sharper weights seed by seed"
    if setup.placement.compile != "off":
        return "train.compile compiles the steps of one seed"
    if not setup.resident:
        return "the images are read from the disk seed by seed"
    stack = Stack([runs.new_run(setup) for _ in range(2)])
    try:
        stack.take()
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"model {config.model.source.name}: {reason}"
    return None


class Stack:
    """Takes the steps of several runs that stand at the same place.  What they gave stays on the device until `read`.

    The models' parameters and buffers become views of tensors `[K, …]`.  Runs that are dropped are computed on with
    the others, which costs what it costs and changes no bit of theirs, and mean nothing any more.
    """

    def __init__(self, all_runs: Sequence[Run]) -> None:
        self.runs = dict(enumerate(all_runs))  # by their place, those that are not dropped
        setups = [run.setup for run in all_runs]
        self.setup = setups[0]
        self.models = [setup.model for setup in setups]
        self.batches = [setup.batches() for setup in setups]
        self.parameters = _stacked([dict(model.named_parameters()) for model in self.models])
        self.buffers = _stacked([dict(model.named_buffers()) for model in self.models])
        parts = self.setup.optimizers.parts
        for name in (name for part in parts for name in part.names):
            self.parameters[name].requires_grad_()
        self.optimizers = Optimizers(
            tuple(
                Part(
                    part.names,
                    optimizer_of(part.source, [self.parameters[name] for name in part.names], "optim"),  # type: ignore[misc]
                    part.source,
                    part.lr,
                    part.schedule,
                )
                for part in parts
            )
        )
        self.trained = [each for each in self.parameters.values() if each.requires_grad]
        self.followers = {place: Followers(run) for place, run in self.runs.items()}
        self._take_states()
        self._forward = torch.vmap(self._one, randomness="different")
        self._unread: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # losses [K], gradients' norms [K], images
        self._outputs: list[tuple[torch.Tensor, torch.Tensor]] = []  # [K, B, …], targets as `Batches` gives them
        self._waiting = 0  # images of the unread steps, of one run
        self._norms: dict[int, float] = {}

    def _one(self, parameters: Any, buffers: Any, images: torch.Tensor, targets: torch.Tensor) -> Any:
        with self.setup.placement.autocast():
            outputs = functional_call(self.models[0], (parameters, buffers), (images,))
        return self.setup.loss(outputs, targets), outputs

    @property
    def any_run(self) -> Run:
        return next(iter(self.runs.values()))

    def drop(self, place: int) -> None:
        del self.runs[place], self.followers[place]

    def take(self) -> dict[int, DivergedError]:
        """One step; gives those runs whose loss or gradient is found not to be finite, by their place."""
        at, config, batches = self.any_run.progress, self.setup.config, self.batches[0]
        self.optimizers.set_rates(at.epoch + at.step / batches.steps, config.train.epochs, [])
        losses = self._gradient(at.epoch, at.step)
        norms = torch.stack([torch.linalg.vector_norm(each.flatten(1), dim=1) for each in self._gradients()])
        norms = torch.linalg.vector_norm(norms, dim=0)
        if config.train.clip_norm:  # as torch.nn.utils.clip_grad_norm_
            scale = (config.train.clip_norm / (norms + 1e-6)).clamp(max=1)
            for each in self._gradients():
                each.mul_(scale.view(-1, *[1] * (each.ndim - 1)))
        images = batches.images_in(at.step)
        self._unread.append((losses, norms, images))
        self._waiting += images
        for part in self.optimizers.parts:
            part.step()
        for place, run in self.runs.items():
            run.progress.step += 1
            self.followers[place].follow()
        if self.setup.placement.device.type == "cpu":  # else this would wait
            last = (losses + norms).tolist()
            if not all(math.isfinite(last[place]) for place in self.runs):
                return self.read()[1]
        if self._outputs[-1][0][:, 0].numel() * self._waiting > UNREAD:
            return self.read()[1]
        return {}

    def _gradients(self) -> Iterable[torch.Tensor]:
        return (each.grad for each in self.trained if each.grad is not None)

    def _gradient(self, epoch: int, step: int) -> torch.Tensor:
        """Computes the runs' mean losses `[K]` and leaves their gradients in the parameters."""
        for each in self.trained:
            each.grad = None
        total: torch.Tensor | None = None
        for parts in zip(*(batches.step(epoch, step) for batches in self.batches), strict=True):
            images, targets = (torch.stack(each) for each in zip(*((each[0], each[1]) for each in parts), strict=True))
            losses, outputs = self._forward(self.parameters, self.buffers, images, targets)
            losses = losses * parts[0][2]
            losses.sum().backward()
            total = losses.detach() if total is None else total + losses.detach()
            self._outputs.append((outputs.detach(), targets))
        assert total is not None  # a step has images
        return total

    def read(self) -> tuple[dict[int, float], dict[int, DivergedError]]:
        """Adds what the steps gave to the runs' sums: the norms of their last gradients, and what `take` gives.

        This waits for the device.
        """
        if not self._unread:
            return self._norms, {}
        losses, norms = (torch.stack(each).T.tolist() for each in list(zip(*self._unread, strict=True))[:2])
        counts = [images for *_, images in self._unread]
        outputs, targets = (torch.cat(each, 1) for each in zip(*self._outputs, strict=True))
        scores = self.setup.task.scores(outputs.flatten(0, 1), targets.flatten(0, 1)).unflatten(0, outputs.shape[:2])
        whole = scores.dtype == torch.bool
        found: list[Any] = scores.sum(1).tolist() if whole else scores.tolist()
        self._norms = {place: norms[place][-1] for place in self.runs}
        wrong: dict[int, DivergedError] = {}
        at = self.any_run.progress
        for place, run in self.runs.items():
            run.setup.optimizers.set_rates(
                at.epoch + (at.step - 1) / self.batches[0].steps, self.setup.config.train.epochs, []
            )
            first = run.global_step - len(counts) + 1
            loss_sum, score_sum = run.sums.tolist()
            for step, (loss, norm, images) in enumerate(zip(losses[place], norms[place], counts, strict=True), first):
                if not math.isfinite(loss + norm):
                    what = f"the loss is {loss} and the gradient's norm {norm}"
                    wrong.setdefault(place, diverged(run, step, what))
                loss_sum += loss * images  # one after another: to the same bits however often it is read
            score_sum = score_sum + found[place] if whole else sum(found[place], score_sum)
            run.sums[0], run.sums[1] = loss_sum, score_sum
        self._unread.clear()
        self._outputs.clear()
        self._waiting = 0
        return self._norms, wrong

    def _take_states(self) -> None:
        """Stacks what the runs' own optimizers keep of their parameters; a run that has none gets another one's."""
        for index, part in enumerate(self.optimizers.parts):
            own = [run.setup.optimizers.parts[index] for run in self.runs.values()]
            for at, parameter in enumerate(part.parameters):
                states = [each.optimizer.state.get(each.parameters[at]) for each in own]
                given = next((state for state in states if state), None)
                if given:
                    part.optimizer.state[parameter] = {
                        key: torch.stack([(state or given)[key] for state in states]) if _is_wide(value) else value
                        for key, value in given.items()
                    }

    def give_states(self) -> None:
        """Gives the runs' own optimizers and models views of what is kept of their parameters, for all but steps."""
        for place, run in self.runs.items():
            for part, own in zip(self.optimizers.parts, run.setup.optimizers.parts, strict=True):
                for parameter, mine in zip(part.parameters, own.parameters, strict=True):
                    state = part.optimizer.state.get(parameter, {})
                    own.optimizer.state[mine] = {
                        key: value[place] if _is_wide(value) else value for key, value in state.items()
                    }
                    mine.grad = None if parameter.grad is None else parameter.grad[place]


def _is_wide(value: Any) -> bool:
    """Whether a part of an optimizer's state has numbers for each number of a parameter."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _stacked(of_runs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of each name as one `[K, …]`, of which those given become views."""
    stacked = {name: torch.stack([each[name].detach() for each in of_runs]) for name in of_runs[0]}
    for place, tensors in enumerate(of_runs):
        for name, tensor in tensors.items():
            tensor.data = stacked[name][place]
    return stacked


@dataclass(frozen=True)
class Member:
    """A run among those that are trained as one."""

    run: Run
    folder: RunFolder
    log: Log


def train(
    everyone: Sequence[Run], members: dict[int, Member], note: Callable[[str], None], finished: Callable[[], None]
) -> None:
    """Trains runs that stand at the same place to their ends, and scores them; the folder of one that diverges says so.

    everyone: also those that are over, and keep their place among the others
    members: those that are not, by their place
    finished: called where some have their results

    Raises Stopped, after saving, on SIGINT or SIGTERM.
    """
    stack = Stack(everyone)
    for place in set(stack.runs) - set(members):
        stack.drop(place)
    settings, last = stack.setup.config.train, stack.setup.config.chosen_by == "last"
    saved = monotonic()

    def give_up(wrong: dict[int, DivergedError]) -> None:
        for place, error in wrong.items():
            runs.record_failure(members[place].run, members[place].folder, error)
            note(f"seed {members[place].run.setup.config.seed} diverged")
            stack.drop(place)

    def each(act: Callable[[int, Member], None]) -> None:
        """For every run that is left; one that diverges by it is left out from then on."""
        for place in list(stack.runs):
            try:
                act(place, members[place])
            except DivergedError as error:
                give_up({place: error})

    def save_one(place: int, member: Member) -> None:
        member.log.flush()
        save(member.run, member.folder)

    def save_all() -> None:
        nonlocal saved
        give_up(stack.read()[1])
        stack.give_states()
        each(save_one)
        saved = monotonic()

    def save_where(due: object) -> None:
        if due or stop or monotonic() - saved > 60 * settings.checkpoint_every_minutes:
            save_all()
        if stop:
            raise Stopped("", stop[0])

    def finish(place: int, member: Member) -> None:
        with _own_generators(stack.setup):
            runs.finish(member.run, member.folder, member.log)

    def end_those_over() -> None:
        over = [place for place, run in stack.runs.items() if is_over(run)]
        if last and over:
            stack.give_states()
            for place in over:
                choose_last(stack.runs[place], stack.batches[place])
        if over:
            save_all()
        for place in over:
            if place in stack.runs:
                finish(place, members[place])
                stack.drop(place)
                finished()

    for run in stack.runs.values():
        if last:
            run.progress.best = None  # of an earlier end of this run
    with stop_signals() as stop:
        end_those_over()
        while stack.runs:
            for model in stack.models:
                training_mode(model)
            clock = Clock()
            due: object = None
            while stack.runs and (at := stack.any_run.progress).step < (steps := stack.batches[0].steps):
                give_up(stack.take())
                epoch_ends = at.step == steps
                number = at.epoch * steps + at.step
                if number % settings.log_every_steps == 0 or epoch_ends:
                    norms, wrong = stack.read()
                    give_up(wrong)
                    share = clock.lap() / len(stack.models)
                    for place, run in stack.runs.items():
                        run.progress.epoch_seconds += share
                        log_step(run, members[place].log, stack.batches[place], norms[place])
                due = settings.checkpoint_every_steps and number % settings.checkpoint_every_steps == 0
                if not epoch_ends:
                    share = clock.lap() / len(stack.models)
                    for run in stack.runs.values():
                        run.progress.epoch_seconds += share
                    save_where(due)
                    clock.lap()
            stack.give_states()
            each(lambda place, member: end_epoch(member.run, member.log, stack.batches[place]))
            _tell(stack, note)
            save_where(due)
            end_those_over()


def _own_generators(setup: Setup) -> AbstractContextManager[Any]:
    """Within, what is drawn from torch's generators takes nothing from the runs that go on."""
    device = setup.placement.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _tell(stack: Stack, note: Callable[[str], None]) -> None:
    if stack.runs:
        at, epochs = stack.any_run.progress, stack.setup.config.train.epochs
        losses = [run.progress.losses[-1] for run in stack.runs.values()]
        split = "val" if stack.setup.data.val else "train"
        count = f"epoch {at.epoch:>{len(str(epochs))}}/{epochs}"
        note(f"{count}  {split} loss {min(losses):.4f} to {max(losses):.4f} of {len(losses)} seeds")
