"""Plots as inline SVG that follow the page's colours; drawn 360 wide, so that a phone shows their text in full size.

Everything that ends up in the SVG passes `tag`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 360
LABEL_PX = 6.2  # width of a letter at 11 px, to keep labels apart
COLORS = 6  # of the style sheet: classes c0 … c5
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Maps low … high to start … end, in px."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> Axis:
        """An axis with room on both sides; log needs values above 0."""
        found = list(values)
        low, high = min(found), max(found)
        if log:
            return cls(low / 1.3, high * 1.3, start, end, log)
        room = (high - low) * 0.06 or abs(high) * 0.02 or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        scale: Callable[[float], float] = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to eight round numbers inside the axis."""
        if not self.log:
            return self._steps((self.high - self.low) / 4)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        wide = self.high / self.low > 50
        found = [10.0**decade * digit for decade in decades for digit in ((1,) if wide else (1, 2, 5))]
        inside = [tick for tick in found if self.low <= tick <= self.high]
        return inside if len(inside) > 1 else self._steps((self.high - self.low) / 4)

    def _steps(self, about: float) -> list[float]:
        size = 10.0 ** math.floor(math.log10(about))
        step = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= about * 0.999)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Strip:
    """A row of dots. None stands for a perfect score, which no scale of distances has a place for."""

    name: str
    dots: Sequence[tuple[float | None, str]]  # the score, and what the dot is called
    mean: float | None
    low: float | None
    high: float | None
    floor: bool = False

    @property
    def numbers(self) -> list[float]:
        return [x for x in (self.mean, self.low, self.high, *(dot for dot, _ in self.dots)) if x is not None]


@dataclass(frozen=True)
class Spot:
    name: str
    x: float
    y: float | None  # None: perfect
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """An element; a trailing underscore of an attribute is dropped and the others become hyphens."""
    listed = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, listed, Markup("").join(inside))


def strips(rows: Sequence[Strip], label: str, perfect: str, *, log: bool) -> Markup:
    """Every sample as a dot, the mean and its interval as a bar, the floor's means as dashed lines across.

    log: smaller is better and the perfect score stands at the left; otherwise at the right.
    """
    numbers = [number for row in rows for number in row.numbers]
    if not numbers:
        return Markup("")
    has_perfect = any(row.mean is None or any(dot is None for dot, _ in row.dots) for row in rows)
    gutter = 58 if has_perfect else 0
    axis = Axis.around(numbers, 8 + gutter * log, WIDTH - 12 - gutter * (not log), log)
    at_perfect = 8.0 + LABEL_PX * 2 if log else WIDTH - 40.0
    bottom = 34.0 * len(rows) + 6
    parts = [_x_axis(axis, bottom)]
    if has_perfect:
        parts.append(_text(at_perfect, bottom + 14, perfect, anchor="middle"))
    floors = [row.mean for row in rows if row.floor and row.mean is not None]
    parts += [_dashed(axis.place(mean), 8, axis.place(mean), bottom) for mean in floors]
    parts += [_strip(row, axis, at_perfect, 34.0 * index) for index, row in enumerate(rows)]
    return _svg(bottom + 22, label, parts)


def scatter(spots: Sequence[Spot], label: str, unit: str, floor: float | None) -> Markup:
    """Size against a score where higher is better; the floor as a dashed line."""
    numbers = [x for spot in spots for x in (spot.y, spot.low, spot.high) if x is not None]
    numbers += [floor] if floor is not None else []
    if not numbers:
        return Markup("")
    bottom = 230.0
    x_axis = Axis.around([spot.x for spot in spots], 44, WIDTH - 14)
    y_axis = Axis.around(numbers, bottom - 6, 34)
    parts = [_x_axis(x_axis, bottom, unit), _y_axis(y_axis)]
    if floor is not None:
        parts.append(_dashed(38, y_axis.place(floor), WIDTH - 6, y_axis.place(floor)))
        parts.append(_text(WIDTH - 6, y_axis.place(floor) - 5, "noise floor", anchor="end", class_="muted"))
    places = [(x_axis.place(spot.x), 16.0 if spot.y is None else y_axis.place(spot.y)) for spot in spots]
    for spot, (x, y), label_at in zip(spots, places, _labels(spots, places), strict=True):
        if spot.low is not None and spot.high is not None:
            ends = {"y1": y_axis.place(spot.low), "y2": y_axis.place(spot.high)}
            parts.append(tag("line", x1=x, x2=x, class_="interval", **ends))
        parts.append(tag("circle", tag("title", spot.name), cx=x, cy=y, r=4, class_="mean"))
        parts.append(_text(*label_at, _spot_label(spot)))
    return _svg(bottom + 22, label, parts)


