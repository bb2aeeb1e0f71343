"""Every sample's distance from the original, and what all of them say together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from torch import Tensor

from bitroute.errors import JobError, Problem
from bitroute.eval.flip import flip
from bitroute.eval.intervals import Mean, Summary, summarize, summarize_psnr
from bitroute.eval.lpips import Lpips, upsampled
from bitroute.eval.metrics import (
    FEWEST_SCALES,
    format_db,
    frames,
    ms_ssim,
    mse,
    mse_to_db,
    pixels,
    scales_for,
    ssim,
)
from bitroute.eval.sampling import Sample

HIGHER_IS_BETTER = {"lpips": False, "psnr": True, "ssim": True, "ms_ssim": True, "flip": False}
TITLES = {"lpips": "LPIPS (AlexNet)", "psnr": "PSNR dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "flip": "FLIP"}


@dataclass(frozen=True)
class Scores:
    """metric → one value per sample, in the order of the sampling; PSNR of identical pictures is infinite."""

    values: Mapping[str, Sequence[float]]
    prompts: Sequence[int]
    notes: Sequence[str]

    def summary(self, metric: str) -> Summary:
        return summarize(self.values[metric], self.prompts, higher_is_better=HIGHER_IS_BETTER[metric])

    def mean(self, metric: str) -> float:
        return self.summary(metric).mean.value

    @property
    def db_of_mse(self) -> float:
        """PSNR of the mean squared error of all samples: one bad sample cannot hide among good ones."""
        return summarize_psnr(self.values["psnr"], self.prompts).of_mse.value

    @property
    def identical(self) -> bool:
        return all(math.isinf(value) for value in self.values["psnr"])

    def describe(self) -> dict[str, Any]:
        """Means with their 95 % intervals, medians, tails and worst samples; JSON-safe."""
        described = {metric: plain(asdict(self.summary(metric))) for metric in self.values}
        described["psnr"]["of_mse"] = plain(asdict(summarize_psnr(self.values["psnr"], self.prompts).of_mse))
        return described


class Pictures(Sequence[Tensor]):
    """What was drawn, uint8: pictures [3, H, W] and videos [f, 3, H, W], each read anew when it is asked for.

    Asking raises JobError for a file that is no longer what was drawn.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        self.folder, self.samples = folder, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.folder, self.samples[index])
        return _read_picture(self.folder / f"{self.samples[index].stem}.png")


def read_pictures(folder: Path, samples: Sequence[Sample]) -> Sequence[Tensor]:
    """One at a time in memory: a video of 81 frames takes 97 MB at 832x480."""
    return Pictures(folder, samples)


def _read_picture(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            found = [pixels(frame) for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError) as error:  # Pillow calls a damaged PNG a SyntaxError
        raise JobError(
            Problem("a drawn picture cannot be read", str(file), got=str(error),
                    next_step=f"remove {file.parent} and run the same command again")
        ) from error  # fmt: skip
    return torch.stack(found) if len(found) > 1 else found[0]


def score(samples: Sequence[Sample], originals: Sequence[Tensor], others: Sequence[Tensor]) -> Scores:
    """Raises JobError where a picture has another size or length than its original, or is too small to judge."""
    lpips = Lpips()
    rows, notes = [], list[str]()
    for first, second in zip(originals, others, strict=True):
        rows.append(_compare(first, second, lpips))
        notes = notes or list(_notes(first))
    values = {metric: [row[metric] for row in rows] for metric in TITLES}
    return Scores(values, [sample.prompt_index for sample in samples], notes)


def _compare(first: Tensor, second: Tensor, lpips: Lpips) -> dict[str, float]:
    """Every metric of one sample: of a video the mean over its frames, for PSNR of their squared differences."""
    one, other = frames(first), frames(second)
    if len(one) != len(other):
        got, next_step = f"{len(one)} and {len(other)} frames", "draw both with the same number of frames"
        raise JobError(Problem("videos of two lengths cannot be compared", got=got, next_step=next_step))
    found = [_compare_frames(a, b, lpips) for a, b in zip(one, other, strict=True)]
    means = {metric: sum(row[metric] for row in found) / len(found) for metric in found[0]}
    return {**means, "psnr": mse_to_db(means["mse"])}


def _compare_frames(first: Tensor, second: Tensor, lpips: Lpips) -> dict[str, float]:
    if torch.equal(first, second) and scales_for(*first.shape[1:]) >= FEWEST_SCALES:
        return {"lpips": 0.0, "mse": 0.0, "ssim": 1.0, "ms_ssim": 1.0, "flip": 0.0}
    return {
        "lpips": lpips.distance(first, second), "mse": mse(first, second), "ssim": ssim(first, second),
        "ms_ssim": ms_ssim(first, second).value, "flip": flip(first, second).mean,
    }  # fmt: skip


def _notes(picture: Tensor) -> Iterator[str]:
    """What the size and the kind of the pictures mean for their scores."""
    if (scales := scales_for(*picture.shape[-2:])) < 5:
        yield f"MS-SSIM with {scales} of its 5 scales: the pictures are small"
    if upsampled(*picture.shape[-2:]):
        yield "LPIPS on pictures enlarged to 64 px"
    if picture.ndim == 4:
        yield "Scores of a video are means over its frames; its PSNR is that of their mean squared difference"


def unrelated_lpips(samples: Sequence[Sample], pictures: Sequence[Tensor]) -> float | None:
    """How far the original's pictures are from each other: each from that of the next prompt.

    Of videos, the frames in the middle. None for one prompt, or where no two of them have pictures of one size.
    """
    places = {(sample.prompt_index, sample.seed): place for place, sample in enumerate(samples)}
    prompts = max(sample.prompt_index for sample in samples) + 1
    distance, found = Lpips().distance, []
    for (index, seed), place in places.items() if prompts > 1 else ():
        first, second = (_middle(pictures[p]) for p in (place, places[(index + 1) % prompts, seed]))
        if first.shape == second.shape:
            found.append(distance(first, second))
    return sum(found) / len(found) if found else None


def _middle(picture: Tensor) -> Tensor:
    parts = frames(picture)
    return parts[len(parts) // 2]


def words(metric: str, mean: Mean) -> str:
    """`0.00021 [0.00012, 0.00031]`, `48.6 [47.9, 49.2]`, or `identical`."""
    if math.isinf(mean.value):
        return format_db(mean.value)
    digits = _digits(metric, mean)
    interval = "" if mean.low is None else f" [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"
    return f"{mean.value:.{digits}f}{interval}"


def _digits(metric: str, mean: Mean) -> int:
    """Decimals that show two figures of a distance, and where a similarity leaves 1."""
    if metric == "psnr":
        return 1
    if metric not in ("lpips", "flip"):
        return 4
    return min(max(1 - math.floor(math.log10(mean.value)), 2), 6) if mean.value > 0 else 2


def plain(value: Any) -> Any:
    """JSON has no infinity: identical pictures are called so."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "identical" if isinstance(value, float) and math.isinf(value) else value
