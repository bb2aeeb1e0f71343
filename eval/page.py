"""`report.html`: the content of report.json as one page that needs no network, no other file and no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from bitroute.eval import template
from bitroute.eval.pictures import (
    Maps,
    Picture,
    amplification,
    count_frames,
    distances,
    draw_maps,
    embed,
    open_picture,
)  # fmt: skip
from bitroute.eval.plots import Line, Spot, Strip, lines, scatter, strips

WORST, BEST = 5, 1  # samples shown in full; the others in a grid
WORST_LAYERS = 12


@dataclass(frozen=True)
class Shot:
    """One sample of one candidate; original: the number of the shared picture; maps: only where shown in full."""

    rank: str
    sample: Mapping[str, Any]
    original: int
    picture: Picture
    maps: Maps | None

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

    @property
    def frames(self) -> int:
        """Above 1 where the samples are videos."""
        return max((count_frames(self.root, f"{self.folder}/{name}") for name in self.pictures), default=1)


def write_page(content: Mapping[str, Any], folder: Path) -> Path:
    """Draws `content` (docs/report.md) with the pictures below `folder` into `folder`/report.html.

    Raises:
        JobError: a picture is missing or damaged.
    """
    return template.write_page(folder / "report.html", render(content, folder))


def render(content: Mapping[str, Any], folder: Path) -> str:
    digits = template.decimals(content)
    originals = Originals(folder, content["original"]["pictures"])
    galleries = [_gallery(candidate, originals, folder) for candidate in content["candidates"]]
    return template.fill(
        "report.html.j2",
        report=content, galleries=galleries, originals=list(originals.pictures.values()), frames=originals.frames,
        components=list(dict.fromkeys(name for c in content["candidates"] for name in c["bits_per_weight"])),
        cell=lambda scores, metric: template.cell(scores[metric], digits[metric]),
        score=lambda sample, metric: template.fixed(sample[metric], digits[metric]),
        plots=list(_plots(content)), worst_layers=WORST_LAYERS, highest_error=_highest_error(content),
    )  # fmt: skip


def _gallery(candidate: Mapping[str, Any], originals: Originals, root: Path) -> Gallery:
    if not candidate["pictures"]:
        return Gallery([], [], 1)
    samples = sorted(candidate["samples"], key=lambda sample: sample["lpips"], reverse=True)
    images = {
        sample["picture"]: open_picture(root, f"{candidate['pictures']}/{sample['picture']}") for sample in samples
    }
    full = samples if len(samples) <= WORST + BEST else [*samples[:WORST], *samples[-BEST:]]
    names = [sample["picture"] for sample in full]
    factor = amplification([distances(originals.image(name), images[name]) for name in names]) if names else 1
    shots = [
        Shot(
            _rank(samples.index(sample), len(samples)), sample, originals.number(name), embed(images[name]),
            draw_maps(originals.image(name), images[name], factor) if name in names else None,
        )
        for sample in samples for name in [sample["picture"]]
    ]  # fmt: skip
    return Gallery([s for s in shots if s.maps], [s for s in shots if not s.maps], factor)


def _rank(place: int, samples: int) -> str:
    if samples == 1:
        return "the only sample"
    if place == samples - 1:
        return "best"
    return "worst" if place == 0 else f"{('2nd', '3rd')[place - 1] if place < 3 else f'{place + 1}th'} worst"


def _plots(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Markup]]:
    """(heading, how to read it, SVG), without those that have nothing to show."""
    scored = [candidate for candidate in content["candidates"] if candidate["scores"]]
    found = [
        *_distributions(content, scored),
        _size_plot(content, scored),
        _trajectory_plot(scored),
        _drift_plot(scored),
    ]
    yield from (plot for plot in found if plot[2])


def _distributions(
    content: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, Markup]]:
    how = "Better is to the {}. A dot is a sample, a bar the mean with its 95 % interval; dashed: the noise floor."
    for metric, perfect, better in (("lpips", "0", "left"), ("psnr", "identical", "right")):
        rows = [_strip(f"noise floor: {what}", scores[metric], metric, []) for what, scores in content["floor"].items()]
        rows += [_strip(c["name"], c["scores"][metric], metric, c["samples"]) for c in scored]
        heading = f"{template.TITLES[metric]} of each sample{', log scale' if metric == 'lpips' else ', dB'}"
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
    series = [_per_step(c["name"], c["trajectory"]["timesteps"]) for c in scored if c.get("trajectory")]
    how = "Relative error of the denoiser's output when each step starts from the original's latents; lower is better."
    return "Error per denoising step", how, lines(series, "Relative error per denoising step")


def _drift_plot(scored: Sequence[Mapping[str, Any]]) -> tuple[str, str, Markup]:
    series = [_per_step(c["name"], c["drift"]) for c in scored if c.get("drift")]
    how = (
        "Relative distance of the latents from the original's after each step when every pipeline follows its own "
        "latents, so that errors add up; lower is better. The last step's are the final latents."
    )
    return "Free-running latent drift", how, lines(series, "Relative distance of the latents per denoising step")


def _highest_error(content: Mapping[str, Any]) -> float:
    """Of any candidate's layers, so that their bars have one scale."""
    return max((x["relative_error"] for c in content["candidates"] for x in c.get("layers") or []), default=0) or 1


def _per_step(name: str, steps: Sequence[Mapping[str, Any]]) -> Line:
    bounded = [step for step in steps if step.get("low") is not None and step.get("high") is not None]
    band = [(step["step"], step["low"], step["high"]) for step in bounded]
    return Line(name, [(step["step"], step["relative_error"]) for step in steps], band)
