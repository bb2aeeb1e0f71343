"""Pictures that no score can be trusted on: what stops a report, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.checkpoint import Component, open_pipeline
from bitroute.convert.reading import read_tensor
from bitroute.errors import SourceError
from bitroute.eval.generate import is_text_encoder
from bitroute.eval.metrics import frames
from bitroute.eval.recording import open_tensors
from bitroute.eval.sampling import Sample

FLAT_STD = 2.0  # of 255: below it a picture is one colour
SATURATED = 0.98  # of the values at 0 or 255; white backgrounds leave colours elsewhere

FAR = 0.6  # LPIPS, where there are no other prompts to compare with; noise is 0.65 from a picture
BROKEN_TEXT = 0.5  # relative error of a text encoder; in four bits it is 0.06


def bad_pictures(samples: Sequence[Sample], pictures: Sequence[Tensor], folder: Path) -> Iterator[str]:
    """Why these pictures ([3, H, W] uint8; videos [f, 3, H, W]) or their latents are broken, a sentence for each kind.

    Frames are counted from 0.
    """
    broken = [sample.stem for sample in samples if not _latents_are_finite(folder / f"{sample.stem}.safetensors")]
    if broken:
        yield f"NaN or infinite latents in {_named(broken)}"
    flat, saturated, same = list[str](), list[str](), defaultdict[bytes, list[Sample]](list)
    for sample, picture in zip(samples, pictures, strict=True):
        flat += _bad_frames(sample, picture, _is_flat)
        saturated += _bad_frames(sample, picture, _is_saturated)
        same[sha256(picture.contiguous().numpy().data).digest()].append(sample)
    if flat:
        yield f"pictures of a single colour: {_named(flat)}"
    if saturated:
        yield f"saturated pictures: {_named(saturated)}"
    for group in same.values():
        if len({sample.prompt for sample in group}) > 1:
            yield f"identical pictures for different prompts: {_named([sample.stem for sample in group])}"


def unquantized(original: Path, candidate: Path, share_text: bool) -> Iterator[str]:
    """A sentence where every weight that is used is still the original's, bit for bit, however it is stored."""
    first, second = open_pipeline(str(original)).components, open_pipeline(str(candidate)).components
    names = [name for name in second if name in first]
    text = [name for name in names if is_text_encoder(second[name])] if share_text else []
    if not names or not all(same_weights(first[name], second[name]) for name in names if name not in text):
        return
    if all(same_weights(first[name], second[name]) for name in text):
        yield "every component holds the original's weights: nothing is quantized"
    else:
        yield "only text encoders are quantized, and the original's were used: evaluate with --own-text"


def unrelated(lpips: float, of_other_prompts: float | None) -> Iterator[str]:
    """A sentence where the candidate is as far from the original as pictures of something else."""
    what = f"the pictures have nothing to do with the original's: LPIPS {lpips:.2f}"
    if of_other_prompts is not None and lpips >= of_other_prompts:
        yield f"{what}, and those of other prompts are {of_other_prompts:.2f} away"
    elif of_other_prompts is None and lpips >= FAR:
        yield f"{what}, and from {FAR} on no candidate is believed"


def broken_text(errors: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each text encoder that does not say what the original's says, whoever's drew the pictures."""
    for name, found in errors.items():
        if found["relative_error"] > BROKEN_TEXT:
            yield f"{name!r} encodes prompts unlike the original's: relative error {found['relative_error']:.2f}"


def _latents_are_finite(file: Path) -> bool:
    if not file.is_file():
        return True
    steps = open_tensors(file)
    return all(bool(steps.get_tensor(name).isfinite().all()) for name in steps.keys())  # noqa: SIM118  no mapping


def _bad_frames(sample: Sample, picture: Tensor, is_bad: Callable[[Tensor], bool]) -> list[str]:
    """The sample's name where all of it is bad, otherwise each frame that is."""
    verdicts = [is_bad(frame) for frame in frames(picture)]
    if all(verdicts):
        return [sample.stem]
    return [f"frame {index} of {sample.stem}" for index, bad in enumerate(verdicts) if bad]


def _is_flat(picture: Tensor) -> bool:
    return bool(picture.float().std(dim=(1, 2)).max() < FLAT_STD)


def _is_saturated(picture: Tensor) -> bool:
    return float(((picture == 0) | (picture == 255)).all(dim=0).float().mean()) > SATURATED


def same_weights(first: Component, second: Component) -> bool:
    """Reads no further than the first difference; what cannot be read is not the same."""
    try:
        one, other = first.tensors, second.tensors
        if {name: t.spec for name, t in one.items()} != {name: t.spec for name, t in other.items()}:
            return False
        return all(_same_bits(read_tensor(one[name]), read_tensor(other[name])) for name in one)
    except SourceError:
        return False


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _named(stems: Sequence[str]) -> str:
    return f"{', '.join(stems[:3])}{f' and {len(stems) - 3} more' if len(stems) > 3 else ''} (prompt-seed)"
