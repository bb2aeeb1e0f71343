"""`report.html`: the content of report.json as one page that needs no network, no other file and no script."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bitroute.convert.table import size
from bitroute.eval.pictures import (
    LOSSLESS_PX,
    WEBP_QUALITY,
    Difference,
    Picture,
    amplification,
    difference_map,
    distances,
    embed,
    open_picture,
)  # fmt: skip
from bitroute.eval.plots import Line, Spot, Strip, lines, scatter, strips
from bitroute.eval.scores import HIGHER_IS_BETTER

WORST, BEST = 5, 1  # samples shown in full; the others in a grid
WORST_LAYERS = 12
MARKS = {"pass": "✔", "fail": "✘", "rejected": "⚠", "no gate": "○"}
TITLES = {"lpips": "LPIPS", "psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
PERFECT = {"lpips": 0.0, "ssim": 1.0, "ms_ssim": 1.0}
EXPLANATIONS = {
    "lpips": "learned perceptual distance, from AlexNet features; 0 is identical",
    "psnr": "peak signal-to-noise ratio in dB, from the mean squared error of the pixels; identical has no number",
    "ssim": "structural similarity of small windows; 1 is identical",
    "ms_ssim": "structural similarity over several scales; 1 is identical",
}


@dataclass(frozen=True)
class Cell:
    """A mean as the table shows it; every cell of a column has equally many decimals."""

    value: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Shot:
    """One sample of one candidate; original: the number of the shared picture; difference: only where shown in full."""

    rank: str
    sample: Mapping[str, Any]
    original: int
    picture: Picture
    difference: Difference | None

    @property
    def name(self) -> str:
        return str(self.sample["picture"]).removesuffix(".png")


@dataclass(frozen=True)
class Gallery:
    """A candidate's samples, worst first; factor is the amplification of all its difference maps."""

    full: Sequence[Shot]
    rest: Sequence[Shot]
    factor: int


class Originals:
    """The original's pictures, each embedded once however many candidates are compared with it."""

    def __init__(self, root: Path, folder: str) -> None:
        self.root, self.folder = root, folder
        self.pictures: dict[str, Picture] = {}

    def number(self, name: str) -> int:
        if name not in self.pictures:
            self.pictures[name] = embed(self.image(name))
        return list(self.pictures).index(name)

    def image(self, name: str) -> Image.Image:
        return open_picture(self.root, f"{self.folder}/{name}")


def write_page(content: Mapping[str, Any], folder: Path) -> Path:
    """Draws `content` (docs/report.md) with the pictures below `folder` into `folder`/report.html.

    Raises:
        JobError: a picture is missing or damaged.
    """
    partial, file = folder / "report.html.part", folder / "report.html"
    partial.write_text(render(content, folder), encoding="utf-8")
    os.replace(partial, file)
    return file


