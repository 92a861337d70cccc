"""What each of TensorBoard's switches adds to an epoch of shipped configs.

    python benchmarks/tensorboard_switches.py [ROUNDS]

Trains each config with no switch and with each one alone, in turn in one process, and clocks what is called of the
board after each epoch and at the end: a switch adds nothing elsewhere, and from one run to the next an epoch's time
differs by more than the 2 % that are to be told.  Prints what a switch adds, in percent of an epoch's steps and
evaluation: for each epoch of the run, and once at its end.  The MNIST configs need the data ($DLTRAIN_DATA).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from dltrain import config as configs
from dltrain import logs, rundir, runs, shipped
from dltrain.board import Board
from dltrain.config import TensorBoard

EPOCHS = {"digits_mlp": 40, "mnist_mlp": 4, "mnist_cnn": 2}
SWITCHES = [each for each in TensorBoard.model_fields if each != "pictures"]


class Clocked(Board):
    """A board that keeps (start, end) of what it does after each epoch and, last, at the end.

    It leaves out what comes once in a run and takes longer than any: the graph and the pictures of the test split.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.has_examples = True
        self.times: list[tuple[float, float]] = []

    def epoch(self, *arguments: Any) -> None:
        start = perf_counter()
        super().epoch(*arguments)
        self.times.append((start, perf_counter()))

    def layers(self, *arguments: Any) -> None:
        """Called after `epoch`, with what was measured in between."""
        super().layers(*arguments)
        self.times[-1] = self.times[-1][0], perf_counter()

    def _pictures(self, *arguments: Any) -> None:
        pass

    def end(self, *arguments: Any) -> None:
        start = perf_counter()
        super().end(*arguments)
        self.times.append((start, perf_counter()))


def measure(name: str, switch: str | None) -> tuple[float, float, float]:
    """Seconds in the board for each epoch, seconds in it at the end, seconds of an epoch without it."""
    sets = [f"tensorboard.{each}={str(each == switch).lower()}" for each in SWITCHES]
    config = configs.load(shipped.find(name), [f"train.epochs={EPOCHS[name]}", *sets])
    boards: list[Clocked] = []

    def board(*arguments: Any) -> Clocked:
        boards.append(Clocked(*arguments))
        return boards[0]

    logs.Board = board  # type: ignore[assignment, misc]
    with tempfile.TemporaryDirectory() as folder:
        run = rundir.RunFolder(Path(folder) / "run", resume=False)
        runs.start(config, run, Console(quiet=True), quiet=True)
        run.close()
    *epochs, (start, end) = boards[0].times
    between = [later - before for (_, before), (later, _) in itertools.pairwise(epochs)]
    return statistics.mean(end - start for start, end in epochs), end - start, statistics.median(between)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {rounds} runs each")
    for name, epochs in EPOCHS.items():
        found: dict[str | None, list[tuple[float, float, float]]] = {switch: [] for switch in (None, *SWITCHES)}
        for _ in range(rounds):
            for switch, times in found.items():
                times.append(measure(name, switch))
        seconds = statistics.median(seconds for times in found.values() for _, _, seconds in times)
        print(f"\n{name}: {epochs} epochs of {seconds:.3f} s")
        print(f"{'':20}{'each epoch':>22}{'at the end, once':>22}")
        none = [statistics.median(part) for part in zip(*found[None], strict=True)]
        for switch in SWITCHES:
            own = [statistics.median(part) for part in zip(*found[switch], strict=True)]
            added = [each - without for each, without in zip(own[:2], none[:2], strict=True)]
            print(f"{switch:20}" + "".join(f"{100 * each / seconds:10.2f} %{1e3 * each:7.1f} ms" for each in added))


if __name__ == "__main__":
    main()
