"""Pictures, drawn by matplotlib without a screen: uint8 `[H, W, 3]`."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dltrain.curves import Curve, auc, average_precision
from dltrain.tables import score
from dltrain.text import shortened, shown

_LABELLED = 20  # classes up to which a confusion matrix has room for names and numbers
_CURVES = 10  # classes that a panel has room and colours for
_FILTERS = 64  # that a picture of them shows
_AGAINST = {"epoch": "epochs", "seconds": "seconds of training", "images": "images seen"}
_STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))  # of lines
_THUMBNAIL = 64  # pixels: 1,000 of them make 2048 x 2048, and the projector takes up to 8192 x 8192


def image_grid(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` as one image `[C, rows (H + 1) - 1, columns (W + 1) - 1]`, a line of zeros between two."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    _, channels, height, width = images.shape
    grid = images.new_zeros(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for place, image in enumerate(images):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    return grid


def grey_or_colour(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` as they are where C is 1 or 3, else their first channel `[N, 1, H, W]`."""
    return images if images.shape[1] in (1, 3) else images[:, :1]


def filter_picture(filters: torch.Tensor) -> torch.Tensor:
    """The first filters of `[N, C, H, W]` in a grid, in 0..1: zero is grey, what each filter weighs most 0 or 1.

    In colour where C is 3, grey where it is 1; else each channel of a filter is one of its own.
    """
    if filters.shape[1] not in (1, 3):
        filters = filters.flatten(0, 1)[:, None]
    shown = filters[:_FILTERS]
    peaks = shown.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)  # a filter of zeros is grey
    return image_grid(0.5 + shown / (2 * peaks))


