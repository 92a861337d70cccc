"""`dltrain bench`: recipes over several seeds: what they reach, in which time, at which share of the device.

Every seed is a whole run as `dltrain train` makes it, in a folder of its own; all are made by one process, which reads
the data of a recipe once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import psutil
import torch
from rich.console import Console

from dltrain import config as configs
from dltrain import rundir, runs, shipped
from dltrain.build import build_model
from dltrain.config import Config
from dltrain.data.dataset import Dataset
from dltrain.data.files import State, data_root, state
from dltrain.device import choose_device
from dltrain.dryrun import FORWARD_PASSES, count_flops
from dltrain.errors import ConfigError, DataError, DivergedError, DltrainError, RunTakenError, Stopped
from dltrain.gpu.facts import cpu
from dltrain.gpu.rates import matmul_rate
from dltrain.launch import process_age
from dltrain.sharing import Kept, read_once
from dltrain.statistics import interval
from dltrain.tables import percent, say

FAST = "_speed"  # what the names of the shipped recipes end with that are made for it

Found = dict[str, Any]


def plan(asked: Sequence[str], overrides: Sequence[str], out: Path | None, console: Console) -> list[Path]:
    """The config files of the recipes; all are checked before any is run.

    asked: paths or shipped names; none: the shipped recipes made for speed whose data is here

    Raises ConfigError for a recipe that is wrong or named twice, DataError where its data is not here, RunTakenError
    where `out` holds one of it.
    """
    paths = [shipped.find(name) for name in asked or (name for name in shipped.names() if name.endswith(FAST))]
    planned: dict[str, Path] = {}
    for path in paths:
        config = configs.load(path, overrides)
        if not config.evaluate.test:
            raise ConfigError(f"{path}: evaluate.test: expected true, as bench reports the test accuracy")
        choose_device(config.train.device)
        if missing := _missing_data(config):
            if asked:
                raise DataError(f"{config.name}: {missing}: a download is no part of what is measured")
            say(console, f"{config.name} is left out: {missing}")
            continue
        if config.name in planned:
            raise ConfigError(f"{path}: {planned[config.name]} is called {config.name} too: give each its own name")
        if out and (out / config.name).exists():
            raise RunTakenError(f"{out / config.name}: is there already: give another --out")
        planned[config.name] = path
    if not planned:
        raise DataError("no recipe made for speed has its data here; `dltrain bench digits_mlp` needs no download")
    return list(planned.values())


def _missing_data(config: Config) -> str | None:
    """Why a recipe's data would have to be downloaded, and how; None where it would not."""
    source = config.data.source
    found = state(source.entry, data_root(config.data.root))
    if found.state not in (State.ABSENT, State.INCOMPLETE):
        return None
    return f"its data is {found.state} in {found.folder}; `dltrain data get {source.name}` fetches it"


def bench(
    paths: Sequence[Path],
    overrides: Sequence[str],
    *,
    seeds: int,
    target: float | None,
    out: Path | None,
    console: Console,
) -> tuple[Found, DltrainError | None]:
    """Runs each recipe with its seed and the `seeds - 1` after it: what was found, JSON-able, and what went wrong.

    target: test accuracy in 0..1, the time to which is reported
    out: where the runs are kept, as out/<recipe>/seed-<seed>; None: they are not

    A stop by a signal, or an error of a run, ends the bench.  A seed that diverges does not: it is left out of the
    numbers, and of what is returned it is the error.
    """
    start_up = process_age()
    recipes: list[Found] = []
    wrong: DltrainError | None = None
    with nullcontext(str(out)) if out else TemporaryDirectory() as folder:
        for path in paths:
            found, wrong = _recipe(path, overrides, Path(folder), start_up, seeds, target, console)
            recipes += [found] if found else []
            if wrong:
                break
    report = {
        "seeds": seeds,
        "target": target,
        "complete": wrong is None,
        "start_up_seconds": start_up,
        "out": str(out) if out else None,
        "recipes": recipes,
    }
    return report, wrong or _divergence(recipes, overrides)


def _recipe(
    path: Path,
    overrides: Sequence[str],
    root: Path,
    start_up: float,
    seeds: int,
    target: float | None,
    console: Console,
) -> tuple[Found | None, DltrainError | None]:
    """Runs one recipe: what was found, None where no seed came to its end, and what ended it early."""
    config = configs.load(path, overrides)  # again: the plugins in use are those of the config loaded last
    kept: Kept = {}
    config = read_once(config, kept)
    device, _ = choose_device(config.train.device)
    _forget_peak_memory(device)
    rows: list[Found] = []
    wrong: DltrainError | None = None
    try:
        for seed in range(config.seed, config.seed + seeds):
            seeded = config.model_copy(update={"seed": seed})
            before = 0.0 if rows else start_up
            rows.append(_run(seeded, root / config.name / f"seed-{seed}", before, target, console))
    except (Stopped, KeyboardInterrupt) as stop:
        number = stop.exit_code - 128 if isinstance(stop, Stopped) else signal.SIGINT
        text = f"stopped in seed {config.seed + len(rows)} of {config.name}: only the seeds before it are reported"
        wrong = Stopped(text, number)
    except DltrainError as error:
        wrong = error
    if not rows:
        return None, wrong
    peak = _peak_memory(device)
    environment = json.loads((root / config.name / f"seed-{config.seed}" / "environment.json").read_text("utf-8"))
    found = {"recipe": config.name, "config": str(path), **_together(rows, target), "peak_memory": peak}
    dtype = getattr(torch, environment["arithmetic"])
    (data,) = kept.values()
    found |= _arithmetic(config, data, found["images_per_second"], device, dtype)
    return {**found, "hardware": hardware(device), "environment": environment, "runs": rows}, wrong


