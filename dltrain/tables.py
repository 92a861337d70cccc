"""Tables for the terminal."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dltrain.text import shortened, shown


def say(console: Console, text: str) -> None:
    """Prints text as it is; a terminal gets it wrapped between words, a file or a pipe in one line."""
    console.print(text, soft_wrap=not console.is_terminal, markup=False, highlight=False)


def warn(text: str) -> None:
    """One line on stderr, also where a run is to be quiet; a stderr that cannot be written stops nothing."""
    with contextlib.suppress(OSError):
        print(f"warning: {text}", file=sys.stderr)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def score(name: str, value: float) -> str:
    """As people read it, by the end of its name: accuracies and rates in per cent, psnr in dB, others as they are."""
    if name.endswith("psnr"):
        return f"{value:.2f} dB"
    return percent(value) if name.endswith(("accuracy", "rate")) else f"{value:.4f}"


def _table(*columns: str, title: str | None = None) -> Table:
    """Numbers stand to the right: every column but the first, and those whose name ends with a space."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column.strip(), justify="left" if index == 0 or column.endswith(" ") else "right", overflow="fold"
        )
    return table


def result(summary: dict[str, Any], console: Console) -> None:
    """What a run came to, where it is, and what to type next."""
    views = summary.get("views")
    names = list(next((summary[split] for split in ("test", "val", "train") if summary[split]), {}))
    titles = {"plain_accuracy": "without views"}
    table = _table("split", *(titles.get(name, name.replace("_", " ")) for name in names))
    for split in ("train", "val", "test"):
        if scores := summary[split]:
            plain = {"plain_accuracy": scores["accuracy"]} if views else {}
            table.add_row(split, *(score(name, {**plain, **scores}[name]) for name in names))
    if names:
        console.print(table)
    if views:
        say(console, f"views: {views} of each image, averaged; training images as they are")
    chosen = (
        "the last epoch's"
        if summary["chosen_by"] == "last"
        else f"epoch {summary['chosen_epoch']}'s, by {summary['chosen_by']}"
    )
    say(console, f"weights: {chosen}, of {summary['epochs']} epochs")
    say(
        console,
        f"time: {summary['seconds']:.1f} s training, {summary['seconds_per_epoch']:.3g} s an epoch, "
        f"{summary['images_per_second']:,.0f} images/s",
    )
    if not summary["data_verified"]:
        say(console, "data: not verified to be the published files")
    say(console, f"run: {summary['run']}")
    run = shlex.quote(summary["run"])
    say(console, f"next: dltrain eval {run}")
    say(
        console,
        "      tensorboard --logdir runs" if summary["run"].startswith("runs") else f"      tensorboard --logdir {run}",
    )


def learning_rate(found: dict[str, Any], console: Console) -> None:
    """What a range test found, and what to type next."""
    say(console, f"steepest fall of the loss: at lr {found['steepest']:.2g}")
    say(console, f"lowest loss: at lr {found['lowest']:.2g}, and beyond it training diverges")
    say(console, f"suggestion: a tenth of that, --set optim.lr={found['suggestion']:.2g}")
    say(console, f"configured: {found['configured']:.2g}")
    say(console, f"figure: {found['figure']}")


def resume_proof(found: dict[str, Any], console: Console) -> None:
    """The digests of two runs' parts, and whether they are the same."""
    table = _table("part", "straight ", "killed and resumed ", "first difference ")
    for row in found["parts"]:
        table.add_row(row["part"], row["straight"][:16], row["killed"][:16], row["first_difference"] or "none")
    console.print(table)
    at = ", ".join(f"{kill['step']}{' in a save' if kill['moment'] == 'save' else ''}" for kill in found["kills"])
    say(console, f"{found['steps']:,} steps; killed after step {at}")
    first = [f"{row['part']} at {row['first_difference']}" for row in found["parts"] if row["first_difference"]]
    say(console, f"different: first {', '.join(first)}" if first else "the same, to the last bit")


