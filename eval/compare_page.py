"""`compare.html`: the content of compare.json as one page that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from bitroute.convert.table import size
from bitroute.eval import template
from bitroute.eval.intervals import SIGNIFICANCE
from bitroute.eval.pictures import Picture, count_frames, embed, open_picture
from bitroute.eval.plots import Spot, scatter

METRICS = ("lpips", "psnr", "ssim", "flip")
PAIRED = {"lpips": "LPIPS", "psnr": "PSNR", "denoiser_error": "denoiser error"}
OPEN_ROWS = 6  # of the pictures; the others are folded
LARGEST_PX = 512  # of a picture's side: a page of 300 pictures stays below about 30 MB

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Versus:
    """By how much one candidate is better than another, and that in words."""

    difference: str
    words: str
    significant: bool


@dataclass(frozen=True)
class Shot:
    """title: whose picture it is; score: its LPIPS; empty for the original."""

    title: str
    picture: Picture
    score: str


@dataclass(frozen=True)
class Row:
    """One prompt and seed, drawn by the original and then by the candidates, best first."""

    name: str
    prompt: str
    shots: Sequence[Shot]


def write_comparison_page(content: Mapping[str, Any], folder: Path) -> Path:
    """Draws `content` (docs/compare.md) with the pictures below `folder` into `folder`/compare.html.

    Raises:
        JobError: a picture is missing or damaged.
    """
    return template.write_page(folder / "compare.html", render(content, folder))


def render(content: Json, folder: Path) -> str:
    digits, found = template.decimals(content), _by_name(content)
    rows = _rows(content, folder, digits["lpips"])
    return template.fill(
        "compare.html.j2",
        comparison=content, summary=summary(content, digits["lpips"]), metrics=METRICS,
        by_size=[found[name] for name in content["by_size"]], judged=_judged(content),
        cell=lambda scores, metric: template.cell(scores[metric], digits[metric]),
        plot=_pareto_plot(content), significance=SIGNIFICANCE,
        matrix=_matrix(content), neighbours=list(_neighbours(content)),
        rows=rows, open_rows=OPEN_ROWS, frames=_frames(content, folder), largest_px=LARGEST_PX,
        reduced=any(LARGEST_PX in (shot.picture.width, shot.picture.height) for row in rows for shot in row.shots),
    )  # fmt: skip


def summary(content: Json, digits: int) -> str:
    """One sentence: the best, the smallest, and who has no rival that is both."""
    judged = _judged(content)
    if not judged:
        return "Every candidate is rejected: none has scores that mean anything."
    best, smallest = judged[0], min(judged, key=lambda candidate: candidate["size_bytes"])
    lpips = {c["name"]: f"LPIPS {template.fixed(c['scores']['lpips']['mean']['value'], digits)}" for c in judged}
    closest = f"{best['name']} is the closest to the original ({lpips[best['name']]}, {size(best['size_bytes'])})"
    if smallest is best:
        return f"{closest}, and the smallest."
    small = f"{smallest['name']} is the smallest ({size(smallest['size_bytes'])}, {lpips[smallest['name']]})"
    front = [candidate["name"] for candidate in judged if candidate["pareto"]]
    return (
        f"{closest}, and {small}; on the Pareto front, where no other is both smaller and better: {', '.join(front)}."
    )


def _by_name(content: Json) -> dict[str, Json]:
    return {candidate["name"]: candidate for candidate in content["candidates"]}


def _judged(content: Json) -> list[Json]:
    """Those that are not rejected, best first."""
    found = _by_name(content)
    return [found[name] for name in content["by_quality"] if template.mark(found[name]) != "rejected"]


def _pareto_plot(content: Json) -> Markup:
    judged = _judged(content)
    scale, unit = (1e9, "GB") if max([c["size_bytes"] for c in judged], default=0) >= 1e9 else (1e6, "MB")
    spots = []
    for candidate in judged:
        mean = candidate["scores"]["lpips"]["mean"]
        y, low, high = (_positive(mean[key]) for key in ("value", "low", "high"))
        spots.append(Spot(candidate["name"], candidate["size_bytes"] / scale, y, low, high))
    floors = [_positive(scores["lpips"]["mean"]["value"]) for scores in content["floor"].values()]
    floor = max((value for value in floors if value is not None), default=None)
    front = [candidate["name"] for candidate in judged if candidate["pareto"]]
    return scatter(spots, "Size against mean LPIPS", unit, floor, log=True, front=front) if spots else Markup("")


def _positive(value: float | None) -> float | None:
    """What a logarithmic axis has a place for."""
    return value if value is not None and value > 0 else None


def _matrix(content: Json) -> list[tuple[str, list[Versus | None]]]:
    """A row for each candidate but the worst, with a cell for each but the best; None below the diagonal."""
    names = [candidate["name"] for candidate in _judged(content)]
    pairs = _pairs(content, "lpips")
    digits = template.digits_for(pair["difference"] for pair in pairs.values())
    rows = []
    for place, name in enumerate(names[:-1]):
        cells = [_versus(pairs.get(frozenset((name, other))), digits) for other in names[place + 1 :]]
        rows.append((name, [*[None] * place, *cells]))
    return rows


def _versus(pair: Json | None, digits: int) -> Versus | None:
    if pair is None:
        return None
    words = f"{pair['better']} is better than {pair['worse']} by {_found(pair)}"
    return Versus(template.fixed(pair["difference"], digits), words, pair["significant"])


def _neighbours(content: Json) -> Iterator[tuple[str, str, list[tuple[str, Json, str]]]]:
    """(better, worse, (metric's title, pair, what was found) for each metric) of each two neighbours by quality."""
    pairs = {metric: _pairs(content, metric) for metric in PAIRED}
    for one, other in pairwise(candidate["name"] for candidate in _judged(content)):
        found = [(title, pairs[metric].get(frozenset((one, other)))) for metric, title in PAIRED.items()]
        yield one, other, [(title, pair, _found(pair)) for title, pair in found if pair]


def _pairs(content: Json, metric: str) -> dict[frozenset[str], Json]:
    return {frozenset((p["better"], p["worse"])): p for p in content["pairs"] if p["metric"] == metric}


def _found(pair: Json) -> str:
    """`0.0123 [0.0101, 0.0145], on 14 of 16 prompts, p < 0.001`"""
    percent = pair["metric"] == "denoiser_error"
    scale, unit = (100, " percentage points") if percent else (1, " dB" if pair["metric"] == "psnr" else "")
    digits = 2 if unit else template.digits_for([pair["difference"]])
    bounds = template.interval(pair, digits, scale)
    difference = f"{template.fixed(pair['difference'], digits, scale)}{unit}{f' {bounds}' if bounds else ''}"
    p = template.p_value(pair["p"])
    return f"{difference}, on {pair['wins']} of {pair['prompts']} prompts, p {p if p.startswith('<') else f'= {p}'}"


def _rows(content: Json, folder: Path, digits: int) -> list[Row]:
    """Worst first, by the mean LPIPS of the candidates that are not rejected, or of all where all of them are."""
    shown = [candidate for name in content["by_quality"] if (candidate := _by_name(content)[name])["samples"]]
    samples = {c["name"]: {sample["picture"]: sample for sample in c["samples"]} for c in shown}
    judging = [c["name"] for c in _judged(content) if c["name"] in samples] or list(samples)
    order = sorted(
        samples[judging[0]] if judging else [],
        key=lambda picture: -fmean(samples[name][picture]["lpips"] for name in judging),
    )
    return [_row(picture, content, shown, samples, folder, digits) for picture in order]


def _row(
    picture: str, content: Json, shown: Sequence[Json], samples: Mapping[str, Json], folder: Path, digits: int
) -> Row:
    def embedded(pictures: str) -> Picture:
        return embed(open_picture(folder, f"{pictures}/{picture}"), LARGEST_PX)

    shots = [Shot("original", embedded(content["original"]["pictures"]), "")]
    for candidate in shown:
        sample = samples[candidate["name"]][picture]
        score = f"LPIPS {template.fixed(sample['lpips'], digits)}"
        shots.append(Shot(candidate["name"], embedded(candidate["pictures"]), score))
    return Row(picture.removesuffix(".png"), sample["prompt"], shots)


def _frames(content: Json, folder: Path) -> int:
    pictures = [sample["picture"] for candidate in content["candidates"] for sample in candidate["samples"][:1]]
    return count_frames(folder, f"{content['original']['pictures']}/{pictures[0]}") if pictures else 1
