"""Tables for the terminal."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
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
    table = _table("split", "loss", "accuracy", *(["without views"] if views else []))
    for split in ("train", "val", "test"):
        if scores := summary[split]:
            shares = [scores["accuracy"], *([scores.get("plain_accuracy", scores["accuracy"])] if views else [])]
            table.add_row(split, f"{scores['loss']:.4f}", *map(percent, shares))
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
    table = _table("layer", "output ", "parameters", "MFLOPs")
    for row in found["layers"]:
        shape = "x".join(map(str, row["output"])) if row["output"] else "-"
        flops = f"{row['flops'] / 1e6:.3f}" if row["flops"] else ""
        table.add_row(
            row["name"] if "_" in row["name"] else f"{row['name']} {row['kind']}",
            shape,
            f"{row['parameters']:,}",
            flops,
        )
    table.add_section()
    table.add_row("total", "", f"{found['parameters']:,}", f"{found['flops_per_image'] / 1e6:.3f}")
    console.print(table)
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


def _digits(value: float | None) -> str:
    """Three of them, or all before the point."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


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
