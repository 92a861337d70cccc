"""Curves and bars as the numbers that an SVG is drawn of: a box of 400 x 240, whose y grows downwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 20, 38  # margins, for the axes' numbers and names
LOG_FROM = 20  # times the lowest value the highest must be, that a linear axis would hide the former
POINTS = 500  # of a line at most: no screen shows more in so narrow a box
COLUMNS = 200  # that a pointer can be held to

Point = tuple[float, float]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Line:
    """colour: a number, which the style sheet has a colour for; marked: the x of a point to be marked"""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    marked: float | None = None


@dataclass(frozen=True)
class Bar:
    """text: what is read by pointing; share: 0..1, how strongly it is drawn"""

    left: float
    right: float
    height: float
    text: str
    share: float = 1.0


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Of the way from the axis' low end to its high end."""
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self, least: float = 0) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, least)


def chart(
    title: str,
    x_name: str,
    lines: Sequence[Line],
    bars: Sequence[Bar] = (),
    unit: str = "",
    log: bool = False,
    bounds: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
) -> dict[str, Any] | None:
    """A chart as the template draws it; None where there is not one point.

    unit: of y, for what is read by pointing; log: y may be drawn by its logarithm, where its values span much;
    bounds: what y cannot leave; mark: an x to draw a line at, and what it is
    """
    lines = [Line(each.name, _finite(each.points), each.colour, each.dashed, each.marked) for each in lines]
    lines = [each for each in lines if each.points]
    xs = sorted({x for line in lines for x, _ in line.points} | {x for bar in bars for x in (bar.left, bar.right)})
    ys = [y for line in lines for _, y in line.points] + [y for bar in bars for y in (0.0, bar.height)]
    if not xs:
        return None
    low, high = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 0.5, xs[0] + 0.5)
    across, up = _Axis(low, high, False), _y_axis(min(ys), max(ys), log, bounds)

    def x(value: float) -> float:
        return round(LEFT + across.share(value) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "title": title + (f", {unit}" if unit else ""),
        "x_name": x_name,
        "log": up.log,
        "said": _said(title, x_name, lines, unit),
        "x_ticks": [{"at": x(each), "text": tick_text(each)} for each in across.ticks(least=1)],
        "y_ticks": [{"at": y(each), "text": tick_text(each)} for each in up.ticks()],
        "lines": [
            {
                "name": line.name,
                "colour": line.colour,
                "dashed": line.dashed,
                "points": [(x(px), y(py)) for px, py in thinned(line.points, POINTS)],
                "marked": next(((x(px), y(py)) for px, py in line.points if px == line.marked), None),
            }
            for line in lines
        ],
        "bars": [
            {
                "x": x(bar.left),
                "width": round(x(bar.right) - x(bar.left), 1),
                "y": y(bar.height),
                "text": bar.text,
                "strength": round(0.15 + 0.6 * math.sqrt(bar.share), 2),
            }
            for bar in bars
        ],
        "columns": [] if bars else _columns(lines, thinned([(each, x(each)) for each in xs], COLUMNS), x_name, unit),
        "mark": {"x": x(mark[0]), "text": mark[1], "before": across.share(mark[0]) > 0.5} if mark else None,
    }


def _said(title: str, x_name: str, lines: Sequence[Line], unit: str) -> str:
    """The chart in words, for whoever does not see it."""
    ends = [
        f"{line.name} from {number(line.points[0][1], unit)} to {number(line.points[-1][1], unit)}" for line in lines
    ]
    return f"{title} against {x_name}: {'; '.join(ends)}"


def _columns(
    lines: Sequence[Line], places: Sequence[tuple[float, float]], x_name: str, unit: str
) -> list[dict[str, Any]]:
    """For each x, given with its place, the strip around it and the lines' values there."""
    values = [(line.name, dict(line.points)) for line in lines]
    middles = [(left + right) / 2 for (_, left), (_, right) in itertools.pairwise(places)]
    edges = [LEFT, *middles, WIDTH - RIGHT]
    return [
        {
            "x": round(edges[at], 1),
            "width": round(edges[at + 1] - edges[at], 1),
            "text": [f"{x_name} {x:.4g}", *(f"{name}: {number(of[x], unit)}" for name, of in values if x in of)],
        }
        for at, (x, _) in enumerate(places)
    ]


def number(value: float, unit: str = "") -> str:
    return f"{value:.4g} {unit}".rstrip()


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _y_axis(low: float, high: float, log: bool, bounds: tuple[float, float] | None) -> _Axis:
    if log and low > 0 and high >= LOG_FROM * low:
        room = (high / low) ** 0.05
        return _Axis(low / room, high * room, True)
    room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    if bounds:
        return _Axis(max(low - room, bounds[0]), min(high + room, bounds[1]), False)
    return _Axis(low - room, high + room, False)


def linear_ticks(low: float, high: float, least: float = 0, most: int = 6) -> list[float]:
    """The multiples in low..high of 1, 2 or 5 times a power of ten: about `most` of them, at least `least` apart."""
    rough = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten in low..high; with their doubles and halves between where those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for times in ((1, 2, 5), (1,)):
        found = [each * 10.0**power for power in range(first, last + 1) for each in times]
        inside = [each for each in found if low <= each <= high]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def tick_text(value: float) -> str:
    return f"{value:,.10g}" if 1e-3 <= abs(value) < 1e6 or not value else f"{value:.3g}"


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` and one of them, at even distances, the first and the last among them."""
    step = math.ceil(len(items) / most) or 1
    kept = list(items[::step])
    return kept if not items or (len(items) - 1) % step == 0 else [*kept, items[-1]]