def lines(series: Sequence[Line], label: str) -> Markup:
    """One line for each candidate, named at its end; logarithmic where the values span more than a decade."""
    values = [y for line in series for _, y in line.points]
    if not values:
        return Markup("")
    values += [bound for line in series for _, *bounds in line.band for bound in bounds]
    log = min(values) > 0 and max(values) / min(values) > 10
    bottom, right = max(200.0, 16.0 * len(series) + 20), WIDTH - 84
    y_axis = Axis.around(values, bottom - 4, 14, log) if log else Axis(0, max(values) * 1.05 or 1, bottom - 4, 14)
    steps = [x for line in series for x, _ in line.points]
    x_axis = Axis(min(steps), max(max(steps), min(steps) + 1), 44, right)
    parts = [_x_axis(x_axis, bottom), _y_axis(y_axis, right)]
    ends = _apart([y_axis.place(line.points[-1][1]) for line in series], 13)
    for index, (line, end) in enumerate(zip(series, ends, strict=True)):
        parts.append(_line(line, x_axis, y_axis, index))
        parts.append(_text(right + 6, end + 4, _short(line.name, 12), class_=f"c{index % COLORS}"))
    return _svg(bottom + 22, label, parts)


def _strip(row: Strip, axis: Axis, at_perfect: float, top: float) -> Markup:
    middle = top + 23
    parts = [_text(8, top + 12, _short(row.name, 52), class_="muted" if row.floor else "name")]
    for index, (value, name) in enumerate(row.dots):
        x = at_perfect if value is None else axis.place(value)
        jitter = 8 * ((index * 0.618) % 1 - 0.5)  # the golden ratio spreads neighbours; the same on every run
        parts.append(tag("circle", tag("title", name), cx=x, cy=middle + jitter, r=2.5, class_="dot"))
    if row.low is not None and row.high is not None:
        ends = {"x1": axis.place(row.low), "x2": axis.place(row.high)}
        parts.append(tag("line", y1=middle, y2=middle, class_="interval", **ends))
    x = at_perfect if row.mean is None else axis.place(row.mean)
    parts.append(tag("line", x1=x, x2=x, y1=middle - 7, y2=middle + 7, class_="mean"))
    return tag("g", *parts, class_="floor" if row.floor else "strip")


def _line(line: Line, x_axis: Axis, y_axis: Axis, index: int) -> Markup:
    parts = []
    if line.band:
        around = [(x, low) for x, low, _ in line.band] + [(x, high) for x, _, high in reversed(line.band)]
        parts.append(tag("polygon", points=_path(around, x_axis, y_axis), class_="band"))
    dashes = {} if index < COLORS else {"stroke_dasharray": "5 3"}
    parts.append(tag("polyline", tag("title", line.name), points=_path(line.points, x_axis, y_axis), **dashes))
    return tag("g", *parts, class_=f"line c{index % COLORS}")


def _path(points: Iterable[Point], x_axis: Axis, y_axis: Axis) -> str:
    return " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points)


def _labels(spots: Sequence[Spot], places: Sequence[Point]) -> list[Point]:
    """Where each name starts so that none covers a point or another name, as far as four tries each allow."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    found = []
    for spot, (x, y) in zip(spots, places, strict=True):
        width = LABEL_PX * len(_spot_label(spot))
        tries = [(x + 8, y + 4), (x - 8 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 18)]
        boxes = [(left, base - 9, left + width, base + 2) for left, base in tries]
        free = [box for box in boxes if box[0] > 38 and box[2] < WIDTH and not any(_cover(box, o) for o in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        found.append((box[0], box[3] - 2))
    return found


def _cover(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _apart(wanted: Sequence[float], least: float) -> list[float]:
    """The same order, each at least `least` below the one above it."""
    found, last = [0.0] * len(wanted), -math.inf
    for index in sorted(range(len(wanted)), key=lambda index: wanted[index]):
        last = found[index] = max(wanted[index], last + least)
    return found


def _x_axis(axis: Axis, y: float, unit: str = "") -> Markup:
    parts = [tag("line", x1=axis.start, x2=axis.end, y1=y, y2=y, class_="axis")]
    ticks = axis.ticks()
    for tick in ticks:
        parts.append(tag("line", x1=axis.place(tick), x2=axis.place(tick), y1=6, y2=y, class_="grid"))
        words = f"{_number(tick)} {unit}".strip() if tick == ticks[-1] else _number(tick)
        parts.append(_text(axis.place(tick), y + 14, words, anchor="middle", class_="muted"))
    return tag("g", *parts)


def _y_axis(axis: Axis, right: float = WIDTH - 6) -> Markup:
    parts = []
    for tick in axis.ticks():
        y = axis.place(tick)
        parts.append(tag("line", x1=40, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(_text(36, y + 4, _number(tick), anchor="end", class_="muted"))
    return tag("g", *parts)


def _number(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 0.001 else f"{round(value, 6):g}"


def _spot_label(spot: Spot) -> str:
    return f"{_short(spot.name, 16)}{' (identical)' if spot.y is None else ''}"


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _dashed(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="yardstick")


def _text(x: float, y: float, words: str, *, anchor: str = "start", class_: str = "") -> Markup:
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:.0f}", class_="plot", role="img", aria_label=label)
