"""How much of a sweep's time is training: two workers, trials of about a second.

    python benchmarks/sweep_share.py [TRIALS PRUNER]

Each worker has one thread.  Training is the time in train(): steps, evaluation on val, checkpoints; what the sweep does
at the end of each epoch (storing the result, asking whether to go on) is not.  The first share leaves start-up of the
workers (imports, the data) out: its clock starts where both have ended their first trial.  The second is of the whole
time from the command to its pictures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, time
from typing import Any

SWEEP = """
name: share
config: digits_mlp
trials: {trials}
pruner: {pruner}
space:
  optim.lr: {{low: 1.0e-3, high: 1.0e-2, log: true}}
  model.dropout: {{low: 0.0, high: 0.5}}
  descent.batch_size: [32, 48]
  train.epochs: [20]
  train.device: [cpu]
"""


def worker(folder: Path) -> None:
    """`dltrain sweep`, which notes when each trial began and ended, and how long it trained."""
    from dltrain import cli, runs, sweep

    train, run, watched = runs.train, sweep._Worker.run, 0.0
    rows: list[dict[str, float]] = []
    row: dict[str, float] = {}
    append = sweep._TrialFolder.append

    def timed_append(self: Any, record: Any) -> None:
        nonlocal watched
        start = perf_counter()
        try:
            append(self, record)
        finally:
            watched += perf_counter() - start

    def timed_train(state: Any, *arguments: Any) -> None:
        nonlocal watched
        start, watched = perf_counter(), 0.0
        try:
            train(state, *arguments)
        finally:
            row.update(training=perf_counter() - start - watched, steps=state.progress.seconds)

    def timed_run(self: Any, *arguments: Any) -> None:
        row.clear()
        row["begin"] = time()
        run(self, *arguments)
        rows.append({**row, "end": time()})

    runs.train, sweep._Worker.run, sweep._TrialFolder.append = timed_train, timed_run, timed_append
    code = cli.run(["sweep", str(folder / "share.yaml"), "--out", str(folder / "runs"), "--quiet", "--json"])
    (folder / f"{os.getpid()}.json").write_text(json.dumps(rows))
    sys.exit(code)


def main(trials: int, pruner: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "share.yaml").write_text(SWEEP.format(trials=trials, pruner=pruner))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "worker", str(folder)]
        start = perf_counter()
        workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
        found = [json.loads(each.communicate()[0]) for each in workers]
        elapsed = perf_counter() - start
        assert not any(each.returncode for each in workers)
        rows = [json.loads((folder / f"{each.pid}.json").read_text()) for each in workers]
        print(found[0]["states"])
    begin = max(each[0]["end"] for each in rows)
    end = min(each[-1]["end"] for each in rows)
    timed = [row for each in rows for row in each if row["begin"] >= begin and row["end"] <= end]
    busy = sum(
        max(row["end"] for row in each) - next(row["begin"] for row in each if row["begin"] >= begin) for each in rows
    )
    seconds = {key: sum(row.get(key, 0.0) for each in rows for row in each if row["begin"] >= begin) for key in _KEYS}
    training, steps = (100 * seconds[key] / busy for key in _KEYS)
    print(f"{len(timed)} trials by 2 workers, {busy / len(timed):.2f} s each")
    print(f"training: {training:.1f} % of the time; in its steps: {steps:.1f} %")
    whole = 100 * sum(row.get("training", 0.0) for each in rows for row in each) / (len(rows) * elapsed)
    print(f"with start-up and pictures, {elapsed:.0f} s: {whole:.1f} % training")


_KEYS = ("training", "steps")

if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]))
    else:
        trials, pruner = sys.argv[1:] or ("200", "none")
        main(int(trials), pruner)
