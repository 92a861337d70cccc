"""A page on one or several runs: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import copy
import io
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from dltrain import __version__, overview, rundir, trained, yamlfile
from dltrain import config as configs
from dltrain.chart import Bar, Line, chart, thinned
from dltrain.compare import differences
from dltrain.data.dataset import Split
from dltrain.data.files import State, data_root, state
from dltrain.errors import CheckpointError, ConfigError, DataError, DivergedError
from dltrain.evaluate import Evaluation
from dltrain.figures import grey_or_colour
from dltrain.metrics import worst_mistakes
from dltrain.rundir import write_atomically
from dltrain.tables import percent, score
from dltrain.tasks import probabilities
from dltrain.text import shortened, shown

MISTAKES = 24  # shown
SIDE = 96  # pixels: the longest side that an image is embedded with, to keep a page of photographs small
LABELLED = 20  # classes up to which a confusion matrix is a table of numbers
CELLS = 4000  # that a larger one draws: some 100 bytes each
CONFUSIONS = 20  # pairs of classes that are listed beside a larger one
BINS = 15  # of confidence, as metrics.calibration_error has them
ROWS = 200  # of the table of epochs
NAME = 40  # characters of a class's name
SPLITS = ("test", "val", "train")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """What a run's folder tells without its weights.

    config: as config.yaml has it; essential: what of it is not at its default, None where the config is not valid here
    state: finished, running, stopped or failed, and of a failed run why; summary: None where it is not finished
    environment: as environment.json has it; None where there is none yet
    epochs, steps: the records of metrics.jsonl of these kinds; changes: `key: before -> after`, of a resumed run
    """

    path: Path
    config: dict[str, Any]
    essential: dict[str, Any] | None
    state: str
    reason: str | None
    summary: dict[str, Any] | None
    environment: dict[str, Any] | None
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    changes: list[str]


def make(
    paths: Sequence[Path],
    out: Path | None,
    device: str,
    root: str | None,
    plugins: Sequence[Path],
    note: Note,
) -> Path:
    """Writes the report on these runs' folders, and gives its file: RUN/report.html, of several runs ./report.html.

    Raises CheckpointError where a folder holds no run, OutputError where the file cannot be written.
    """
    runs = [read(path, plugins) for path in paths]
    judged = [judge(run, device, root, plugins, note) for run in runs]
    target = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    write_atomically(target, page(runs, judged).encode())
    return target


def read(path: Path, plugins: Sequence[Path] = ()) -> Record:
    """Raises CheckpointError where the folder holds no run, or its config cannot be read."""
    if not overview.is_run(path):
        raise CheckpointError(f"{path}: holds no run; expected a folder that `dltrain train` has made")
    config = overview.read_config(path)
    if not config:
        raise CheckpointError(f"{path}: its config.yaml is missing or not readable")
    stands = overview.row(path, path, time.time())
    summary = rundir.read_summary(path)
    records = list(rundir.records(path))
    return Record(
        path,
        config,
        essential(config, plugins),
        stands["state"],
        stands["reason"],
        summary,
        _environment(path / "environment.json"),
        [record for record in records if record.get("kind") == "epoch"],
        [record for record in records if record.get("kind") == "step"],
        [change for record in records if record.get("kind") == "changed" for change in record["settings"]],
    )


def _environment(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: {error}; `dltrain train --resume` writes it again") from None
    return found


def essential(plain: dict[str, Any], plugins: Sequence[Path] = ()) -> dict[str, Any] | None:
    """The settings without which the config would be another one; None where it is not valid here."""
    try:
        whole = configs.from_plain(plain, "", plugins=plugins).plain()
    except ConfigError:
        return None
    kept = copy.deepcopy(whole)

    def same() -> bool:
        try:
            return configs.from_plain(kept, "", plugins=plugins).plain() == whole
        except ConfigError:
            return False

    def shrink(node: Any) -> None:
        """Takes out each key that changes nothing, the outer ones first; less than a millisecond each."""
        if isinstance(node, list):
            for item in node:
                shrink(item)
        if isinstance(node, dict):
            before = dict(node)
            for key in before:
                del node[key]
                if not same():
                    restored = {each: node.get(each, before[each]) for each in before if each in node or each == key}
                    node.clear()
                    node.update(restored)  # in the order that it had
                    shrink(node[key])

    shrink(kept)
    return kept


def judge(run: Record, device: str, root: str | None, plugins: Sequence[Path], note: Note) -> dict[str, Any] | str:
    """What the chosen weights make of the test images, of a run that has not scored them of the val images.

    Else why that is not known.  Nothing is downloaded for it.
    """
    split = "test" if run.summary and run.summary.get("test") else "val"
    if split == "val" and not run.config.get("data", {}).get("val"):
        why = "is not scored on test images (evaluate.test)" if run.summary else "is not finished"
        return f"The run {why}, and holds no images out to be judged by: test images are for the end."
    try:
        model = trained.load(run.path, device, note, plugins)
        source = model.config.data.source
        where = state(source.entry, data_root(root or model.config.data.root))
        if where.state in (State.ABSENT, State.INCOMPLETE):
            raise DataError(f"{source.name} is not in {where.folder}: --data-root says where it is")
        note(f"{run.path}: evaluating on {split}")
        data = trained.data_of(model, root, note)
        report, evaluation = trained.judge_on(model, data, split)
        images = data.split(split)
        parameters = sum(each.numel() for each in model.model.parameters())
        found = {"split": split, "parameters": parameters, "images": len(images), "scores": evaluation.scores()}
        if model.task.classifies:
            found |= classifier(report, evaluation, images, model.classes)
        else:
            pictures = model.task.pictures(images, evaluation.outputs, model.classes)
            found["pictures"] = [(name, _data_uri(pixels)) for name, pixels in pictures.items()]
    except (CheckpointError, ConfigError, DataError, DivergedError) as error:
        note(f"{run.path}: is not evaluated again: {error}")
        return f"The weights could not be evaluated again: {error}"
    return found


def classifier(report: dict[str, Any], evaluation: Evaluation, split: Split, names: Sequence[str]) -> dict[str, Any]:
    """What is shown of a classifier beside its scores on a split.  report: as metrics.classification gives it"""
    names = [shortened(name, NAME) for name in names]
    matrix = torch.tensor(report["confusion_matrix"])
    shares = probabilities(evaluation.outputs)
    wrong = matrix.clone().fill_diagonal_(0)
    classes = [
        {**row, "class": name, "most": _most(counts, names)}
        for row, name, counts in zip(report["per_class"], names, wrong.tolist(), strict=True)
    ]
    worst = worst_mistakes(shares, evaluation.labels, MISTAKES)
    mistakes = [
        {
            "index": index,
            "true": names[label],
            "predicted": names[guess],
            "confidence": share,
            "image": _data_uri(image, SIDE),
        }
        for index, label, share, guess, image in zip(
            worst.tolist(),
            evaluation.labels[worst].tolist(),
            shares[worst].amax(1).tolist(),
            shares[worst].argmax(1).tolist(),
            grey_or_colour(split.images[worst]).permute(0, 2, 3, 1).numpy(),
            strict=True,
        )
    ]
    return {
        **{key: report[key] for key in ("top5", "calibration_error")},
        "names": names,
        "classes": classes,
        "wrong": int(wrong.sum()),
        "matrix": _cells(matrix, names) if len(names) <= LABELLED else None,
        "picture": _matrix_picture(matrix, names) if len(names) > LABELLED else None,
        "mistakes": mistakes,
        "calibration": _calibration(shares, evaluation.labels),
    }


def _most(counts: list[int], names: Sequence[str]) -> str:
    """The class that images of one class are most often wrongly taken for, and how many."""
    most = max(counts)
    return f"{names[counts.index(most)]} ({most:,})" if most else ""


def _tints(matrix: torch.Tensor) -> torch.Tensor:
    """float64 `[K, K]` in 0..1: the cube root of each count's share of its row, so that one in a thousand is seen."""
    return (matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)) ** (1 / 3)