def render(content: Mapping[str, Any], folder: Path) -> str:
    """The page's HTML. Prompts, names and recipes come from strangers: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("bitroute.eval", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"bytes": size, "mark": mark, "script_hash": _script_hash, "ratio": _ratio}
    digits = decimals(content)
    originals = Originals(folder, content["original"]["pictures"])
    return environment.get_template("report.html.j2").render(
        report=content,
        galleries=[_gallery(candidate, originals, folder) for candidate in content["candidates"]],
        originals=list(originals.pictures.values()),
        components=list(dict.fromkeys(name for c in content["candidates"] for name in c["bits_per_weight"])),
        cell=lambda scores, metric: cell(scores[metric], digits[metric]),
        score=lambda sample, metric: _fixed(sample[metric], digits[metric]),
        marks=MARKS, titles=TITLES, explanations=EXPLANATIONS, higher_is_better=HIGHER_IS_BETTER,
        plots=list(_plots(content)), worst_layers=WORST_LAYERS, highest_error=_highest_error(content),
        quality=WEBP_QUALITY, lossless_px=LOSSLESS_PX,
    )  # fmt: skip


def mark(candidate: Mapping[str, Any]) -> str:
    """pass, fail or rejected; `no gate` where nothing was asked of the candidate."""
    if candidate["tripwires"] or not candidate["scores"]:
        return "rejected"
    if not candidate["gate"]:
        return "no gate"
    return "pass" if candidate["passed"] else "fail"


def decimals(content: Mapping[str, Any]) -> dict[str, int]:
    """metric → decimals with which even the mean nearest to perfect keeps two digits; PSNR has two."""
    found = {"psnr": 2}
    for metric, perfect in PERFECT.items():
        means = [float(scores[metric]["mean"]["value"]) for scores in _all_scores(content)]
        gaps = [abs(mean - perfect) for mean in means if abs(mean - perfect) > 1e-9]
        found[metric] = min(6, max(3, 1 - math.floor(math.log10(min(gaps))))) if gaps else 3
    return found


def cell(summary: Mapping[str, Any], digits: int) -> Cell:
    mean = summary["mean"]
    sides = [] if mean["low"] == mean["high"] else [mean["low"], mean["high"]]
    bounds = [_fixed(side, digits) for side in sides]
    note = f"{summary['identical']} more identical" if summary["identical"] and mean["value"] != "identical" else ""
    return Cell(_fixed(mean["value"], digits), f"[{', '.join(bounds)}]" if bounds else "", note)


def _fixed(value: float | str, digits: int) -> str:
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def _all_scores(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from content["floor"].values()
    yield from (candidate["scores"] for candidate in content["candidates"] if candidate["scores"])


def _gallery(candidate: Mapping[str, Any], originals: Originals, root: Path) -> Gallery:
    if not candidate["pictures"]:
        return Gallery([], [], 1)
    samples = sorted(candidate["samples"], key=lambda sample: sample["lpips"], reverse=True)
    images = {
        sample["picture"]: open_picture(root, f"{candidate['pictures']}/{sample['picture']}") for sample in samples
    }
    full = samples if len(samples) <= WORST + BEST else [*samples[:WORST], *samples[-BEST:]]
    names = [sample["picture"] for sample in full]
    maps = {name: distances(originals.image(name), images[name]) for name in names}
    factor = amplification(list(maps.values())) if maps else 1
    shots = [
        Shot(
            _rank(samples.index(sample), len(samples)), sample, originals.number(name), embed(images[name]),
            difference_map(maps[name], factor) if name in maps else None,
        )
        for sample in samples for name in [sample["picture"]]
    ]  # fmt: skip
    return Gallery([s for s in shots if s.difference], [s for s in shots if not s.difference], factor)


def _rank(place: int, samples: int) -> str:
    if samples == 1:
        return "the only sample"
    if place == samples - 1:
        return "best"
    return "worst" if place == 0 else f"{('2nd', '3rd')[place - 1] if place < 3 else f'{place + 1}th'} worst"


def _plots(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Markup]]:
    """(heading, how to read it, SVG), without those that have nothing to show."""
    scored = [candidate for candidate in content["candidates"] if candidate["scores"]]
    found = [*_distributions(content, scored), _size_plot(content, scored), _trajectory_plot(scored)]
    yield from (plot for plot in found if plot[2])


def _distributions(
    content: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, Markup]]:
    how = "Better is to the {}. A dot is a sample, a bar the mean with its 95 % interval; dashed: the noise floor."
    for metric, perfect, better in (("lpips", "0", "left"), ("psnr", "identical", "right")):
        rows = [_strip(f"noise floor: {what}", scores[metric], metric, []) for what, scores in content["floor"].items()]
        rows += [_strip(c["name"], c["scores"][metric], metric, c["samples"]) for c in scored]
        heading = f"{TITLES[metric]} of each sample{', log scale' if metric == 'lpips' else ', dB'}"
        plot = strips(rows, f"{heading}, for the noise floor and each candidate", perfect, log=metric == "lpips")
        yield heading, how.format(better), plot


def _strip(name: str, summary: Mapping[str, Any], metric: str, samples: Iterable[Mapping[str, Any]]) -> Strip:
    dots = [(_place(sample[metric], metric), f"{sample['prompt'][:80]}, seed {sample['seed']}") for sample in samples]
    mean, low, high = (_place(summary["mean"][key], metric) for key in ("value", "low", "high"))
    return Strip(name, dots, mean, low, high, floor=name.startswith("noise floor: ") and not dots)


def _place(value: float | str | None, metric: str) -> float | None:
    """None for a perfect score, and for a bound that there is not."""
    return None if value is None or isinstance(value, str) or (metric == "lpips" and value <= 0) else value


def _size_plot(content: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]) -> tuple[str, str, Markup]:
    scale, unit = (1e9, "GB") if content["original"]["size_bytes"] >= 1e9 else (1e6, "MB")
    spots = []
    for candidate in scored:
        mean = candidate["scores"]["psnr"]["mean"]
        y, low, high = (_place(mean[key], "psnr") for key in ("value", "low", "high"))
        spots.append(Spot(candidate["name"], candidate["size_bytes"] / scale, y, low, high))
    floors = [_place(scores["psnr"]["mean"]["value"], "psnr") for scores in content["floor"].values()]
    floor = min((value for value in floors if value is not None), default=None)
    plot = scatter(spots, "Size against mean PSNR", unit, floor) if len(spots) > 1 else Markup("")
    return "Size against mean PSNR, dB", "Up and to the left is better; lines are 95 % intervals.", plot


def _trajectory_plot(scored: Sequence[Mapping[str, Any]]) -> tuple[str, str, Markup]:
    series = [_trajectory(c["name"], c["trajectory"]["timesteps"]) for c in scored if c.get("trajectory")]
    how = "Relative error of the denoiser's output when each step starts from the original's latents; lower is better."
    return (
        "Error per denoising step",
        how,
        lines(series, "Relative error per denoising step") if series else Markup(""),
    )


def _highest_error(content: Mapping[str, Any]) -> float:
    """Of any candidate's layers, so that their bars have one scale."""
    return max((x["relative_error"] for c in content["candidates"] for x in c.get("layers") or []), default=0) or 1


def _trajectory(name: str, steps: Sequence[Mapping[str, Any]]) -> Line:
    bounded = [step for step in steps if step.get("low") is not None and step.get("high") is not None]
    band = [(step["step"], step["low"], step["high"]) for step in bounded]
    return Line(name, [(step["step"], step["relative_error"]) for step in steps], band)


def _ratio(value: float | None, original: float | None) -> str:
    return f"{value / original:.2f}×" if value and original else ""


def _script_hash(script: str) -> str:
    """For the page's content security policy: only this script runs, whatever a prompt holds."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
