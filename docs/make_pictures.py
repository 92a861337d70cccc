"""Makes the README's pictures from a real run.

    python docs/make_pictures.py

Trains configs/digits_cnn.yaml and writes docs/terminal.svg, the lines that it prints, and docs/curves.png, the loss and
accuracy that metrics.jsonl holds.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from dltrain import config as configs
from dltrain import rundir, runs, shipped, tables

HERE = Path(__file__).parent
NAME = "digits_cnn"


def main() -> None:
    config = configs.load(shipped.find(NAME), ["train.epochs=12"])
    console = Console(record=True, width=92, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        run = rundir.RunFolder(Path(folder) / "run", resume=False)
        summary = runs.start(config, run, console, quiet=False)
        tables.result({**summary, "run": f"runs/{NAME}/2026-11-25T10-00-00"}, console)
        records = list(rundir.records(run.path))
        run.close()
    console.save_svg(str(HERE / "terminal.svg"), title=f"dltrain train {NAME} --set train.epochs=12")
    curves(records)


def curves(records: list[dict]) -> None:
    """Training loss at every log line, and both accuracies after each epoch."""
    steps = [line for line in records if line["kind"] == "step"]
    epochs = [line for line in records if line["kind"] == "epoch"]
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="train")
    loss.plot(
        [line["step"] for line in epochs], [line["val"]["loss"] for line in epochs], label="val", marker="o", ms=3
    )
    accuracy.plot([line["step"] for line in steps], [100 * line["accuracy"] for line in steps], label="train")
    accuracy.plot(
        [line["step"] for line in epochs],
        [100 * line["val"]["accuracy"] for line in epochs],
        label="val",
        marker="o",
        ms=3,
    )
    for axes, name in ((loss, "loss"), (accuracy, "accuracy, %")):
        axes.set_xlabel("step")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    loss.set_yscale("log")
    figure.savefig(HERE / "curves.png")


if __name__ == "__main__":
    main()
