"""How far a candidate's latents run away from the original's when each pipeline follows its own.

Unlike a replay's, these errors add up from step to step; the last entry is that of the final latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bitroute.errors import JobError, Problem
from bitroute.eval.recording import open_tensors
from bitroute.eval.replay import checked_error, mean_error
from bitroute.eval.sampling import Sample

PREFIX = "latents/"  # before the number of the step in a tensor's name


def drift(original: Path, candidate: Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """||x_q - x|| / ||x|| of the latents after each step: mean over samples, interval over prompts, as the report's.

    original, candidate: folders of drawn samples. Empty where a sample's latents were not kept step by step, as of
    pipelines that do not show them.

    Raises:
        JobError: other steps or shapes than the original's, latents that are not finite, or a damaged file.
    """
    files = [[folder / f"{sample.stem}.safetensors" for folder in (original, candidate)] for sample in samples]
    errors = [_errors(first, second) for first, second in files]
    if not all(errors):
        return []
    by_step: dict[int, list[tuple[float, int]]] = {}
    for sample, found in zip(samples, errors, strict=True):
        for step, error in found.items():
            by_step.setdefault(step, []).append((error, sample.prompt_index))
    return [{"step": step, **mean_error(*zip(*found, strict=True))} for step, found in sorted(by_step.items())]


def _errors(original: Path, candidate: Path) -> dict[int, float]:
    """Of one sample, by step; two tensors are in memory at a time."""
    if not (original.is_file() and candidate.is_file()):
        return {}
    where = f"latents of {candidate.stem}"
    wanted, found = open_tensors(original), open_tensors(candidate)
    steps, own = _steps(wanted.keys()), _steps(found.keys())
    if not steps or not own:
        return {}
    if steps != own:
        got, expected = f"latents of {len(own)} steps", f"{len(steps)} steps"
        raise JobError(Problem("the steps are not the original's", where, got, expected))
    return {
        step: checked_error(
            found.get_tensor(f"{PREFIX}{step}"), wanted.get_tensor(f"{PREFIX}{step}"), f"{where}, step {step}"
        )
        for step in steps
    }


def _steps(names: Iterable[str]) -> list[int]:
    return sorted(int(name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX))
