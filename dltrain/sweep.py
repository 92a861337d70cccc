"""`dltrain sweep`: many runs of one config with different settings, by any number of workers on one storage.

A sweep has slots 0..trials-1.  A worker takes a slot that has no trial by creating one, in one transaction: of two
workers that do so at the same moment the storage numbers one later, and that one leaves the slot again.  A trial
whose worker is gone becomes a failed one without a reason, which leaves its slot to be taken again, with the same
settings, in the same run folder.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, TrialPruned, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console

from dltrain import runs
from dltrain.config import Config
from dltrain.device import choose_device
from dltrain.errors import (
    ConfigError,
    DeviceError,
    DivergedError,
    OutputError,
    RunTakenError,
    Stopped,
)
from dltrain.rundir import RunFolder
from dltrain.sharing import Kept, read_once
from dltrain.stopping import stop_at_signals
from dltrain.study import Found, first_line, is_lost, open_study, results, shown_url, slot_of
from dltrain.sweepfile import LEAN, Plan, Point, Range, choices, plain
from dltrain.tables import say, score

BEAT = 10.0  # seconds between two signs of life of a trial
WAIT = 0.3  # seconds between two looks at trials of other workers
GRACE = 60.0  # seconds without one after which a worker on another machine is taken to be gone
WARM_UP = 0.2  # of a trial's epochs, before which its results say little of where it will end
REPORTS = 10  # at most, of a trial to the pruner: one takes 4 ms, an epoch on small data not much longer
KILLED = 3  # times a trial's worker may be killed before the trial is taken to be what kills it

_ELSEWHERE = ("train.device:", "data.root:", "plugins:")  # may differ between two machines


def sweep(
    plan: Plan, folder: Path, url: str | None, device: str | None, console: Console, quiet: bool, go_on: str
) -> Found:
    """Works on the sweep until all its trials are over, and gives what was found, JSON-able.

    folder: where this worker's runs and the results go
    url: of the storage that the workers share; default: SQLite, in the folder
    device: of this worker; default: the config's
    go_on: the command that goes on with the sweep

    Raises ConfigError where the storage holds another sweep of this name, or where no trial came to its end;
    RunTakenError where the folder holds other runs, OutputError where the storage cannot be reached, and Stopped on
    SIGINT or SIGTERM.
    """
    choose_device(device or plan.base.train.device)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror} (errno {error.errno})") from error
    url = url or sqlalchemy.URL.create("sqlite", database=str(folder.absolute() / "sweep.db")).render_as_string()
    try:
        with stop_at_signals():
            worker = _Worker(plan, folder, open_study(plan, folder, url), device, console, quiet)
            while worker.work():
                pass
            return results(plan, folder, url, worker.study)
    except Stopped as stopped:
        raise Stopped(f"stopped; go on with: {go_on}", stopped.exit_code - 128) from None
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise OutputError(f"{shown_url(url)}: {first_line(error)}; once it can be used: {go_on}") from error


class _TrialFolder(RunFolder):
    """A run's folder that shows each epoch's record to `watch`, once it is written."""

    watch: Callable[[dict[str, Any]], None] | None = None

    def append(self, record: dict[str, Any]) -> None:
        super().append(record)
        if self.watch and record["kind"] == "epoch":
            self.watch(record)


@dataclass
class _Worker:
    """One process of a sweep."""

    plan: Plan
    folder: Path
    study: optuna.Study
    device: str | None
    console: Console
    quiet: bool
    kept: Kept = field(default_factory=dict)
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)  # number -> its last sign of life, and when
    waits: bool = False

    def __post_init__(self) -> None:
        self.storage = self.study._storage
        self.study_id = self.study._study_id

    def work(self) -> bool:
        """Ends what dead workers left, or runs one trial, or waits a little for others; False where all are over."""
        trials = self.study.get_trials(deepcopy=False)
        if gone := [each for each in trials if each.state == TrialState.RUNNING and self.is_gone(each)]:
            self.bury(gone)
            return True
        taken = {slot_of(trial) for trial in trials if not is_lost(trial)}
        for slot in range(self.plan.trials):
            if slot in taken:
                continue
            try:
                folder = _TrialFolder(self.folder / f"trial-{slot:05d}", resume=True)
            except RunTakenError:  # another worker here is about to take this slot
                continue
            with closing(folder):
                before = [trial for trial in trials if slot_of(trial) == slot]
                trial_id = self.create(slot, before[-1] if before else None)
                if trial_id is not None:
                    self.run(slot, trial_id, folder)
            return True
        running = [slot_of(trial) for trial in trials if trial.state == TrialState.RUNNING]
        if not running and len(taken) >= self.plan.trials:
            return False
        if running and not self.waits and len(taken) >= self.plan.trials:
            self.waits = True
            self.say(f"waiting for other workers, which run trial {', '.join(map(str, sorted(running)))}")
        time.sleep(WAIT)
        return True

    def bury(self, gone: list[FrozenTrial]) -> None:
        """Ends trials whose worker is gone."""
        for trial in gone:
            trials = self.study.get_trials(deepcopy=False)
            killed = 1 + sum(slot_of(each) == slot_of(trial) and "killed" in each.user_attrs for each in trials)
            facts: Found = {"killed": True}
            if killed == KILLED:  # it may well be the trial that kills it
                facts["failure"] = f"its worker was killed {KILLED} times"
            with suppress(UpdateFinishedTrialError):  # another worker was faster
                for key, value in facts.items():
                    self.storage.set_trial_user_attr(trial._trial_id, key, value)
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                self.say(f"trial {slot_of(trial)}: its worker is gone{'' if killed == KILLED else '; it is run again'}")

    def is_gone(self, trial: FrozenTrial) -> bool:
        """On this machine the lock of the run's folder says so at once, elsewhere missing signs of life do."""
        attrs = trial.user_attrs
        lock = Path(attrs["folder"]) / ".lock"
        if attrs["host"] == socket.gethostname() and lock.exists():
            try:
                FileLock(lock).acquire(blocking=False).lock.release()
            except (Timeout, OSError):  # the latter: a folder that is taken back at this moment
                return False
            return True
        beat, since = self.seen.get(trial.number, (-1, 0.0))
        if beat != attrs["beat"]:
            self.seen[trial.number] = attrs["beat"], time.monotonic()
            return False
        return time.monotonic() - since > GRACE

    def create(self, slot: int, before: FrozenTrial | None) -> int | None:
        """A running trial in a slot, with the settings and results that it had before; None where it is taken."""
        point: Point = self.plan.point(slot) if self.plan.sweep.sampler == "grid" else {}
        distributions = self.distributions()
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=before.params if before else point,
            distributions=before.distributions if before else {key: distributions[key] for key in point},
            intermediate_values=before.intermediate_values if before else {},
            user_attrs={
                "slot": slot,
                "host": socket.gethostname(),
                "folder": str((self.folder / f"trial-{slot:05d}").absolute()),
                "beat": 0,
            },
        )
        trial_id = self.storage.create_new_trial(self.study_id, template)
        here = [trial for trial in self.study.get_trials(deepcopy=False) if slot_of(trial) == slot]
        if next(trial for trial in here if not is_lost(trial))._trial_id == trial_id:
            return trial_id
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        return None

    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: _distribution(space) for key, space in self.plan.sweep.space.items()}

    def run(self, slot: int, trial_id: int, folder: _TrialFolder) -> None:
        """Trains a trial's run and tells the storage how it ended."""
        # of the slot alone: the same settings whichever worker draws them, and however often
        seed = random.Random(f"{self.plan.sweep.seed} {slot}").getrandbits(32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is new in Optuna
            self.study.sampler = (
                optuna.samplers.TPESampler(seed=seed, constant_liar=True)
                if self.plan.sweep.sampler == "tpe"
                else optuna.samplers.RandomSampler(seed=seed)
            )
        start = time.perf_counter()
        trial = Trial(self.study, trial_id)
        try:
            with self.beating(trial_id):
                state, value, text = self.outcome(trial, folder)
            self.study.tell(trial, value, state)
        except UpdateFinishedTrialError:
            self.say(f"trial {slot}: another worker took this one to be gone, and runs it again")
            return
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        settings = ", ".join(f"{key} {_short(each)}" for key, each in plain(trial.params).items())
        self.say(f"trial {slot}: {text}; {settings}; {time.perf_counter() - start:.3g} s")

    def outcome(self, trial: Trial, folder: _TrialFolder) -> tuple[TrialState, float | None, str]:
        """Trains a trial's run: how it ended, its score where it came to its end, and both in words."""
        try:
            point = {key: _suggest(trial, key, each) for key, each in self.distributions().items()}
            device = [f"train.device={self.device}"] if self.device else []
            value = self.train(trial, self.plan.config(point, *LEAN, *device), folder)
        except TrialPruned:
            return TrialState.PRUNED, None, f"pruned after epoch {trial.user_attrs['epochs']}"
        except (ConfigError, DeviceError, DivergedError) as error:  # by its settings: another may do better
            reason = str(error).partition("; then: ")[0]
            trial.set_user_attr("failure", reason)
            return TrialState.FAIL, None, f"failed: {reason}"
        return TrialState.COMPLETE, value, f"{self.plan.optimise} {score(self.plan.optimise, value)}"

    def train(self, trial: Trial, config: Config, folder: _TrialFolder) -> float:
        """The val score that the sweep optimises, of the weights that the run keeps."""
        name = self.plan.optimise.removeprefix("val_")
        reported = set(trial.storage.get_trial(trial._trial_id).intermediate_values)

        def watch(record: Mapping[str, Any]) -> None:
            epoch, epochs = record["epoch"], config.train.epochs
            if self.plan.pruner == "none" or epoch == epochs or epoch % math.ceil(epochs / REPORTS):
                return
            if epoch not in reported:
                trial.report(record["val"][name], epoch)
            if epoch >= WARM_UP * epochs and trial.should_prune():
                trial.set_user_attr("epochs", epoch)
                raise TrialPruned

        folder.watch = watch
        shared = read_once(config, self.kept)
        if (folder.path / "config.yaml").exists():
            summary = runs.resume(
                folder,
                lambda before: self.same(before, shared, folder.path),
                self.console,
                quiet=True,
                allow_inexact=True,  # on as many threads as this worker has
                plugins=[Path(path) for path in config.plugins],
            )
        else:
            summary = runs.start(shared, folder, self.console, quiet=True)
        return float(summary["val"][name])

    def same(self, before: dict[str, Any], config: Config, path: Path) -> Config:
        changes = [each for each in runs.differences(before, config.plain()) if not each.startswith(_ELSEWHERE)]
        if changes:
            raise RunTakenError(f"{path}: holds another run ({'; '.join(changes[:5])}): give the sweep another --out")
        return config

    @contextmanager
    def beating(self, trial_id: int) -> Iterator[None]:
        """Shows other workers that this trial's is alive."""
        over = threading.Event()

        def beat() -> None:
            for count in itertools.count(1):
                if over.wait(BEAT):
                    return
                try:
                    self.storage.set_trial_user_attr(trial_id, "beat", count)
                except UpdateFinishedTrialError:
                    return
                except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
                    continue  # where the storage stays away, what the trial itself has to tell it says so

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def say(self, text: str) -> None:
        if not self.quiet:
            say(self.console, text)


def _distribution(space: Range | list[Any]) -> BaseDistribution:
    if isinstance(space, list):
        return CategoricalDistribution(choices(space))
    if space.whole:
        return IntDistribution(int(space.low), int(space.last), log=space.log, step=int(space.spacing or 1))
    return FloatDistribution(space.low, space.last, log=space.log, step=space.spacing)


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(key, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case FloatDistribution():
            return trial.suggest_float(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    raise TypeError(distribution)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