def evaluation(scores: dict[str, Any], console: Console) -> None:
    """A model's scores: the whole, each class, and where the classes go where there is room for it."""
    say(console, f"{scores['checkpoint']}, step {scores['step']:,}, weights chosen by {scores['chosen_by']}")
    unverified = "" if scores["data_verified"] else " (not verified to be the published files)"
    views = f", {scores['views']} views of each" if "views" in scores else ""
    say(console, f"{scores['data']} {scores['split']}: {scores['images']:,} images{views}{unverified}")
    whole = _table("score", "value")
    if "confusion_matrix" not in scores:  # no classifier's
        for name in ("accuracy", "psnr", "character_error_rate", "loss"):
            if name in scores:
                whole.add_row(name.replace("_", " "), score(name, scores[name]))
        whole.add_row("images/s", f"{scores['images_per_second']:,.0f}")
        console.print(whole)
        return
    whole.add_row("accuracy (top 1)", percent(scores["accuracy"]))
    if scores["top5"] is not None:
        whole.add_row("accuracy (top 5)", percent(scores["top5"]))
    if "views" in scores:
        whole.add_row("accuracy without views", percent(scores["plain_accuracy"]))
    whole.add_row("loss", f"{scores['loss']:.4f}")
    whole.add_row("calibration error", percent(scores["calibration_error"]))
    whole.add_row("images/s", f"{scores['images_per_second']:,.0f}")
    console.print(whole)
    narrow = console.width < 72
    if narrow:
        say(console, "precision, recall, type I and type II error, in %")
    wide = ["images", "precision", "recall", "type I error", "type II error"]
    classes = _table("class", *(["prec.", "recall", "I", "II"] if narrow else wide))
    for row in scores["per_class"]:
        values = [row[key] for key in ("precision", "recall", "type_1_error", "type_2_error")]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values] if narrow else map(percent, values)
        classes.add_row(Text(shown(row["class"])), *([] if narrow else [f"{row['images']:,}"]), *cells)
    console.print(classes)
    matrix = scores["confusion_matrix"]
    widest = max(len(str(count)) for row in matrix for count in row)
    if len(matrix) * (widest + 2) + 14 <= console.width:
        table = _table("true \\ predicted", *(str(number) for number in range(len(matrix))))
        for number, (row, counts) in enumerate(zip(scores["per_class"], matrix, strict=True)):
            name = row["class"] if row["class"] == str(number) else f"{number} {row['class']}"
            table.add_row(Text(shown(name)), *(str(count) if count else "·" for count in counts))
        console.print(table)
    else:
        say(console, "confusion matrix: --json has it; TensorBoard shows it")
    if "positive" in scores:
        one_class(scores["positive"], console)
    if "curves" in scores:
        curves(scores["curves"], scores["split"], console)
    if scores.get("picture"):
        say(console, f"picture: {scores['picture']}")


def one_class(found: dict[str, Any], console: Console) -> None:
    """Counts and rates of one class against the rest at a threshold, a column for each split."""
    say(console, f"{shown(found['class'])} against the rest: positive from a probability of {found['threshold']!r} on")
    if chosen := found["chosen"]:
        rate = _RATES[chosen["rate"]]
        wanted = f"the {chosen['which']} with a {rate} of {chosen['reach']} {100 * chosen['wanted']:g} %"
        say(console, f"threshold: chosen on {chosen['split']}, {wanted} there")
    splits = found["splits"]
    table = _table("", *splits)
    for key, name in _COUNTS.items():
        table.add_row(name, *(f"{scores[key]:,}" for scores in splits.values()))
    table.add_section()
    for key, name in _RATES.items():
        table.add_row(name, *(percent(scores[key]) for scores in splits.values()))
    table.add_section()
    for key, name in _AREAS.items():
        table.add_row(name, *(_area(scores[key]) for scores in splits.values()))
    console.print(table)


_COUNTS = {
    "images": "images",
    "true_positives": "true positives",
    "false_positives": "false positives",
    "false_negatives": "false negatives",
    "true_negatives": "true negatives",
}
_RATES = {
    "type_1_error": "type I error",
    "type_2_error": "type II error",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "accuracy": "accuracy",
}
_AREAS = {"auc": "AUC", "average_precision": "average precision"}


