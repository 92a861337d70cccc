"""Sixteen seeds by one command against sixteen commands, from the command to its exit.

    python benchmarks/seeds.py [--seeds 16] [--how auto] [--commands 16] [CONFIG …] [--set KEY=VALUE …]

Without a config: digits_mlp, and a small MLP on MNIST (any copy: DLTRAIN_DATA), which is written below.  It prints the
seconds of both, their ratio, and the mean test accuracy of both with its 95 % interval.

--commands: how many of the commands are run; the seconds of the others are taken to be their mean
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from dltrain.statistics import interval

MNIST = """
data: {name: mnist, val: 5000}
model: {name: mlp, hidden: [64]}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
descent: {batch_size: 128}
train: {epochs: 3}
"""


def run(*arguments: str) -> tuple[float, Any]:
    """Seconds of `dltrain train` with these arguments, and what it printed."""
    start = perf_counter()
    command = [sys.executable, "-m", "dltrain", "train", *arguments, "--quiet", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return perf_counter() - start, json.loads(done.stdout)


def shown(accuracies: list[float]) -> str:
    found = interval(accuracies)
    assert found
    width = "" if found["half_width"] is None else f" ± {100 * found['half_width']:.2f}"
    return f"{100 * found['mean']:.2f}{width} % of {len(accuracies)}"


def compare(config: str, name: str, seeds: int, commands: int, how: str, settings: list[str]) -> None:
    sets = [part for setting in settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        together, found = run(config, *sets, "--seeds", str(seeds), "--how", how, "--out", f"{folder}/together")
        first = found["rows"][0]["seed"]
        alone = [run(config, *sets, "--set", f"seed={first + k}", "--out", f"{folder}/{k}") for k in range(commands)]
    seconds = sum(took for took, _ in alone) * seeds / commands
    print(f"{name}: one command {together:.1f} s, {found['how']} ({found['why']})")
    counted = f", as {commands} of them took" if commands < seeds else ""
    print(f"  {seeds} commands {seconds:.1f} s{counted}; ratio {seconds / together:.2f}")
    print(f"  test accuracy: one command {shown([row['test']['accuracy'] for row in found['rows']])}", end="")
    print(f", commands {shown([summary['test']['accuracy'] for _, summary in alone])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--commands", type=int)
    parser.add_argument("--how", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "mnist_small.yaml"
        small.write_text(MNIST)
        for config in asked.configs or ["digits_mlp", "mnist_small"]:
            path = str(small) if config == "mnist_small" else config
            compare(path, config, asked.seeds, asked.commands or asked.seeds, asked.how, asked.settings)


if __name__ == "__main__":
    main()
