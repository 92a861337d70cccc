"""How long a command takes before it trains, and how much memory it holds.

    python benchmarks/first_step.py [RUNS]

Times `dltrain --help`, and `dltrain train mnist_mlp` until its first step is complete, each as a process of its own.
MNIST must be in the data root ($DLTRAIN_DATA) already.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep

# a log line after every step, so that the first one shows in metrics.jsonl
TRAIN = ["train", "mnist_mlp", "--set", "train={epochs: 1, log_every_steps: 1}", "--set", "schedule=constant", "-q"]


def help_seconds() -> float:
    start = perf_counter()
    subprocess.run([sys.executable, "-m", "dltrain", "--help"], check=True, capture_output=True)
    return perf_counter() - start


def first_step_seconds() -> float:
    """Until metrics.jsonl has its first line, which is written after the first step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = perf_counter()
        command = [sys.executable, "-m", "dltrain", *TRAIN, "--out", str(run)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            sleep(0.005)
        seconds = perf_counter() - start
        process.kill()
        process.wait()
    return seconds


def peak_memory() -> float:
    """MB that training mnist_mlp for an epoch holds at most."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import resource, sys; from dltrain import cli; assert cli.run(sys.argv[1:]) == 0; "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        command = [sys.executable, "-c", code, *TRAIN, "--out", str(Path(folder) / "run")]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name, measure in (("dltrain --help", help_seconds), ("first step of mnist_mlp", first_step_seconds)):
        measure()
        print(f"{name}: median {statistics.median(measure() for _ in range(runs)):.2f} s of {runs}")
    print(f"peak memory of an epoch of mnist_mlp: {peak_memory():,.0f} MB")


if __name__ == "__main__":
    main()
