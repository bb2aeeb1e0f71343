"""Pictures from a pipeline folder, the same seeds and settings for every pipeline."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import bitroute  # noqa: F401  registers the loader of bitroute's own container
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.loading import lift_gpu_check
from bitroute.errors import JobError, Problem


def generate(
    model: str | Path, prompts: Sequence[str], *, seed: int, call: Mapping[str, Any], device: str = "cpu"
) -> list[Image.Image]:
    """One picture per prompt; prompt i starts from the CPU noise of seed + i, whatever the device.

    model: a pipeline folder or builtin:NAME. call: further arguments of the pipeline (height, steps, …).

    Raises:
        SourceError: no such pipeline. JobError: diffusers cannot load or run it.
    """
    folder = open_pipeline(str(model)).folder
    try:
        pipe = _load(folder, device)
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
        pictures: list[Image.Image] = pipe(list(prompts), generator=generators, **call).images
    except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
        raise JobError(
            Problem(
                "the pipeline does not make pictures", str(folder), got=f"{type(error).__name__}: {error}"
            )
        ) from error
    del pipe
    gc.collect()
    return pictures


def _load(folder: Path, device: str) -> Any:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if _uses_bitsandbytes(folder) and not torch.cuda.is_available():
        lift_gpu_check()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device == "cpu" else pipe.to(device)


def _uses_bitsandbytes(folder: Path) -> bool:
    configs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*/config.json")]
    return any(
        (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes" for config in configs
    )