def _run(config: Config, path: Path, before: float, target: float | None, console: Console) -> Found:
    """Trains and evaluates with one seed in the folder `path`: its scores and times.

    before: seconds from the start of the process to where the first run begins, which that one is charged with; else 0
    """
    start = perf_counter()
    row: Found = {"seed": config.seed, "cold": before > 0}
    with closing(rundir.RunFolder(path, resume=False)) as folder:
        try:
            summary = runs.start(config, folder, console, quiet=True)
        except DivergedError:
            say(console, f"{config.name}, seed {config.seed}: diverged")
            return {**row, "diverged": True}
    row |= {
        "diverged": False,
        "accuracy": summary["test"]["accuracy"],
        "seconds": before + perf_counter() - start,
        "training_seconds": summary["seconds"],
        "images_per_second": summary["images_per_second"],
        "val_seconds": None if target is None else val_seconds(path, target),
    }
    say(console, f"{config.name}, seed {config.seed}: {percent(row['accuracy'])} in {row['seconds']:.3g} s")
    return row


def val_seconds(run: Path, target: float) -> float | None:
    """Seconds of training to the end of the first epoch with this val accuracy; None where there is none."""
    seconds = 0.0
    for record in rundir.records(run):
        if record["kind"] == "epoch":
            seconds += float(record["seconds"])
            if record["val"] and record["val"]["accuracy"] >= target:
                return seconds
    return None


def _together(rows: Sequence[Found], target: float | None) -> Found:
    """What the seeds of a recipe come to, without those that diverged."""
    done = [row for row in rows if not row["diverged"]]
    timed = [row for row in done if not row["cold"]] or done  # the cold one's first steps load and compile
    images = sum(row["images_per_second"] * row["training_seconds"] for row in timed)
    return {
        "diverged": len(rows) - len(done),
        "accuracy": interval([row["accuracy"] for row in done]),
        **_cold_and_warm(done),
        "to_target": None if target is None else _to_target(done, target),
        "images_per_second": images / sum(row["training_seconds"] for row in timed) if timed else None,
    }


def _cold_and_warm(rows: Sequence[Found]) -> Found:
    """Seconds of the seed that was charged with the start of the process, and the mean of the others."""
    cold, warm = ([row["seconds"] for row in rows if row["cold"] == which] for which in (True, False))
    return {"cold_seconds": cold[0] if cold else None, "warm_seconds": fmean(warm) if warm else None}


def _to_target(rows: Sequence[Found], target: float) -> Found:
    """How many seeds reach the target, and in which time; on val, how many reach it in some epoch, and their mean."""
    reached = [row for row in rows if row["accuracy"] >= target]
    on_val = [row["val_seconds"] for row in rows if row["val_seconds"] is not None]
    return {
        "reached": len(reached),
        **_cold_and_warm(reached),
        "val_reached": len(on_val),
        "val_seconds": fmean(on_val) if on_val else None,
    }


def _arithmetic(
    config: Config, data: Dataset, images_per_second: float | None, device: torch.device, dtype: torch.dtype
) -> Found:
    """What an image costs, the FLOP/s that training comes to, and those of a large matrix product on this device."""
    model = build_model(config, data.shape, len(config.data.classes or data.classes))
    flops = count_flops(model, torch.zeros(1, *data.shape)).get_total_flops()
    largest = matmul_rate(device, dtype)
    achieved = None if images_per_second is None else FORWARD_PASSES * flops * images_per_second
    return {
        "flops_per_image": flops,
        "flops_per_second": achieved,
        "matmul_flops_per_second": largest,
        "share_of_matmul": None if achieved is None else achieved / largest,
    }


def _forget_peak_memory(device: torch.device) -> None:
    """Makes the peak that of what follows; outside Linux, where none can be forgotten, a process keeps its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform == "linux":
        with suppress(AttributeError):  # glibc alone has it, and keeps what was freed for later
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # of a /proc that may not be written the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> Found:
    """Bytes: of the process, all its libraries included, and on CUDA what torch has allocated on the device."""
    if sys.platform == "win32":
        resident = psutil.Process().memory_info().peak_wset
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        resident = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "process": resident,
        "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def hardware(device: torch.device) -> Found:
    """What computed: the device's name, its memory in bytes, and for a CPU the cores and threads used."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {"device": str(device), "name": card.name, "memory": card.total_memory}
    return {
        "device": str(device),
        "name": cpu()["name"],
        "memory": psutil.virtual_memory().total,
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
    }


def _divergence(recipes: Sequence[Found], overrides: Sequence[str]) -> DivergedError | None:
    """Names the seeds that diverged, and a command that shows where the first did."""
    diverged = [(recipe, row["seed"]) for recipe in recipes for row in recipe["runs"] if row["diverged"]]
    if not diverged:
        return None
    named = ", ".join(f"{recipe['recipe']} with seed {seed}" for recipe, seed in diverged)
    recipe, seed = diverged[0]
    settings = (part for each in (*overrides, f"seed={seed}") for part in ("--set", each))
    command = shlex.join(["dltrain", "train", recipe["config"], *settings])
    return DivergedError(f"{named} diverged: {command} says where")
