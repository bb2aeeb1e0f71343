"""Plots as inline SVG that follow the page's colours; drawn 360 wide, so that a phone shows their text in full size.

Everything that ends up in the SVG passes `tag`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH = 360
LABEL_PX = 6.2  # width of a letter at 11 px, to keep labels apart
COLORS = 6  # of the style sheet: classes c0 … c5
UNWANTED = 30  # px farther that a name may stand for not covering the front or the words at the floor
FAR = 20  # px from a spot to its name, from which on a line joins the two
FLOOR = "noise floor"
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """Maps low … high to start … end, in px. whole: of whole numbers only."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

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
            return self._steps(max((self.high - self.low) / 4, 1 if self.whole else 0))
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


def scatter(
    spots: Sequence[Spot], label: str, unit: str, floor: float | None, *, log: bool = False, front: Sequence[str] = ()
) -> Markup:
    """Size against a score; the floor as a dashed line, and a line through the spots that `front` names.

    log: smaller is better and the perfect score stands at the bottom; otherwise at the top.
    """
    numbers = [x for spot in spots for x in (spot.y, spot.low, spot.high) if x is not None]
    numbers += [floor] if floor is not None else []
    if not numbers:
        return Markup("")
    bottom, at_perfect = 230.0, 220.0 if log else 16.0
    lowest = bottom - 30 if log and any(spot.y is None for spot in spots) else bottom - 6
    x_axis = Axis.around([spot.x for spot in spots], 44, WIDTH - 14)
    y_axis = Axis.around(numbers, lowest, 34, log)
    places = [(x_axis.place(spot.x), at_perfect if spot.y is None else y_axis.place(spot.y)) for spot in spots]
    parts, avoided = [_x_axis(x_axis, bottom, unit), _y_axis(y_axis)], list[Box]()
    if floor is not None:
        y, end = y_axis.place(floor), WIDTH - 6
        parts += [_dashed(38, y, end, y), _text(end, y - 5, FLOOR, anchor="end", class_="muted")]
        avoided.append((end - LABEL_PX * len(FLOOR), y - 14, end, y))
    joined = sorted(place for spot, place in zip(spots, places, strict=True) if spot.name in front)
    if len(joined) > 1:
        parts.append(tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in joined), class_="front"))
        avoided += [box for ends in pairwise(joined) for box in _along(*ends)]
    named = zip(spots, places, _labels(spots, places, avoided, bottom), strict=True)
    parts += [_spot(spot, place, box, y_axis) for spot, place, box in named]
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
    x_axis = Axis(min(steps), max(max(steps), min(steps) + 1), 44, right, whole=True)
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


def _spot(spot: Spot, place: Point, box: Box, y_axis: Axis) -> Markup:
    """box: of the name; a thin line leads to one that found no room beside its spot."""
    (x, y), parts = place, []
    if spot.low is not None and spot.high is not None:
        parts.append(tag("line", x1=x, x2=x, y1=y_axis.place(spot.low), y2=y_axis.place(spot.high), class_="interval"))
    end = _nearest(box, place)
    if math.dist(place, end) > FAR:
        parts.append(tag("line", x1=x, y1=y, x2=end[0], y2=end[1], class_="leader"))
    parts.append(tag("circle", tag("title", spot.name), cx=x, cy=y, r=4, class_="mean"))
    return tag("g", *parts, _text(box[0], box[3] - 2, _spot_label(spot)))


def _along(start: Point, end: Point) -> Iterator[Box]:
    """Boxes of 4 px that cover the line between two points."""
    steps = max(1, math.ceil(math.dist(start, end) / 4))
    for step in range(steps + 1):
        x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
        yield (x - 2, y - 2, x + 2, y + 2)


def _labels(spots: Sequence[Spot], places: Sequence[Point], avoided: Sequence[Box], bottom: float) -> list[Box]:
    """Where each name stands: near its spot, not on a spot or another name, and not gladly on what is avoided."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    found = []
    for spot, place in zip(spots, places, strict=True):
        boxes = list(_places_for(_spot_label(spot), place, bottom))
        inside = [box for box in boxes if box[0] > 38 and box[2] < WIDTH and box[1] > 2 and box[3] < bottom] or boxes
        free = [box for box in inside if not _on(box, taken)] or inside
        costs = [math.dist(place, _nearest(box, place)) + UNWANTED * _on(box, avoided) for box in free]
        found.append(free[costs.index(min(costs))])
        taken.append(found[-1])
    return found


def _places_for(name: str, place: Point, bottom: float) -> Iterator[Box]:
    """Right, left, above and below, and then farther and farther away."""
    (x, y), width = place, LABEL_PX * len(name)
    shifts = [sign * 13 * step for step in range(math.ceil(bottom / 13)) for sign in (-1, 1)]
    sides = [x + 14, x - 14 - width, x + 18 + width, x - 18 - 2 * width]
    starts = [(x + 8, y + 4), (x - 8 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 18)]
    for left, base in [*starts, *((left, y + 4 + shift) for left in sides for shift in shifts)]:
        yield (left, base - 9, left + width, base + 2)


def _nearest(box: Box, place: Point) -> Point:
    """The point of the box that is nearest to a place."""
    return min(max(place[0], box[0]), box[2]), min(max(place[1], box[1]), box[3])


def _on(box: Box, others: Sequence[Box]) -> bool:
    return any(_cover(box, other) for other in others)


def _cover(one: Box, other: Box) -> bool:
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
    """Both ends stay: names of one model often differ in the last letters only."""
    half = letters // 2
    return text if len(text) <= letters else f"{text[: letters - half - 1]}…{text[-half:]}"


def _dashed(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="yardstick")


def _text(x: float, y: float, words: str, *, anchor: str = "start", class_: str = "") -> Markup:
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:.0f}", class_="plot", role="img", aria_label=label)