def _area(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def curves(rows: Sequence[dict[str, Any]], split: str, console: Console) -> None:
    """How well each class is told from the rest over all thresholds."""
    say(console, f"each class against the rest on {split}, over all thresholds")
    table = _table("class", *_AREAS.values())
    for row in rows:
        table.add_row(Text(shown(row["class"])), *(_area(row[key]) for key in _AREAS))
    console.print(table)


def predictions(found: dict[str, Any], console: Console) -> None:
    """What a model makes of each image; a narrow terminal has room for the likeliest class alone."""
    views = f", {found['views']} views of each image" if "views" in found else ""
    say(console, f"{found['checkpoint']}, step {found['step']:,}, weights chosen by {found['chosen_by']}{views}")
    others = console.width >= 72 and len(found["images"][0]["top"]) > 1
    table = _table("image", "predicted ", "probability", *(["then "] if others else []))
    for row in found["images"]:
        likely, *then = [(shown(each["class"]), percent(each["probability"])) for each in row["top"]]
        rest = [", ".join(f"{name} {share}" for name, share in then)] if others else []
        table.add_row(*map(Text, (shown(row["file"]), *likely, *rest)))  # Text: a "[…]" in a name is no markup
    console.print(table)
    if found["picture"]:
        say(console, f"picture: {found['picture']}")


def dry_run(found: dict[str, Any], console: Console) -> None:
    """The layers, what they cost, and what the first loss says."""
    # of 80 columns the others leave 22 to the names; where these are longer, what most layers have is said once
    narrow = console.width < 58 + max((len(row["name"]) for row in found["layers"]), default=0)
    table = _table("layer", "output ", "parameters", "MFLOPs", *([] if narrow else ["dtype ", "layout "]))
    for row in found["layers"]:
        shape = "x".join(map(str, row["output"])) if row["output"] else "-"
        flops = f"{row['flops'] / 1e6:.3f}" if row["flops"] else ""
        table.add_row(
            row["name"] if "_" in row["name"] else f"{row['name']} {row['kind']}",
            shape,
            f"{row['parameters']:,}",
            flops,
            *([] if narrow else [row["dtype"] or "-", row["layout"] or "-"]),
        )
    table.add_section()
    table.add_row("total", "", f"{found['parameters']:,}", f"{found['flops_per_image'] / 1e6:.3f}")
    console.print(table)
    for key in ("device", "dtype", "layout") if narrow else ("device",):
        say(console, f"{key}: {_by_value(found['layers'], key)}")
    memory = ", ".join(f"{name} {bytes_ / 1e6:,.1f}" for name, bytes_ in found["memory"].items())
    say(console, f"estimated memory (MB): {memory}")
    verdict = (
        "as expected of a model that knows nothing"
        if found["first_loss_ok"]
        else "look at initialisation and normalisation"
    )
    say(
        console,
        f"first loss: {found['first_loss']:.4f}; outputs of zero would give {found['expected_loss']:.4f}: {verdict}",
    )


def gradients(found: dict[str, Any], console: Console) -> None:
    """Analytic against numeric gradients: each parameter, and the layers that are not right."""
    narrow = console.width < 72
    table = _table("parameter", *([] if narrow else ["tried", "at a kink", "gradient"]), "error", "")
    for row in [*found["parameters"], *(layer for layer in found["layers"] if layer["name"] in found["wrong"])]:
        name = row["name"] if row["kind"] == "parameter" else f"input of {row['name']}"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        cells = [] if narrow else [str(row["tried"]), str(row["at_kink"] or ""), f"{row['gradient']:.1e}"]
        table.add_row(
            Text(shortened(name, max(12, console.width - (20 if narrow else 50)))),
            *cells,
            error,
            "-" if row["error"] is None else "ok" if row["ok"] else "wrong",
        )
    console.print(table)
    rows = found["parameters"] + found["layers"]
    tried, kinks = (sum(row[key] for row in rows) for key in ("tried", "at_kink"))
    at_kink = f", {kinks} of them at a kink, where no difference can tell" if kinks else ""
    say(console, f"tried: {tried:,} numbers of {len(rows)} weights and layers' inputs{at_kink}")
    kinds = {row["name"]: row["kind"] for row in rows}
    wrong = ", ".join(f"{name} ({kinds[name]})" for name in found["wrong"])
    say(console, "analytic and numeric gradients agree" if found["ok"] else f"the backward pass is wrong: {wrong}")


def _by_value(layers: Sequence[dict[str, Any]], key: str) -> str:
    """`bf16; fp32: 4_linear`: what most layers have, and which ones have something else."""
    names: dict[str, list[str]] = {}
    for row in layers:
        names.setdefault(row[key] or "-", []).append(row["name"])
    most, *others = sorted(names, key=lambda value: -len(names[value]))
    return "; ".join([most, *(f"{value}: {', '.join(names[value])}" for value in others)])


def profile(found: dict[str, Any], console: Console) -> None:
    """Where a step's time goes, how much work that is, and where the trace is."""
    table = _table("part of a step", "ms", "share")
    for row in found["parts"]:
        table.add_row(row["name"], f"{1000 * row['seconds']:.3f}", f"{100 * row['share']:.1f} %")
    table.add_section()
    table.add_row("step", f"{1000 * found['step_seconds']:.3f}", "100.0 %")
    console.print(table)
    narrow = console.width < 72
    for kind in ("operator", "kernel"):
        table = _table(kind, *([] if narrow else ["calls"]), "ms", "share")
        for row in found[f"{kind}s"]:
            name = Text(shortened(row["name"].removeprefix("aten::"), max(12, console.width - (21 if narrow else 30))))
            calls = f"{row['calls']:,.4g}" if row["calls"] else ""
            cells = [] if narrow else [calls]
            table.add_row(name, *cells, f"{1000 * row['seconds']:.3f}", f"{100 * row['share']:.1f} %")
        if table.rows:
            console.print(table)
    slower = found["profiled_step_seconds"] / found["step_seconds"]
    say(console, f"parts: a step's mean over {found['timed_steps']} steps")
    say(console, f"operators: over {found['profiled_steps']} more, each {slower:.2f} times as long under the profiler")
    say(
        console,
        f"speed: {found['images_per_step']:,} images a step, {found['images_per_second']:,.0f} images/s, "
        f"{found['flops_per_second'] / 1e12:.3g} TFLOP/s (3 x {found['flops_per_image'] / 1e6:,.3g} MFLOPs an image)",
    )
    say(console, f"trace: {found['trace']}")
    say(console, "open it in https://ui.perfetto.dev, chrome://tracing or TensorBoard; the run itself was not kept")


def bench(found: dict[str, Any], console: Console) -> None:
    """What recipes came to, a column each, as many beside each other as there is room for."""
    room = max(1, (console.width - 20) // 18)
    for at in range(0, len(found["recipes"]), room):
        recipes = found["recipes"][at : at + room]
        table = _table("", *(shown(recipe["recipe"]) for recipe in recipes))
        columns = [_bench_column(recipe, found["target"]) for recipe in recipes]
        for label in columns[0]:
            table.add_row(label, *(column[label] for column in columns))
        console.print(table)
    say(console, "accuracy: of the test split, with the 95 % interval of its mean over the seeds")
    say(console, f"cold: the first seed, with {found['start_up_seconds']:.3g} s of start-up; warm: the others, each")
    said = []
    for recipe in found["recipes"]:
        hardware, environment = recipe["hardware"], recipe["environment"]
        count = hardware.get("threads")
        threads = f", {count} thread{'s' * (count != 1)}" if count else ""
        memory = f"{hardware['memory'] / 1e9:,.0f} GB"
        line = f"{hardware['device']}: {hardware['name']}{threads}, {memory}; torch {environment['torch']}"
        said += [line] if line not in said else []
    for line in said:
        say(console, line)
    if found["out"]:
        say(console, f"runs: {found['out']}")
    if found["picture"]:
        say(console, f"picture: {found['picture']}")


def _bench_column(recipe: dict[str, Any], target: float | None) -> dict[str, str]:
    accuracy = recipe["accuracy"] or {"mean": None, "std": None, "half_width": None}
    half_width = "" if accuracy["half_width"] is None else f" ± {100 * accuracy['half_width']:.2f}"
    diverged = f", {recipe['diverged']} diverged" if recipe["diverged"] else ""
    column = {
        "seeds": f"{len(recipe['runs'])}{diverged}",
        "accuracy": percent(accuracy["mean"]).replace(" %", f"{half_width} %"),
        "std": percent(accuracy["std"]),
        "seconds, cold": _digits(recipe["cold_seconds"]),
        "seconds, warm": _digits(recipe["warm_seconds"]),
    }
    if target is not None:
        reaching, goal = recipe["to_target"], f"{100 * target:g} %"
        column[f"seeds with {goal}"] = f"{reaching['reached']} of {len(recipe['runs'])}"
        column[f"{goal}, cold s"] = _digits(reaching["cold_seconds"])
        column[f"{goal}, warm s"] = _digits(reaching["warm_seconds"])
        column[f"{goal} on val, s"] = _digits(reaching["val_seconds"])
    rate, peak = recipe["flops_per_second"], recipe["peak_memory"]
    column["images/s"] = "-" if recipe["images_per_second"] is None else f"{recipe['images_per_second']:,.0f}"
    column["MFLOP an image"] = _digits(recipe["flops_per_image"] / 1e6)
    column["TFLOP/s"] = "-" if rate is None else _digits(rate / 1e12)
    column["of matrix product"] = "-" if rate is None else f"{100 * recipe['share_of_matmul']:.1f} %"
    column["precision"] = recipe["environment"]["precision"].partition(" ")[0]
    column["peak memory"] = f"{(peak['device'] or peak['process']) / 1e9:.2f} GB"
    return column


def vary(found: dict[str, Any], console: Console) -> None:
    """What a config came to with each value, and whether all began alike; a narrow terminal has room for the most."""
    narrow = console.width < 72
    split, keys = found["score_split"], found["keys"]
    splits = [split] if narrow or split == "test" else ["val", "test"]
    names = [key.rpartition(".")[2] if console.width < 100 else key for key in keys]
    counts = [] if narrow else ["epochs", "steps"]
    seconds = [] if narrow and len(keys) > 1 else ["s" if narrow else "seconds"]
    scores = ["score"] if narrow else [f"{each} {found['score']}" for each in splits]
    table = _table(*(f"{name} " for name in names), *counts, *seconds, "loss" if narrow else "train loss", *scores)
    for row in found["runs"]:
        cells = [f"{row[each]:,}" for each in counts]
        if seconds:
            took = row["seconds"]
            cells.append(f"{took:.{2 if took < 10 else 0}f}" if narrow else _digits(took))
        loss = "-" if row["train_loss"] is None else f"{row['train_loss']:.{2 if narrow else 4}g}"
        cells.append("diverged" if row["diverged"] else loss)
        for each in splits:
            value = (row[each] or {}).get(found["score"])
            cells.append("-" if value is None else score(found["score"], value))
        table.add_row(*(Text(shortened(value, 10 if narrow else 40)) for value in row["values"].values()), *cells)
    console.print(table)
    if narrow:
        say(console, f"loss: training, of the last epoch; score: {split} {found['score']}")
    left_out: dict[str, list[str]] = {}
    for row in found["runs"]:
        for key, size in row["left_out"].items():
            left_out.setdefault(f"{key}={size}", []).append(row["values"]["descent.variant"])
    for setting, variants in left_out.items():
        say(console, f"{setting}: left out for {' and '.join(dict.fromkeys(variants))}, to which it does not belong")
    say(console, f"initial weights: {_BEGINNINGS[found['initial_weights']]}")
    say(console, f"figure: {found['figure']}")
    say(console, f"runs: {found['out']}")


_BEGINNINGS = {
    "same": "the same in every run",
    "other shapes": "not the same, as the values change the shapes of the model's parameters",
    "other numbers": "not the same, as the values change how the parameters are drawn",
}


def _digits(value: float | None) -> str:
    """Three of them, or all before the point."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def runs(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Where runs stand, the last written at the end; a narrow terminal has room for the state, the best and the age."""
    narrow, wide = console.width < 72, console.width >= 110
    extra = ["config ", "seed"] if wide else ["seed"]
    table = _table("run", *([] if narrow else extra), "state ", *([] if narrow else ["epochs"]), "best", "age")
    for row in rows:
        counts = (row[key] for key in ("seed", "epochs", "of_epochs"))
        seed, epochs, of_epochs = ("-" if count is None else str(count) for count in counts)
        values = [shown(row["config"] or "-"), seed] if wide else [seed]
        best = row["best"]
        if best:
            split = "" if narrow and best["split"] == "val" else f"{best['split']} "
            best = f"{split}{score(best['score'], best['value'])}"
        cells = [row["state"], *([] if narrow else [f"{epochs}/{of_epochs}"]), best or "-", age(row["age_seconds"])]
        table.add_row(*map(Text, (shown(row["below"]), *([] if narrow else values), *cells)))
    console.print(table)
    if narrow:
        say(console, "best: of val, where it is not said")
    for row in rows:
        if row["reason"]:
            say(console, f"{shown(row['below'])}: {row['state']}: {shown(row['reason'])}")
    if stopped := [row["run"] for row in rows if row["state"] == "stopped"]:
        say(console, f"a stopped run goes on with: dltrain train --resume {shlex.quote(stopped[-1])}")


def age(seconds: float) -> str:
    """In the largest unit of which there is one, rounded down."""
    for unit, count in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= count:
            return f"{int(seconds / count)} {unit}"
    return f"{int(seconds)} s"


def comparison(found: dict[str, Any], console: Console) -> None:
    """What runs differ in, what each came to, what groups of seeds came to, and what can be told."""
    narrow, split, name = console.width < 72, found["split"], found["score"]
    settings = _table("group", "what is different ")
    for group in found["groups"]:
        pairs = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in group["settings"].items())
        settings.add_row(group["group"], Text(", ".join(map(shown, pairs)) or "nothing"))
    if len(found["groups"]) > 1:
        console.print(settings)
    others = [each for each in found["groups"][0]["scores"] if each != name]
    others = [] if narrow else [(split, each) for each in others] + [("val", name)] * (split == "test")
    each = _table(
        "",
        "seed",
        f"{split} {name}",
        *(" ".join(other) for other in others),
        *([] if narrow else ["epochs", "s"]),
        "run ",
    )
    paths = [Path(row["run"]) for group in found["groups"] for row in group["runs"]]
    levels = zip(*(path.parent.parts for path in paths), strict=False)
    above = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    for group in found["groups"]:
        for row in group["runs"]:
            wanted = [(row.get(of, {}).get(key), key) for of, key in [(split, name), *others]]
            values = ["-" if value is None else score(key, value) for value, key in wanted]
            took = [] if narrow else [f"{row['epochs'] or 0:.0f}", _digits(row["seconds"])]
            below = Path(*Path(row["run"]).parts[len(above) :])
            each.add_row(*map(Text, (group["group"], str(row["seed"]), *values, *took, shown(below))))
    console.print(each)
    if any(len(group["runs"]) > 1 for group in found["groups"]):
        together = _table("", "seeds", "mean" if narrow else f"mean {split} {name}", "std")
        for group in found["groups"]:
            together.add_row(group["group"], str(len(group["runs"])), *_mean(name, group["scores"][name]))
        console.print(together)
        say(console, "±: the 95 % interval of the mean over the seeds")
    if above:
        say(console, f"runs: below {shown(Path(*above))}")
    chosen_by = sorted({row["chosen_by"] for group in found["groups"] for row in group["runs"]})
    say(console, f"scores of the {split} split; weights chosen by {', '.join(map(shown, chosen_by))}")
    for each in found["comparisons"]:
        say(console, each["words"])
    for note in found["notes"]:
        say(console, f"note: {note}")
    if found["figure"]:
        say(console, f"figure: {found['figure']}")


def seeds(found: dict[str, Any], console: Console) -> None:
    """What each seed came to, and what all of them say; a narrow terminal has room for one score of each split."""
    narrow, name = console.width < 72, found["score"]
    splits = [split for split in ("val", "test") if split in found["scores"]]
    columns = [(split, each) for split in splits for each in found["scores"][split] if not narrow or each == name]
    took = [] if narrow else ["epochs", "s"]
    table = _table("seed", *(f"{split} {each.replace('_', ' ')}" for split, each in columns), *took)
    for row in found["rows"]:
        if row["seconds"] is None:
            table.add_row(str(row["seed"]), "diverged" if row["diverged"] else "not finished")
            continue
        took = [] if narrow else [str(row["epochs"]), _digits(row["seconds"])]
        table.add_row(str(row["seed"]), *(score(each, row[split][each]) for split, each in columns), *took)
    console.print(table)
    together = _table("", "mean", *([] if narrow else ["std"]))
    for split, scores in found["scores"].items():
        for each, interval in scores.items():
            mean, std = _mean(each, interval)
            together.add_row(f"{split} {each.replace('_', ' ')}", mean, *([] if narrow else [std]))
    if found["scores"]:
        console.print(together)
        say(console, "±: the 95 % interval of the mean over the seeds")
    if found["diverged"]:
        say(console, f"{found['diverged']} of {len(found['rows'])} seeds diverged, and are in no mean")
    say(console, f"runs: {found['run']}")
    say(console, f"next: dltrain compare {shlex.quote(found['run'])} OTHER")


def _mean(name: str, interval: dict[str, float | None]) -> tuple[str, str]:
    mean, std, half_width = (None if value is None else score(name, value) for value in interval.values())
    if half_width is None:
        return str(mean), "-"
    return f"{str(mean).partition(' ')[0]} ± {half_width}", str(std)


def configs(rows: Sequence[tuple[str, str]], console: Console) -> None:
    table = _table("config", "what it is ")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def data(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = _table("name", "train", "test", "download", "state ")
    for row in rows:
        download = f"{row['download'] / 1e6:,.0f} MB" if row["download"] else "none"
        counts = ["-" if row[split] is None else f"{row[split]:,}" for split in ("train", "test")]
        table.add_row(row["name"], *counts, download, row["state"])
    console.print(table)
    for row in rows:
        if row["folder"]:
            say(console, f"{row['name']}: {row['folder']}")


_SHOWN_TRIALS = 10


def sweep(found: dict[str, Any], console: Console) -> None:
    """The best trials of a sweep, how the others ended, which settings mattered, and what to type next."""
    rows = sorted(
        (row for row in found["trials"] if row["state"] == "finished"),
        key=lambda row: -row["value"] if found["maximised"] else row["value"],
    )
    keys = list(found["best"]["settings"])
    table = _table("trial", found["optimise"], *(f"{key.rpartition('.')[2]} " for key in keys))
    cells = [
        [str(row["trial"]), score(found["optimise"], row["value"]), *(_setting(row["settings"][key]) for key in keys)]
        for row in rows[:_SHOWN_TRIALS]
    ]
    for each in cells:
        table.add_row(*map(Text, each))
    if sum(max(map(len, (*column,))) + 2 for column in zip(*cells, strict=True)) > console.width:
        table.columns[2:] = []
    console.print(table)
    trials = sum(found["states"].values())
    counts = ", ".join(f"{count} {state}" for state, count in found["states"].items() if count)
    say(console, f"{trials} trials: {counts}{f'; the best {len(cells)} above' if len(cells) < len(rows) else ''}")
    reasons = [shown(row["failure"]) for row in found["trials"] if row["failure"]]
    for reason in dict.fromkeys(reasons[:3]):
        say(console, f"failed: {reason}")
    best = found["best"]
    say(console, f"best: trial {best['trial']}, {found['optimise']} {score(found['optimise'], best['value'])}")
    for key, value in best["settings"].items():
        say(console, f"  {key}: {_setting(value)}")
    if found["importances"]:
        say(console, "share of the spread of the results that a setting explains (fANOVA):")
        for key, share in found["importances"].items():
            say(console, f"  {key}: {100 * share:.0f} %")
    say(console, f"pictures: {', '.join(found['pictures'])}")
    say(console, f"next: dltrain train {shlex.quote(found['best_config'])}")


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shortened(json.dumps(value, ensure_ascii=False), 40)
