"""What a search found, for the top of its recipe, for people, for machines, and as a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from bitroute.calibrate.search_front import Point
from bitroute.calibrate.search_request import Search
from bitroute.convert.document import check_new, write_new
from bitroute.convert.table import size
from bitroute.errors import Problem, RecipeError

if TYPE_CHECKING:
    from bitroute.calibrate.search import Found

__all__ = ["check_plot", "content", "estimate_text", "head", "text", "write_plot"]

WIDTH = 116
STYLE = (
    "<style>text{font:11px sans-serif;fill:#1a1d21}.muted{fill:#5c646e}.grid{stroke:#d9dde2}.axis{stroke:#5c646e}"
    ".leader{stroke:#5c646e}polyline{fill:none;stroke:#17795a;stroke-width:2}circle{fill:#0b6bb5}</style>"
)


def head(search: Search, point: Point, uniform: Sequence[Point] = ()) -> list[str]:
    """The comment at the top of a recipe: the same for the same measurements, on whatever day."""
    wish, calls = search.wish, f"up to {search.wish.samples} recorded calls of the original's denoiser"
    how = "estimated from statistics and a probe of each layer" if wish.estimate else "each layer in each candidate"
    lines = [
        f"Searched: what {_goal(search)} buys for {search.space.component.name} of {search.pipeline.name}.",
        f"{point.bits:.3f} bits per weight of the component, everything counted: {size(point.size_bytes)}; "
        f"the whole checkpoint: {size(point.checkpoint_bytes)}.",
        f"Error of its output, teacher-forced: {_errors(point)}; {calls}, {how}, in {wish.dtype}.",
        f"Candidates: {', '.join(search.listed.candidates)}{_with_methods(search)}.",
    ]
    if uniform:
        listed = (f"{found.name} {found.bits:.2f} bits, {_errors(found)}" for found in uniform)
        lines.append(f"Beside it: {'; '.join(listed)}.")
    lines.append("Below, the part of each rule in the sum of the squared errors, and what it would be otherwise.")
    return [part for line in lines for part in wrap(line, WIDTH, break_on_hyphens=False)]


def _with_methods(search: Search) -> str:
    words = "; in each layer also with the methods that lower its error per byte, by the statistics of its input"
    return words if search.wish.methods else ""


def _goal(search: Search) -> str:
    wish = search.wish
    if wish.bits is not None:
        return f"{wish.bits:g} bits per weight"
    return f"a checkpoint of {wish.budget_bytes:,} bytes" if wish.budget_bytes is not None else f"a gate ({wish.gate})"


def _errors(point: Point) -> str:
    predicted = f"{point.predicted:.2%}".replace("%", " %")
    if point.measured is None:
        return f"predicted {predicted}"
    return f"predicted {predicted}, measured {point.measured:.2%}".replace("%", " %").replace("  %", " %")


def estimate_text(search: Search) -> str:
    """What the measurements will cost."""
    layers, lossy = len(search.space.layers), len(search.space.candidates) - 1
    weights_bytes = search.space.parameters * (4 if search.wish.dtype == "float32" else 2)
    tried = f"up to {search.encodings:,} encodings of weights with methods, then up to " if search.wish.methods else ""
    return (
        f"{search.space.component.name}: {layers} linear layers, {lossy} candidates beside keep: {tried}"
        f"{search.forwards:,} forward passes of the denoiser ({search.wish.samples} for each measurement), which is "
        f"held in {search.wish.dtype}: {size(weights_bytes)}\nmeasurements are kept in {search.work}"
    )


def text(found: Found) -> str:
    """The front with the uniform recipes beside it, then what was written."""
    points = sorted(
        [*found.front, *found.uniform, found.chosen], key=lambda point: (point.size_bytes, -point.predicted)
    )
    width = max(len(point.name) for point in points)
    lines = [f"{'':<{width}} {'bits':>7} {'component':>11} {'checkpoint':>11} {'predicted':>10} {'measured':>9}"]
    lines += [
        f"{'' if point.name == 'front' else point.name:<{width}} {point.bits:>7.3f} {size(point.size_bytes):>11} "
        f"{size(point.checkpoint_bytes):>11} {point.predicted:>10.3%} "
        f"{'' if point.measured is None else f'{point.measured:.3%}':>9}".rstrip()
        for point in points
    ]
    lines += [
        "\npredicted: root of the sum of what each layer loses alone; measured: all together; of the denoiser's output,"
        "\nrelative, on the original's inputs. Lines without a name: the least error for that size (the Pareto front).",
        *_gate(found),
        f"\nwrote {found.recipe}: {found.chosen.bits:.3f} bits, {size(found.chosen.checkpoint_bytes)}",
        f"  quantize --recipe {found.recipe} --out FOLDER",
    ]
    return "\n".join(lines)


def _gate(found: Found) -> Iterator[str]:
    for step in found.gate.get("evaluations", []):
        verdict = "passes" if step["passed"] else "fails"
        yield f"gate: {step['bits']:.3f} bits {verdict} ({step['means']})"


def content(found: Found) -> dict[str, Any]:
    """As JSON."""
    return {
        "recipe": str(found.recipe), "component": found.search.space.component.name,
        "chosen": {**_point(found.chosen), "layers": dict(found.chosen.chosen)},
        "front": [_point(point) for point in found.front],
        "uniform": [_point(point) for point in found.uniform],
        "gate": dict(found.gate), "measurements": str(found.search.work),
    }  # fmt: skip


def _point(point: Point) -> dict[str, Any]:
    return {
        "name": point.name, "bits_per_weight": point.bits, "size_bytes": point.size_bytes,
        "checkpoint_bytes": point.checkpoint_bytes, "predicted_error": point.predicted,
        "measured_error": point.measured if point.measured is not None and isfinite(point.measured) else None,
    }  # fmt: skip


def check_plot(file: Path | None, recipe_out: Path) -> None:
    """Raises RecipeError where the plot could not be written after hours of measuring."""
    if file is None:
        return
    if file.suffix not in (".svg", ".json"):
        raise RecipeError(Problem("no such kind of plot", "--pareto", got=str(file), expected="a .svg or .json file"))
    check_new(file)
    if os.path.abspath(file) == os.path.abspath(recipe_out):
        raise RecipeError(Problem("the plot and the recipe are the same file", "--pareto", got=str(file)))


def write_plot(found: Found, file: Path) -> Path:
    """The front as an SVG, or as JSON where the file is called so.

    Raises:
        RecipeError: the file exists or cannot be written.
    """
    if file.suffix == ".json":
        return write_new(json.dumps(content(found), indent=1) + "\n", file, file.name)
    from bitroute.eval.plots import Spot, scatter

    front = {f"{point.bits:.2f}": point for point in found.front if point.predicted > 0}
    named = {point.name: point for point in (*found.uniform, found.chosen) if point.predicted > 0}
    spots = [Spot("", point.bits, point.predicted, None, None) for point in front.values()]
    spots += [Spot(name, point.bits, point.predicted, None, None) for name, point in named.items()]
    drawn = scatter(spots, "bits per weight against the error of the output", "bits", None, log=True, front=[""])
    opened = '<svg xmlns="http://www.w3.org/2000/svg" '
    return write_new(opened + str(drawn).removeprefix("<svg ").replace(">", f">{STYLE}", 1) + "\n", file, file.name)
