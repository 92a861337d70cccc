"""What the shipped configs reach, and how long they take: a row of the README's table each.

    python benchmarks/shipped_configs.py --seeds 3 mnist_mlp mnist_cnn
    python benchmarks/shipped_configs.py --seeds 1 cifar10_cnn --set data.verify=false

Runs `dltrain train` for each seed as a process of its own, from its start to its exit.  The data must be in the data
root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from dltrain import shipped


def run(name: str, seed: int, settings: list[str]) -> tuple[dict[str, Any], float]:
    """The run's summary and the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"--set={setting}" for setting in (f"seed={seed}", *settings)]
        command = [
            sys.executable,
            "-m",
            "dltrain",
            "train",
            name,
            "--json",
            "--quiet",
            "--out",
            str(Path(folder) / "run"),
        ]
        start = perf_counter()
        done = subprocess.run([*command, *overrides], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout), perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=shipped.names())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    for name in arguments.names:
        results = [run(name, seed, arguments.settings) for seed in range(arguments.seeds)]
        accuracies = [100 * summary["test"]["accuracy"] for summary, _ in results]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        epoch = statistics.median(summary["seconds_per_epoch"] for summary, _ in results)
        seconds = statistics.median(seconds for _, seconds in results)
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        print(
            f"| `{name}` | {statistics.mean(accuracies):.2f}{spread} % | {results[0][0]['epochs']} | {epoch:.3g} s | "
            f"{seconds:.0f} s | ({each})",
            flush=True,
        )


if __name__ == "__main__":
    main()
