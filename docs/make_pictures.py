"""Makes the README's pictures from a real run.

    python docs/make_pictures.py

Trains configs/digits_cnn.yaml and writes docs/terminal.svg, the lines that it prints, and docs/curves.png, the loss and
accuracy that metrics.jsonl holds; docs/report.png, the head of its report, where Chromium is here to draw it; and the
network of docs/gradients.md, for docs/gradients.png; and configs/mnist_logistic.yaml, which needs MNIST in the
data root or a network, for docs/roc.png.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from dltrain import cli, figures, report, rundir, runs, shipped, tables, vary, yamlfile
from dltrain import config as configs

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
        page(run.path)
    gradients()
    variants()
    roc()
    console.save_svg(str(HERE / "terminal.svg"), title=f"dltrain train {NAME} --set train.epochs=12")
    curves(records)


def page(run: Path) -> None:
    """The head of the run's report, as a browser draws it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("docs/report.png stays as it is: there is no Chromium here")
        return
    html = report.make([run], None, "cpu", None, [], print).absolute()
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--blink-settings=preferredColorScheme=1"]
    size = ["--window-size=1100,1180", f"--user-data-dir={run / 'browser'}", f"--screenshot={HERE / 'report.png'}"]
    subprocess.run([browser, *flags, *size, html.as_uri()], check=True, capture_output=True)


def variants() -> None:
    """The command of docs/vary.md, for docs/vary.png."""
    with tempfile.TemporaryDirectory() as folder:
        grid = ["descent.variant=batch,stochastic,mini-batch"]
        found, _ = vary.vary(vary.plan(shipped.find("mnist_descent"), grid, [], Path(folder)), Console(), quiet=True)
        (HERE / "vary.png").write_bytes(figures.vary(found, [vary.trace(row) for row in found["runs"]]))
        tables.vary({**found, "figure": "docs/vary.png"}, Console())


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


def gradients() -> None:
    """What tensorboard.layers records of eight layers: of sigmoids, of ReLUs, and of ReLUs at too large a rate."""
    (deep,) = re.findall(r"```yaml\n(.*?)```", (HERE / "gradients.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    norms, dead = figure.subplots(1, 2)
    for label, colour, *settings in (
        ("sigmoid", "tab:blue"),
        ("relu", "tab:orange", "model.activation=relu"),
        ("relu, lr 0.2", "tab:red", "model.activation=relu", "optim.lr=0.2"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            config = configs.check(yamlfile.parse(deep, "docs/gradients.md"), ["name=deep", *settings])
            run = rundir.RunFolder(Path(folder) / "run", resume=False)
            summary = runs.start(config, run, Console(quiet=True), quiet=True)
            found = [line for line in rundir.records(run.path) if line["kind"] == "layers"]
            run.close()
        print(f"{label}: test accuracy {summary['test']['accuracy']:.4f}")
        weights = [row for name, row in found[0]["parameters"].items() if name.endswith("weight")]
        shown = [row["gradient_norm"] or None for row in weights]  # 0 has no place on a logarithmic axis
        norms.plot(range(1, len(shown) + 1), shown, "o-", ms=4, color=colour, label=label)
        for last, line in ((False, ":"), (True, "-")):
            rows = found[-1 if last else 0]["activations"].values()
            shares = [100 * row["dead"] for row in rows]
            text = f"{label}, epoch {len(found) if last else 1}"
            if label != "sigmoid":  # which is never exactly 0
                dead.plot(range(1, len(shares) + 1), shares, f"o{line}", ms=4, color=colour, label=text)
    norms.set_yscale("log")
    for axes, title in ((norms, "gradient norm of the weights, after epoch 1"), (dead, "dead units, %")):
        axes.set_xlabel("layer")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "gradients.png")


def roc() -> None:
    """A threshold for 7 against 3 with a type I error of half a per cent, as docs/evaluation.md chooses it."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/logistic"
        choice = ["--positive", "7", "--type-1-error", "0.005", "--curves", str(HERE / "roc.png")]
        for command in (["train", "mnist_logistic", "--out", run], ["eval", run, *choice]):
            if cli.run(command):
                raise SystemExit(f"dltrain {' '.join(command)} failed")


if __name__ == "__main__":
    main()
