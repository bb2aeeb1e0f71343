"""Every sample's distance from the original, and what all of them say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bitroute.errors import JobError, Problem
from bitroute.eval.intervals import Mean, Summary, summarize, summarize_psnr
from bitroute.eval.lpips import Lpips, upsampled
from bitroute.eval.metrics import format_db, ms_ssim, pixels, psnr_db, ssim
from bitroute.eval.sampling import Sample

HIGHER_IS_BETTER = {"lpips": False, "psnr": True, "ssim": True, "ms_ssim": True}
TITLES = {"lpips": "LPIPS (AlexNet)", "psnr": "PSNR dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}


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


def read_pictures(folder: Path, samples: Sequence[Sample]) -> list[Tensor]:
    """Raises JobError for a picture that is no longer what was drawn."""
    return [_read_picture(folder / f"{sample.stem}.png") for sample in samples]


def _read_picture(file: Path) -> Tensor:
    try:
        return pixels(Image.open(file))
    except (OSError, SyntaxError) as error:  # Pillow calls a damaged PNG a SyntaxError
        raise JobError(
            Problem("a drawn picture cannot be read", str(file), got=str(error),
                    next_step=f"remove {file.parent} and run the same command again")
        ) from error  # fmt: skip


def score(samples: Sequence[Sample], originals: Sequence[Tensor], others: Sequence[Tensor]) -> Scores:
    """Raises JobError where a picture has another size than its original, or is too small to judge."""
    distance = Lpips().distance
    pairs = list(zip(originals, others, strict=True))
    multi = [ms_ssim(first, second) for first, second in pairs]
    values = {
        "lpips": [distance(first, second) for first, second in pairs],
        "psnr": [psnr_db(first, second) for first, second in pairs],
        "ssim": [ssim(first, second) for first, second in pairs],
        "ms_ssim": [found.value for found in multi],
    }
    notes = [] if multi[0].scales == 5 else [f"MS-SSIM with {multi[0].scales} of its 5 scales: the pictures are small"]
    if upsampled(*originals[0].shape[1:]):
        notes.append("LPIPS on pictures enlarged to 64 px")
    return Scores(values, [sample.prompt_index for sample in samples], notes)


def unrelated_lpips(samples: Sequence[Sample], pictures: Sequence[Tensor]) -> float | None:
    """How far the original's pictures are from each other: each from that of the next prompt; None for one prompt."""
    by_place = {(sample.prompt_index, sample.seed): p for sample, p in zip(samples, pictures, strict=True)}
    prompts = max(sample.prompt_index for sample in samples) + 1
    if prompts == 1:
        return None
    distance = Lpips().distance
    found = [distance(p, by_place[(index + 1) % prompts, seed]) for (index, seed), p in by_place.items()]
    return sum(found) / len(found)


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
    if metric != "lpips":
        return 4
    return min(max(1 - math.floor(math.log10(mean.value)), 2), 6) if mean.value > 0 else 2


def plain(value: Any) -> Any:
    """JSON has no infinity: identical pictures are called so."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "identical" if isinstance(value, float) and math.isinf(value) else value