def _cells(matrix: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a confusion matrix, a text and a tint in percent for each cell."""
    rows = zip(names, matrix.tolist(), _tints(matrix).tolist(), strict=True)
    return [
        {"name": name, "cells": [(count, round(100 * tint)) for count, tint in zip(counts, tints, strict=True)]}
        for name, counts, tints in rows
    ]


def _matrix_picture(matrix: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The largest counts of a confusion matrix as squares at (x, y), and its most frequent confusions."""
    count = len(names)
    order = matrix.flatten().argsort(descending=True, stable=True)
    order = order[matrix.flatten()[order] > 0]
    tints = _tints(matrix).flatten()
    cells = [
        {
            "x": at % count,
            "y": at // count,
            "tint": round(float(tints[at]), 2),
            "text": f"{names[at // count]} taken for {names[at % count]}: {int(matrix.flatten()[at]):,}",
        }
        for at in order[:CELLS].tolist()
    ]
    pairs = [
        {"true": names[at // count], "predicted": names[at % count], "count": int(matrix.flatten()[at])}
        for at in order.tolist()
        if at // count != at % count
    ]
    return {"size": count, "cells": cells, "left_out": len(order) - len(cells), "pairs": pairs[:CONFUSIONS]}


def reliability(shares: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """Images by the probability of their predicted class, in `bins` of equal width, those that hold any.

    shares: float32 `[N, K]`; labels: int64 `[N]`; gives low, high, images, confidence (mean) and accuracy of each bin;
    the weighted mean of |confidence - accuracy| is metrics.calibration_error (Guo et al. 2017, eq. 3)
    """
    confidence, predicted = shares.double().max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long() - 1
    found = []
    for at in index.unique().tolist():
        inside = index == at
        found.append(
            {
                "low": at / bins,
                "high": (at + 1) / bins,
                "images": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(right[inside].mean()),
            }
        )
    return found


def _calibration(shares: torch.Tensor, labels: torch.Tensor) -> dict[str, Any] | None:
    found = reliability(shares, labels)
    most = max(each["images"] for each in found)
    bars = [
        Bar(
            100 * each["low"],
            100 * each["high"],
            100 * each["accuracy"],
            f"{each['images']:,} images of {100 * each['low']:.0f} to {100 * each['high']:.0f} % confidence:"
            f" {100 * each['confidence']:.2f} % on average, {100 * each['accuracy']:.2f} % right",
            each["images"] / most,
        )
        for each in found
    ]
    ideal = Line("confidence = accuracy", [(0, 0), (100, 100)], dashed=True)
    return chart("accuracy", "confidence, %", [ideal], bars, unit="%", bounds=(0, 100))


def _data_uri(pixels: Any, side: int | None = None) -> str:
    """An image uint8 `[H, W, 1 or 3]` as a PNG within a URI, made smaller where its longest side exceeds `side`."""
    from PIL import Image

    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if side:
        picture.thumbnail((side, side))
    png = io.BytesIO()
    picture.save(png, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def page(runs: Sequence[Record], judged: Sequence[dict[str, Any] | str]) -> str:
    """The HTML of a report: runs as `read` gives them, and what `judge` says of each."""
    names = [str(run.config.get("name")) for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    labels = [shown(label) for label in labels]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"score": _score, "percent": percent, "words": words}
    return templates.get_template("report.html.jinja").render(
        runs=[_view(run, label, found) for run, label, found in zip(runs, labels, judged, strict=True)],
        colours=[{"name": label, "colour": number, "dashed": False} for number, label in enumerate(labels)],
        charts=list(_charts(runs, labels)),
        differences=_differences(runs) if len(runs) > 1 else [],
        columns=_score_columns(runs),
        version=__version__,
    )


def _score(value: float | None, key: str) -> str:
    return "–" if value is None else score(key, value)


def unit(key: str) -> tuple[float, str]:
    """What a score is multiplied by to be drawn, and the unit that it then has; as `tables.score` writes it."""
    if key.endswith("psnr"):
        return 1, "dB"
    return (100, "%") if key.endswith(("accuracy", "rate")) else (1, "")


def words(key: str) -> str:
    return key.replace("_", " ")


def _view(run: Record, label: str, found: dict[str, Any] | str) -> dict[str, Any]:
    """A run as the template shows it."""
    path, environment = shlex.quote(str(run.path)), run.environment or {}
    versions = environment.get("versions", {})
    packages = [("dltrain", versions.get("dltrain")), ("torch", str(environment.get("torch", "")).partition("+")[0])]
    plugins = "".join(f" --plugin {shlex.quote(str(each))}" for each in run.config.get("plugins") or [])
    asked = (run.config.get("train") or {}).get("epochs")
    return {
        "label": label,
        "path": str(run.path),
        "model": (run.config.get("model") or {}).get("name"),
        "data": (run.config.get("data") or {}).get("name"),
        "summary": run.summary,
        "scores": {split: run.summary[split] for split in SPLITS if run.summary.get(split)} if run.summary else {},
        "first": _first(run),
        "keys": list(dict.fromkeys(key for _, key in _score_columns([run]))),
        "state": run.state,
        "failure": run.reason,
        "asked": asked,
        "done": len(run.epochs),
        "resume": f"dltrain train --resume {path}{plugins}",
        "changes": run.changes,
        "judged": None if isinstance(found, str) else found,
        "reason": found if isinstance(found, str) else None,
        "differs": _differs(run, found) if not isinstance(found, str) else [],
        "epochs": _epoch_table(run),
        "essential": yamlfile.dump(run.essential) if run.essential is not None else None,
        "config": yamlfile.dump(run.config),
        "environment": {key: "–" if value is None else value for key, value in flat(environment).items()},
        "install": "pip install " + " ".join(f'"{name}=={version}"' for name, version in packages if version),
        "train": f"dltrain train {shlex.quote(str(run.path / 'config.yaml'))}",
        "eval": f"dltrain eval {path}{plugins}",
    }


def _first(run: Record) -> list[tuple[str, float, str]]:
    """(name, value, key) of the scores that count most, those with a unit first: of the end, else of the last epoch."""
    at, after = (
        (run.summary, "") if run.summary else (run.epochs[-1], f", epoch {len(run.epochs)}") if run.epochs else ({}, "")
    )
    split = next((split for split in SPLITS if at.get(split)), None)
    scores = at[split] if split else {}
    return [
        (f"{split} {words(key)}{after}", scores[key], key) for key in sorted(scores, key=lambda key: not unit(key)[1])
    ]


def _differs(run: Record, found: dict[str, Any]) -> list[str]:
    """Where evaluating again gave other scores than the run's end did."""
    before = (run.summary or {}).get(found["split"]) or {}
    after = found["scores"]
    shown = {key: (score(key, before[key]), score(key, after[key])) for key in before if key in after}
    return [f"{words(key)} {then} then, {now} now" for key, (then, now) in shown.items() if then != now]


def _epoch_table(run: Record) -> dict[str, Any]:
    """The scores of each epoch, of many every so many."""
    columns = [(split, key) for split in ("train", "val") for key in _keys(run.epochs, split)]
    rows = [
        {"epoch": record["epoch"], "scores": [(record[split] or {}).get(key) for split, key in columns]}
        for record in thinned(run.epochs, ROWS)
    ]
    return {"columns": columns, "rows": rows, "all": len(rows) == len(run.epochs)}


def _keys(epochs: Sequence[dict[str, Any]], split: str) -> list[str]:
    """The scores that a split has in any of the epochs."""
    return list(dict.fromkeys(key for record in epochs for key in record[split] or {}))


def _score_columns(runs: Sequence[Record]) -> list[tuple[str, str]]:
    """(split, score) for all that the runs' ends have."""
    summaries = [run.summary for run in runs if run.summary]
    found = [(split, key) for split in SPLITS for each in summaries for key in each.get(split) or {}]
    return list(dict.fromkeys(found))


def _charts(runs: Sequence[Record], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each score against epochs, train and val, of all runs in one chart; then the learning rate."""
    alone = len(runs) == 1
    keys = dict.fromkeys(key for run in runs for split in ("train", "val") for key in _keys(run.epochs, split))
    chosen = [run.summary["chosen_epoch"] if run.summary else None for run in runs]
    for key in keys:
        scale, of = unit(key)
        lines = [
            Line(
                split if alone else f"{label}, {split}",
                [
                    (record["epoch"], scale * record[split][key])
                    for record in run.epochs
                    if (record[split] or {}).get(key) is not None
                ],
                colour=int(split == "train") if alone else number,
                dashed=split == "train",
                marked=at if split == "val" else None,
            )
            for number, (run, label, at) in enumerate(zip(runs, labels, chosen, strict=True))
            for split in ("train", "val")
        ]
        mark = (chosen[0], f"epoch {chosen[0]} chosen") if alone and chosen[0] else None
        bounds = (0, 100) if key.endswith("accuracy") else None
        yield from _drawn(chart(words(key), "epoch", lines, unit=of, log=not of, bounds=bounds, mark=mark))
    rates = [
        Line("learning rate" if alone else label, _learning_rates(run), colour=0 if alone else number)
        for number, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]
    yield from _drawn(chart("learning rate", "epoch", rates))


def _drawn(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [found] if found else []


def _learning_rates(run: Record) -> list[tuple[float, float]]:
    """(epoch, learning rate) at each log line; nothing before the end of the first epoch, whose steps are unknown."""
    if not run.epochs:
        return []
    steps_per_epoch = run.epochs[-1]["step"] / run.epochs[-1]["epoch"]
    return [(record["step"] / steps_per_epoch, record["lr"]) for record in run.steps]


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names, `optim.lr`; a list is one setting."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _differences(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """The settings in which the runs differ, a text for each run; of lists, without what is at its default."""
    brief = [flat(run.essential or {}) for run in runs]
    return [
        {"key": key, "values": [_yaml(short.get(key, value)) for short, value in zip(brief, values, strict=True)]}
        for key, values in differences([run.config for run in runs]).items()
    ]


def _yaml(value: Any) -> str:
    if isinstance(value, list | dict) and value:
        return yamlfile.dump(value)
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
