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

from dltrain.text import shown


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
    table = _table("split", "loss", "accuracy")
    for split in ("train", "val", "test"):
        if summary[split]:
            table.add_row(split, f"{summary[split]['loss']:.4f}", percent(summary[split]["accuracy"]))
    console.print(table)
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
    say(console, f"{scores['data']} {scores['split']}: {scores['images']:,} images{unverified}")
    whole = _table("score", "value")
    whole.add_row("accuracy (top 1)", percent(scores["accuracy"]))
    if scores["top5"] is not None:
        whole.add_row("accuracy (top 5)", percent(scores["top5"]))
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
    say(console, f"{found['checkpoint']}, step {found['step']:,}, weights chosen by {found['chosen_by']}")
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
