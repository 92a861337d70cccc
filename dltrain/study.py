"""A sweep in its storage: opened by each of its workers, and read once all trials are over."""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from dltrain import figures, rundir, runs
from dltrain.errors import ConfigError, RunTakenError
from dltrain.sweepfile import Plan, plain

Found = dict[str, Any]


def open_study(plan: Plan, folder: Path, url: str) -> optuna.Study:
    """The sweep in its storage, made if need be."""
    trained = next(folder.glob("trial-*/config.yaml"), None)
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
    }
    sqlite = url.startswith("sqlite")
    arguments = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    for attempt in itertools.count():
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments)
            if sqlite:
                sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
                storage.engine.dispose()
            study = optuna.create_study(
                storage=storage,
                study_name=plan.name,
                direction="maximize" if plan.maximised else "minimize",
                pruner=pruners[plan.pruner](),
                load_if_exists=True,
            )
            break
        except sqlalchemy.exc.ArgumentError as error:
            raise ConfigError(f"--storage {url}: {first_line(error)}; expected for example {_EXAMPLE}") from None
        except ImportError as error:
            driver = error.__cause__ or error
            raise ConfigError(
                f"--storage {shown_url(url)}: {driver}; its driver is not installed, e.g. {_EXAMPLE}"
            ) from None
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError):  # another worker makes the tables at this moment
            if attempt == 4:
                raise
            time.sleep(0.3)
    before = study.user_attrs.get("sweep")
    if before is None:
        study.set_user_attr("sweep", plan.plain())
    elif changes := runs.differences(before, json.loads(json.dumps(plan.plain()))):
        mend = "give it another name, or --out, for other trials"
        raise ConfigError(
            f"{plan.path}: {shown_url(url)} holds another sweep {plan.name} ({'; '.join(changes[:5])}): {mend}"
        )
    if trained and not study.get_trials(deepcopy=False):
        raise RunTakenError(
            f"{trained.parent}: holds a run already, which this sweep knows nothing of: give another --out"
        )
    return study


_EXAMPLE = "postgresql+psycopg://user:password@host/database (pip install 'psycopg[binary]')"


def _write_ahead(connection: Any, record: object) -> None:
    """Commits of SQLite then wait for no disk: a kill loses nothing, a power cut may lose the last trials' results."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def shown_url(url: str) -> str:
    return sqlalchemy.make_url(url).render_as_string(hide_password=True)


def first_line(error: BaseException) -> str:
    while isinstance(error, StorageInternalError) and error.__cause__:
        error = error.__cause__
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().partition("\n")[0]


def slot_of(trial: FrozenTrial) -> int:
    return int(trial.user_attrs["slot"])


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was ended by no fault of its settings."""
    return trial.state == TrialState.FAIL and "failure" not in trial.user_attrs


def results(plan: Plan, folder: Path, url: str, study: optuna.Study) -> Found:
    """Every trial, the best one's config as best.yaml, and pictures."""
    trials = sorted(
        (each for each in study.get_trials(deepcopy=False) if each.state in _STATES and not is_lost(each)), key=slot_of
    )
    rows = [_row(trial, plan) for trial in trials]
    states = {state: sum(row["state"] == state for row in rows) for state in _STATES.values()}
    finished = [row for row in rows if row["state"] == "finished"]
    if not finished:
        failure = next((f": trial {row['trial']}: {row['failure']}" for row in rows if row["failure"]), "")
        raise ConfigError(f"{plan.path}: no trial finished{failure}")
    best = (max if plan.maximised else min)(finished, key=lambda row: row["value"])
    found: Found = {
        "sweep": plan.name,
        "folder": str(folder),
        "storage": shown_url(url),
        "config": plan.base.name,
        "optimise": plan.optimise,
        "maximised": plan.maximised,
        "sampler": plan.sweep.sampler,
        "pruner": plan.pruner,
        "states": states,
        "best": best,
        "importances": _importances(study),
        "trials": rows,
        "best_config": str(folder / "best.yaml"),
        "pictures": [str(folder / "history.png"), str(folder / "importances.png")],
    }
    config = plan.config(trials[rows.index(best)].params)
    head = f"# {shlex.join(['dltrain', 'train', found['best_config']])}\n"
    head += f"# trial {best['trial']} of sweep {plan.name}: {plan.optimise} {best['value']:.6g}\n"
    rundir.write_atomically(folder / "best.yaml", (head + config.yaml()).encode())
    rundir.write_atomically(folder / "history.png", figures.sweep_history(found))
    rundir.write_atomically(folder / "importances.png", figures.sweep_importances(found))
    return found


_STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def _row(trial: FrozenTrial, plan: Plan) -> Found:
    return {
        "trial": slot_of(trial),
        "state": _STATES[trial.state],
        "value": trial.value,
        "settings": {key: plain(trial.params)[key] for key in plan.sweep.space if key in trial.params},
        "seconds": round(trial.duration.total_seconds(), 3) if trial.duration else None,
        "failure": trial.user_attrs.get("failure"),
        "run": trial.user_attrs["folder"],
    }


def _importances(study: optuna.Study) -> dict[str, float]:
    """How much of the spread of the results each setting explains (fANOVA, Hutter et al. 2014), the most first.

    Empty where the finished trials do not differ.
    """
    values = {trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