def sprite(images: torch.Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """Images uint8 `[N, C, H, W]` as thumbnails in a square of rows, `[columns * side, columns * side, 3]`, and side.

    A thumbnail is square, of at most 64 pixels, the image in its top left corner.
    """
    count, _, height, width = images.shape
    side = min(max(height, width), _THUMBNAIL)
    columns = math.ceil(math.sqrt(count))
    scale = side / max(height, width)
    size = (max(round(scale * height), 1), max(round(scale * width), 1))
    small = F.interpolate(grey_or_colour(images).float(), size, mode="area").round().byte()
    thumbnails = images.new_zeros(columns * columns, 3, side, side)
    thumbnails[:count, :, : size[0], : size[1]] = small  # a grey one in all three
    rows = thumbnails.view(columns, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    return rows.reshape(columns * side, columns * side, 3).numpy(), side


def confusion_picture(matrix: torch.Tensor, classes: Sequence[str]) -> np.ndarray[Any, Any]:
    """A confusion matrix (int64 `[K, K]`, rows true, columns predicted), each row coloured by its shares."""
    from matplotlib.figure import Figure

    count = len(classes)
    figure = Figure(figsize=(6.4, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= _LABELLED:
        axes.set_xticks(range(count), classes, rotation=45, ha="right")
        axes.set_yticks(range(count), classes)
        for row in range(count):
            for column in range(count):
                ink = "white" if shares[row, column] > 0.5 else "black"
                text = f"{int(matrix[row, column])}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8 if count <= 10 else 5)
    return _pixels(figure)


def mistakes_picture(images: torch.Tensor, captions: Sequence[str]) -> np.ndarray[Any, Any]:
    """Images uint8 `[N, C, H, W]` in a grid, each below its caption."""
    from matplotlib.figure import Figure

    columns = min(5, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.7 * columns, 1.9 * rows), dpi=100, layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    pixels = grey_or_colour(images).permute(0, 2, 3, 1).numpy()
    for axes, image, caption in zip(figure.axes, pixels, captions, strict=False):  # the grid's last row may be short
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)  # no colour image heeds the map
        axes.set_title(caption, fontsize=8)
    return _pixels(figure)


def pairs_picture(images: torch.Tensor, pixels: torch.Tensor) -> np.ndarray[Any, Any]:
    """Images uint8 `[N, C, H, W]` in rows, below each what was made of it: pixels float32 in 0..1 `[N, C, H, W]`."""
    both = torch.cat(
        [grey_or_colour(images), grey_or_colour((pixels * 255).round().to(torch.uint8))], 2
    )  # [N, C, 2H, W]
    grid = torch.nn.functional.pad(both, (1, 1, 1, 1), value=128)
    columns = min(len(grid), 16)
    rows = [
        torch.cat(list(grid[start : start + columns]), 2) for start in range(0, len(grid) // columns * columns, columns)
    ]
    picture = torch.cat(rows, 1).permute(1, 2, 0)
    return picture.expand(-1, -1, 3).contiguous().numpy()


def predictions_picture(
    images: torch.Tensor, captions: Sequence[Sequence[str]], maps: torch.Tensor | None = None
) -> bytes:
    """Images uint8 `[N, C, H, W]` in a grid, each above the lines of its caption, as a PNG.

    maps: float32 `[N, H, W]`, shown beside the images, each from 0 (black) to its largest value
    """
    from matplotlib.figure import Figure

    beside = 1 if maps is None else 2
    columns = min(len(images), max(6, math.ceil(math.sqrt(2 * beside * len(images)))) // beside, 10 // beside)
    rows = math.ceil(len(images) / columns)
    side, gap, line = 1.5, 0.15, 0.14  # inches
    tall = side * min(max(images.shape[2] / images.shape[3], 0.5), 2)  # a longer image has room left at its sides
    wide, high = beside * side + gap, tall + line * max(map(len, captions)) + 2 * gap
    width, height = columns * wide + gap, rows * high + gap
    figure = Figure(figsize=(width, height), dpi=120)
    pixels = grey_or_colour(images).permute(0, 2, 3, 1).numpy()
    for number, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, bottom = gap + number % columns * wide, height - gap - number // columns * high - tall
        cells = [(image, "gray", 255), *([] if maps is None else [(maps[number].numpy(), "magma", None)])]
        for place, (cell, colours, largest) in enumerate(cells):
            box = ((left + place * side) / width, bottom / height, side / width, tall / height)
            axes = figure.add_axes(box, xticks=[], yticks=[])
            axes.imshow(cell, cmap=colours, vmin=0, vmax=largest)  # no colour image heeds the map
            axes.spines[:].set_color("0.6")  # a white image on white paper has an edge too
        for place, words in enumerate(caption):
            middle, top = left + beside * side / 2, bottom - 0.06 - place * line
            colour, weight = ("0.4", "normal") if place == 0 else ("black", "bold" if place == 1 else "normal")
            text = figure.text(middle / width, top / height, words, fontsize=7, color=colour, weight=weight)
            text.set(ha="center", va="top", parse_math=False)
    return _png(figure)


def learning_rates(found: Mapping[str, Any]) -> bytes:
    """The curve of a learning-rate range test (lr_find.find), as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(found["lr"], found["loss"], color="0.8", linewidth=1, label="of each step")
    axes.plot(found["lr"], found["smoothed"], color="C0", label="smoothed")
    for key, colour in (("steepest", "C1"), ("lowest", "C3"), ("suggestion", "C2")):
        axes.axvline(found[key], color=colour, linestyle="--", linewidth=1, label=f"{key}: {found[key]:.2g}")
    low, high = min(found["smoothed"]), max(found["smoothed"])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))  # single steps may lie far off
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend()
    return _png(figure)


def bench(found: Mapping[str, Any]) -> bytes:
    """Accuracy against seconds of each seed (bench.bench), a panel and a colour for each recipe, as a PNG.

    The first seed's point is hollow: start-up is in its seconds.  The line is the mean, the band its 95 % interval.
    """
    from matplotlib.figure import Figure

    recipes = found["recipes"]
    columns = min(len(recipes), 3)
    rows = math.ceil(len(recipes) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 5), 3.6 * rows), dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, (axes, recipe) in enumerate(zip(panels, recipes, strict=False)):
        colour, accuracy = f"C{number % 10}", recipe["accuracy"]
        for row in recipe["runs"]:
            if not row["diverged"]:
                filling = "none" if row["cold"] else colour
                axes.plot(row["seconds"], 100 * row["accuracy"], "o", color=colour, markerfacecolor=filling)
        title = recipe["recipe"]
        if accuracy:
            mean, half_width = 100 * accuracy["mean"], 100 * (accuracy["half_width"] or 0)
            axes.axhline(mean, color=colour, linewidth=1)
            axes.axhspan(mean - half_width, mean + half_width, color=colour, alpha=0.15, linewidth=0)
            title += f": {mean:.2f}" + (f" ± {half_width:.2f} %" if half_width else " %")
        if found["target"] is not None:
            axes.axhline(100 * found["target"], color="0.4", linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("seconds (hollow: cold)")
        axes.set_xlim(left=0)
        axes.ticklabel_format(useOffset=False)
    for axes in panels[len(recipes) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("test accuracy (%)")
    return _png(figure)


def roc_and_pr(found: Mapping[str, Any], drawn: Sequence[tuple[str, Curve]]) -> bytes:
    """ROC and PR curves of classes against the rest (thresholds.answer), as a PNG; a threshold's point is marked.

    Of more than 10 classes, the 10 with the lowest AUC.  The corner that good curves keep to is drawn larger inside.
    """
    from matplotlib.figure import Figure

    areas = [(area, name, curve) for name, curve in drawn if (area := auc(curve)) is not None]
    lines = sorted(areas, key=lambda line: line[0])[:_CURVES] if len(areas) > _CURVES else areas
    positive, split = found.get("positive"), found["split"]
    title = f"{positive['class'] if positive else 'each class'} against the rest, {found['data']} {split}"
    if len(lines) < len(areas):
        title += f": the {len(lines)} lowest AUC of {len(areas)} classes"
    if len(areas) < len(drawn):
        title += f"; {len(drawn) - len(areas)} without a curve: no image of the class, or no other"
    mark = {"threshold": positive["threshold"], **positive["splits"][split]} if positive else {}
    figure = Figure(figsize=(10, 5.4 + 0.12 * len(lines)), dpi=100, layout="constrained")
    figure.suptitle(shown(title), fontsize=11, parse_math=False)
    roc, pr = figure.subplots(1, 2)
    named = [(f"{area:.5f} of {shortened(name, 30)}", curve) for area, name, curve in lines]
    _curves_panel(roc, named, "type_1_error", "recall", mark)
    roc.axline((0, 0), slope=1, color="0.7", linestyle="--", linewidth=1, zorder=0)  # of scores that know nothing
    roc.set(xlabel="type I error: false positive rate", ylabel="recall: 1 − type II error")
    roc.get_legend().set_title("area under the ROC curve (AUC)")
    named = [(f"{average_precision(curve):.5f} of {shortened(name, 30)}", curve) for _, name, curve in lines]
    _curves_panel(pr, named, "recall", "precision", mark)
    pr.set(xlabel="recall", ylabel="precision")
    pr.get_legend().set_title("average precision")
    return _png(figure)


def _curves_panel(axes: Any, named: Sequence[tuple[str, Curve]], across: str, up: str, mark: Mapping[str, Any]) -> None:
    """One rate of the curves against another; precision against recall in steps, as average precision sums them."""
    ideal = 1 if across == "recall" else 0
    steps = "steps-pre" if up == "precision" else "default"
    # how far from the ideal each curve's nearest point is; two and a half times the farthest shows what all do there
    nearest = [torch.maximum((each.rates[across] - ideal).abs(), 1 - each.rates[up]).amin() for _, each in named]
    corner = 2.5 * max([1e-3, *map(float, nearest)])
    marked = None not in (mark.get(across), mark.get(up))
    if marked:
        corner = max(corner, 1.25 * max(abs(mark[across] - ideal), 1 - mark[up]))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    panes = [axes]
    if named and corner < 0.25:  # else there is little to enlarge, and no empty place to do it in
        inset = axes.inset_axes((0.16 if ideal else 0.32, 0.14, 0.56, 0.56))
        inset.set(xlim=(1 - corner, 1) if ideal else (0, corner), ylim=(1 - corner, 1))
        inset.tick_params(labelsize=7)
        axes.indicate_inset_zoom(inset)
        panes.append(inset)
    for pane in panes:
        for number, (label, curve) in enumerate(named):
            x, y = curve.rates[across], curve.rates[up]
            first = y[:1] if up == "precision" else y.new_zeros(1)  # where next to nothing is called positive
            pane.plot(torch.cat((x.new_zeros(1), x)), torch.cat((first, y)), f"C{number}", drawstyle=steps, label=label)
        if marked:
            label = f"the threshold {mark['threshold']:.5g}"
            pane.plot(mark[across], mark[up], "o", color="black", markersize=5, clip_on=False, label=label)
        pane.grid(alpha=0.3)
    drawn = axes.get_legend_handles_labels()
    legend = axes.legend(*drawn, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def comparison(found: Mapping[str, Any]) -> bytes:
    """The scores of each run (compare.over_seeds), a row for each group, its mean with its 95 % interval, as a PNG."""
    from matplotlib.figure import Figure

    groups, split, name = found["groups"], found["split"], found["score"]
    scale = 100 if name.endswith("accuracy") else 1
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(groups)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, group in enumerate(groups):
        colour, of_seeds = f"C{place % 10}", group["scores"][name]
        values = [scale * row[split][name] for row in group["runs"]]
        axes.plot(values, [place + 0.15] * len(values), "o", color=colour, alpha=0.5, markersize=4)
        width = scale * (of_seeds["half_width"] or 0)
        axes.errorbar(scale * of_seeds["mean"], place - 0.1, xerr=width, fmt="D", color=colour, capsize=4)
    labels = (", ".join(f"{key}: {value}" for key, value in group["settings"].items()) for group in groups)
    axes.set_yticks(
        range(len(groups)),
        [shortened(f"{group['group']}  {label}", 44) for group, label in zip(groups, labels, strict=True)],
        parse_math=False,
    )
    axes.set_ylim(len(groups) - 0.5, -0.5)
    unit = " (%)" if scale == 100 else ""
    axes.set_xlabel(f"{split} {name}{unit}: each seed, and the mean with its 95 % interval")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return _png(figure)


def vary(found: Mapping[str, Any], traces: Sequence[Sequence[Mapping[str, Any]]]) -> bytes:
    """Loss against epochs, seconds and images of each run (vary.vary), as a PNG.

    One key: a colour for each value, the training loss solid, its `traces` (vary.trace) faint, the val loss dashed; of
    a single epoch, which makes no line, a dot and a cross.
    Two keys: a colour for each value of the first, a style of line for each of the second, the val loss alone where
    there is one, and the final score of each pair in a panel of its own.
    """
    from matplotlib.figure import Figure

    grid = len(found["keys"]) == 2
    figure = Figure(figsize=(15 if grid else 12, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 4 if grid else 3)
    rows = found["runs"]
    points = [point for row in rows for point in row["curve"]]
    with_val = all(point["val_loss"] is not None for point in points)
    drawn = ["val_loss" if with_val else "train_loss"] if grid else ["train_loss", *(["val_loss"] if with_val else [])]
    places = {key: {value: place for place, value in enumerate(values)} for key, values in found["keys"].items()}
    for axes, (x, name) in zip(panels, _AGAINST.items(), strict=False):
        for row, trace in zip(rows, traces, strict=True):
            colour, style = _line(places, row["values"])
            for loss in drawn:
                dashes = "--" if not grid and loss == "val_loss" else style
                reached = [point[x] for point in row["curve"]], [point[loss] for point in row["curve"]]
                marker = {"train_loss": "o", "val_loss": "x"}[loss] if len(row["curve"]) == 1 else ""
                axes.plot(*reached, color=colour, linestyle=dashes, marker=marker, zorder=3)
            if not grid:
                steps = [point[x] for point in trace], [point["train_loss"] for point in trace]
                axes.plot(*steps, color=colour, alpha=0.25, linewidth=0.7)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        seen = [point[x] for each in (traces if not grid else [points]) for point in each]
        if x != "epoch" and _is_wide(seen, 30):
            axes.set_xscale("log")
        losses = [point[loss] for point in points for loss in drawn]
        if _is_wide(losses, 10):
            axes.set_yscale("log")
            axes.set_ylim(min(losses) / 2, max(losses) * 2)  # single steps may lie far off
    titles = {"train_loss": "training loss", "val_loss": "val loss"}
    both = "loss (solid, o: training; dashed, x: val)"
    panels[0].set_ylabel(both if len(drawn) == 2 else titles[drawn[0]])
    if grid:
        _score_panel(figure, panels[3], found)
    _legend(figure, found, places)
    return _png(figure)


def _line(places: Mapping[str, Mapping[str, int]], values: Mapping[str, str]) -> tuple[Any, Any]:
    """Colour and style of the line of these values."""
    from matplotlib import colormaps

    first, *second = (places[key][value] for key, value in values.items())
    count = len(next(iter(places.values())))
    colour = f"C{first}" if count <= 10 else colormaps["viridis"](first / (count - 1))
    return colour, _STYLES[second[0] % len(_STYLES)] if second else "-"


def _is_wide(values: Sequence[float], times: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) > times * min(values)


def _legend(figure: Any, found: Mapping[str, Any], places: Mapping[str, Mapping[str, int]]) -> None:
    """What colours and styles stand for, below the panels."""
    from matplotlib.lines import Line2D

    (first, colours), *second = found["keys"].items()
    others = {key: values[0] for key, values in second}
    diverged = [] if second else [row["values"][first] for row in found["runs"] if row["diverged"]]  # else by the score
    lines = [{"color": _line(places, {first: value, **others})[0]} for value in colours]
    names = [shortened(value, 40) + " (diverged)" * (value in diverged) for value in colours]
    parts = [("left" if second else "center", first, lines, names)]
    for key, values in second:
        lines = [{"color": "0.3", "linestyle": _line(places, {first: colours[0], key: each})[1]} for each in values]
        parts.append(("right", key, lines, [shortened(value, 40) for value in values]))
    for side, key, lines, names in parts:
        handles = [Line2D([], [], **line, label=name) for line, name in zip(lines, names, strict=True)]
        columns = min(len(handles), max(1, (60 if second else 110) // (max(map(len, names)) + 8)))
        legend = figure.legend(handles=handles, title=key, loc=f"outside lower {side}", ncols=columns, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _score_panel(figure: Any, axes: Any, found: Mapping[str, Any]) -> None:
    """The final score of each pair of values: rows are the first key's, columns the second's."""
    (first, ys), (second, xs) = found["keys"].items()
    scores = np.full((len(ys), len(xs)), np.nan)
    split = found["score_split"]
    for row in found["runs"]:
        at = ys.index(row["values"][first]), xs.index(row["values"][second])
        text = "diverged" if row["diverged"] else "-"
        value = (row[split] or {}).get(found["score"])
        if value is not None:
            scores[at] = value
            text = score(found["score"], value)
        axes.text(at[1], at[0], text, ha="center", va="center", fontsize=9).set_bbox(
            {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.5}
        )
    axes.imshow(scores, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(xs)), [shortened(x, 16) for x in xs], parse_math=False)
    axes.set_yticks(range(len(ys)), [shortened(y, 16) for y in ys], parse_math=False)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    axes.set_title(f"{split} {found['score']}", fontsize=10)


def sweep_history(found: Mapping[str, Any]) -> bytes:
    """Each trial's score (sweep.sweep) and the best one so far, as a PNG; failed trials stand on the lower edge."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    share = found["optimise"].endswith("accuracy")
    scale = 100 if share else 1
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for state, marker, colour in (("finished", "o", "C0"), ("pruned", "v", "0.6")):
        rows = [row for row in found["trials"] if row["state"] == state and row["value"] is not None]
        if rows:
            values = [scale * row["value"] for row in rows]
            axes.plot([row["trial"] for row in rows], values, marker, color=colour, markersize=4, label=state)
    if failed := [row["trial"] for row in found["trials"] if row["state"] == "failed"]:
        foot = axes.get_xaxis_transform()
        axes.plot(failed, [0.02] * len(failed), "x", color="C3", markersize=5, transform=foot, label="failed")
    finished = [row for row in found["trials"] if row["state"] == "finished"]
    scores = np.array([row["value"] for row in finished])
    so_far = (np.maximum if found["maximised"] else np.minimum).accumulate(scores)
    steps = [*(row["trial"] for row in finished), len(found["trials"]) - 1]
    axes.step(steps, scale * np.append(so_far, so_far[-1]), where="post", color="C1", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(found["optimise"].replace("_", " ") + (" (%)" if share else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(useOffset=False)
    axes.set_title(f"{found['sweep']}: {found['sampler']}", fontsize=10, parse_math=False)
    axes.legend()
    return _png(figure)


def sweep_importances(found: Mapping[str, Any]) -> bytes:
    """How much of the spread of a sweep's results each setting explains, as a PNG."""
    from matplotlib.figure import Figure

    shares = found["importances"]
    figure = Figure(figsize=(7, 1.4 + 0.35 * max(len(shares), 1)), dpi=120, layout="constrained")
    axes = figure.subplots()
    if shares:
        bars = axes.barh([shortened(key, 40) for key in shares], [100 * share for share in shares.values()], color="C0")
        axes.bar_label(bars, fmt="%.0f %%", padding=3)
        axes.invert_yaxis()
    else:
        axes.text(0.5, 0.5, "the finished trials do not differ", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
    axes.set_xlim(0, 110)
    axes.set_xlabel(f"% of the spread of {found['optimise']} that a setting explains (fANOVA)")
    return _png(figure)


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not: a box stands for them
        figure.savefig(png, format="png")
    return png.getvalue()


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
