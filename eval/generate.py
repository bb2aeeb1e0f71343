"""Draws a sampling with one pipeline: pictures or videos, and the latents of each step; resumable.

Run as a module with a JSON request on stdin it draws in a process of its own, so that a crash of a kernel stays
there and peak memory is that of one pipeline.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import bitroute  # noqa: F401  registers the loader of bitroute's own container
from bitroute.convert.checkpoint import Component, open_pipeline
from bitroute.convert.loading import lift_gpu_check
from bitroute.convert.reading import read_json
from bitroute.errors import SourceError
from bitroute.eval.apart import Heard, answer, run_apart, tell
from bitroute.eval.calling import find_class, frames_of, run_pipeline, watch_latents
from bitroute.eval.sampling import Sample, Sampling


def draw_apart(
    model: Path, sampling: Sampling, folder: Path, text_from: Path | None = None, heard: Heard | None = None
) -> dict[str, Any]:
    """Draws in a fresh process; returns the run's measurements (seconds, bytes).

    Raises:
        JobError: diffusers cannot load or run the pipeline, with what it said.
    """
    if not _is_finished(sampling, folder):
        request: dict[str, Any] = {
            "model": str(model),
            "folder": str(folder),
            "text_from": str(text_from) if text_from else None,
        }
        request["sampling"] = sampling.request()
        run_apart("bitroute.eval.generate", request, "the pipeline does not draw", model, heard)
    return read_json(folder / "run.json")


def draw(model: Path, sampling: Sampling, folder: Path, text_from: Path | None = None) -> None:
    """Writes `<sample>.png` and `<sample>.safetensors` for every sample, then run.json.

    A video is an animated PNG. The other file holds `latents/0`, `latents/1`, … as the pipeline has them after each
    step, in its dtype and shape.

    text_from: the pipeline whose text encoders are used instead of the model's own, so that prompts are encoded
    alike. Samples that are there already are not drawn again; of two processes that want the same, one waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not _is_finished(sampling, folder):
            _draw_missing(model, sampling, folder, text_from)


def _draw_missing(model: Path, sampling: Sampling, folder: Path, text_from: Path | None) -> None:
    torch.set_num_threads(sampling.threads)
    started = time.perf_counter()
    pipe = load(model, sampling.device, text_from, sampling.pipeline)
    load_seconds = time.perf_counter() - started
    drawn, steps, started = 0, 0, time.perf_counter()
    samples = list(sampling.samples())
    for number, sample in enumerate(samples, start=1):
        if not (folder / f"{sample.stem}.png").is_file():
            steps += _draw_sample(pipe, sampling, sample, folder)
            drawn += 1
        tell(number, len(samples))
    seconds = time.perf_counter() - started
    measured = {
        "load_seconds": load_seconds, "pictures": drawn, "seconds_per_step": seconds / steps if steps else None,
        "peak_bytes": _peak_bytes(), "peak_device_bytes": _peak_device_bytes(sampling.device),
    }  # fmt: skip
    partial = folder / "run.json.part"
    partial.write_text(json.dumps(measured), encoding="utf-8")
    os.replace(partial, folder / "run.json")


def load(model: Path, device: str, text_from: Path | None = None, pipeline: str | None = None) -> Any:
    """The pipeline in bf16, its text encoders taken from `text_from` where that is given.

    pipeline: the diffusers class to use instead of the model's own.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        lift_gpu_check()
    shared = _text_encoders(text_from) if text_from else {}
    pipeline_class: Any = find_class(pipeline) if pipeline else diffusers.DiffusionPipeline
    pipe = pipeline_class.from_pretrained(model, dtype=torch.bfloat16, **shared)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device == "cpu" else pipe.to(device)


def _is_finished(sampling: Sampling, folder: Path) -> bool:
    """run.json is written last; a picture may have been removed since."""
    drawn = all((folder / f"{sample.stem}.png").is_file() for sample in sampling.samples())
    return drawn and _is_sound(folder / "run.json")


def _is_sound(measured: Path) -> bool:
    """Whether it is there, with nothing but numbers."""
    try:
        values = read_json(measured).values()
    except SourceError:
        return False
    return bool(values) and all(v is None or (isinstance(v, int | float) and math.isfinite(v)) for v in values)


def _text_encoders(folder: Path) -> Mapping[str, Any]:
    import transformers

    pipeline = open_pipeline(str(folder))
    return {
        name: getattr(transformers, part.class_name).from_pretrained(part.folder, dtype=torch.bfloat16)
        for name, part in pipeline.components.items()
        if is_text_encoder(part)
    }


def is_text_encoder(component: Component) -> bool:
    return component.library == "transformers" and component.name.startswith("text_encoder")


def _draw_sample(pipe: Any, sampling: Sampling, sample: Sample, folder: Path) -> int:
    """One picture or video and its latents; the picture last, because it marks the sample as done. Returns steps."""
    latents: list[Tensor] = []

    def keep(found: Tensor) -> None:
        """A copy: pipelines may change their latents in place."""
        latents.append(found.detach().to("cpu", copy=True).contiguous())

    with watch_latents(pipe, keep) as options:
        frames = frames_of(run_pipeline(pipe, sampling, sample, **options))
    if latents:
        steps = {f"latents/{index}": found for index, found in enumerate(latents)}
        save_file(steps, folder / f"{sample.stem}.safetensors")
    save_frames(frames, folder / f"{sample.stem}.png")
    return len(latents) or 1


def save_frames(frames: Sequence[Image.Image], file: Path) -> None:
    """A PNG, animated where there are several; no durations, because Pillow merges equal frames that have one."""
    partial = file.with_name(f"{file.name}.part")
    frames[0].save(partial, format="PNG", save_all=True, append_images=frames[1:])
    os.replace(partial, file)


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    try:
        import resource
    except ImportError:  # Windows
        memory: Any = psutil.Process().memory_info()
        return int(memory.peak_wset)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _peak_device_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def _work(request: dict[str, Any]) -> None:
    text_from = Path(request["text_from"]) if request["text_from"] else None
    draw(Path(request["model"]), Sampling(**request["sampling"]), Path(request["folder"]), text_from)


if __name__ == "__main__":
    answer(_work)
