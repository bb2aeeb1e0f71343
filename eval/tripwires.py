"""Pictures that no score can be trusted on: what stops a report, with the reason."""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from bitroute.convert.checkpoint import open_pipeline
from bitroute.eval.sampling import Sample

FLAT_STD = 2.0  # of 255: below it a picture is one colour
SATURATED = 0.98  # of the values at 0 or 255; white backgrounds leave colours elsewhere


def bad_pictures(samples: Sequence[Sample], pictures: Sequence[Tensor], folder: Path) -> Iterator[str]:
    """Why these pictures ([3, H, W] uint8) or their latents are broken, one sentence for each kind."""
    broken = [sample.stem for sample in samples if not _latents_are_finite(folder / f"{sample.stem}.safetensors")]
    if broken:
        yield f"NaN or infinite latents in {_named(broken)}"
    flat = [s.stem for s, picture in zip(samples, pictures, strict=True) if picture.float().std() < FLAT_STD]
    if flat:
        yield f"pictures of a single colour: {_named(flat)}"
    saturated = [s.stem for s, picture in zip(samples, pictures, strict=True) if _extreme(picture) > SATURATED]
    if saturated:
        yield f"saturated pictures: {_named(saturated)}"
    for same in _same_pictures(samples, pictures):
        yield f"identical pictures for different prompts: {_named(same)}"


def unquantized(original: Path, candidate: Path) -> Iterator[str]:
    """A sentence where the candidate's weights are still the original's, byte for byte."""
    first, second = open_pipeline(str(original)), open_pipeline(str(candidate))
    shared = [name for name in second.components if name in first.components]
    if shared and all(_same_files(first.components[n].folder, second.components[n].folder) for n in shared):
        yield "every component holds the original's weights: nothing is quantized"


def _latents_are_finite(file: Path) -> bool:
    return not file.is_file() or bool(load_file(file)["latents"].isfinite().all())


def _extreme(picture: Tensor) -> float:
    return float(((picture == 0) | (picture == 255)).all(dim=0).float().mean())


def _same_pictures(samples: Sequence[Sample], pictures: Sequence[Tensor]) -> Iterator[list[str]]:
    groups: dict[bytes, list[Sample]] = defaultdict(list)
    for sample, picture in zip(samples, pictures, strict=True):
        groups[picture.contiguous().numpy().tobytes()].append(sample)
    for group in groups.values():
        if len({sample.prompt for sample in group}) > 1:
            yield [sample.stem for sample in group]


def _same_files(first: Path, second: Path) -> bool:
    names = {file.name for folder in (first, second) for file in folder.glob("*.safetensors")}
    both = all((first / name).is_file() and (second / name).is_file() for name in names)
    return both and all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


def _named(stems: Sequence[str]) -> str:
    return f"{', '.join(stems[:3])}{f' and {len(stems) - 3} more' if len(stems) > 3 else ''} (prompt-seed)"
