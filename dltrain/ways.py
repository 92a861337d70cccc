"""Which way of training several seeds is the fastest here: a few steps of each are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch

from dltrain import batched, launch, runs
from dltrain.averaging import training_mode
from dltrain.batched import Stack
from dltrain.build import Setup
from dltrain.compiling import TIMED
from dltrain.errors import ConfigError, DivergedError
from dltrain.gpu.rates import synchronize
from dltrain.step import Steps

WAYS = ("batched", "batched-processes", "in-turn", "processes")
END = 0.4  # seconds that a run takes at its end, for TensorBoard's pictures most of all


def share(seeds: Sequence[int], how: str) -> tuple[tuple[int, ...], ...]:
    """The seeds as tasks of a process: those together that are batched."""
    tasks = {"batched": 1, "batched-processes": launch.workers(len(seeds))}.get(how, len(seeds))
    size = -(-len(seeds) // tasks)
    return tuple(tuple(seeds[at : at + size]) for at in range(0, len(seeds), size))


def choose(asked: str, setup: Setup, count: int, start_up: float) -> tuple[str, str]:
    """How to train so many seeds, one of WAYS, and why.  What is timed changes the weights of the setup.

    asked: auto, or one of WAYS
    start_up: seconds that a process takes to where it could take its first step

    Raises ConfigError for a way that is not possible.
    """
    cpu = setup.placement.device.type == "cpu"
    if "processes" in asked and not cpu:
        raise ConfigError(f"--how {asked}: shares the cores of a CPU, and this trains on {setup.placement.device}")
    if asked in ("in-turn", "processes"):
        return asked, "asked for"
    if asked == "auto" and count == 1:
        return "in-turn", "one seed"
    why_not = batched.why_not(setup)
    if asked != "auto":
        if why_not:
            raise ConfigError(f"--how {asked}: {why_not}: use --how in-turn or processes")
        return asked, "asked for"
    training_mode(setup.model)
    took, whole = {}, {}
    try:
        for way in WAYS:
            tasks = share(range(count), way)
            batches = "batched" in way
            if batches and (why_not or len(tasks[0]) == 1):
                continue
            if "processes" in way and (not cpu or launch.workers(len(tasks)) == 1):
                continue
            processes = launch.workers(len(tasks)) if "processes" in way else 1
            rounds = -(-len(tasks) // processes)  # of tasks, one in each process
            with _threads(launch.threads(processes) if processes > 1 else torch.get_num_threads()):
                seconds = _seconds(setup, len(tasks[0]) if batches else 1)
            took[way] = rounds * seconds / count
            steps = setup.config.train.epochs * setup.steps_per_epoch
            whole[way] = rounds * seconds * steps + END * count / processes + (start_up if processes > 1 else 0)
    except DivergedError:  # with this learning rate the first steps of these weights already do
        return "in-turn", "the steps that were to be timed diverged"
    said = ", ".join(f"{1000 * seconds:.3g} ms {way}" for way, seconds in took.items())
    no = f"; not batched: {why_not}" if why_not else ""
    return min(whole, key=lambda way: whole[way]), f"a step of a seed took {said}{no}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(setup: Setup, seeds: int) -> float:
    """The median of a step of so many seeds at once, of as many steps as fit into a second."""
    all_runs = [runs.new_run(setup) for _ in range(seeds)]
    take: Callable[[], object] = (Stack(all_runs) if seeds > 1 else Steps(all_runs[0])).take
    took: list[float] = []
    for number in range(2 + TIMED):  # the first two make what is made once
        for run in all_runs:
            run.progress.step = 0
        begin = perf_counter()
        take()
        synchronize(setup.placement.device)
        if number >= 2:
            took.append(perf_counter() - begin)
        if sum(took) > 1:
            break
    return sorted(took)[len(took) // 2]
