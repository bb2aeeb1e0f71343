"""Is the quantized model still good? Draws original and candidates alike, scores them, and says so with a floor."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.describe import LIBRARIES
from bitroute.convert.reading import read_json
from bitroute.errors import JobError, Problem
from bitroute.eval.gate import Limit
from bitroute.eval.generate import draw_apart
from bitroute.eval.sampling import Sample, Sampling
from bitroute.eval.scores import Scores, read_pictures, score
from bitroute.eval.tripwires import bad_pictures, unquantized

FLOOR_DB = 1.0  # a candidate within 1 dB of the noise floor is indistinguishable from the original
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One pipeline's pictures and what drawing them cost."""

    folder: Path
    pictures: Sequence[Tensor]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    name: str
    model: Path
    run: Run | None
    scores: Scores | None
    tripwires: Sequence[str]
    limits: Sequence[Limit]
    closeness: str = ""  # identical, indistinguishable, or empty

    @property
    def passed(self) -> bool:
        """No tripwire, and every limit of the gate holds."""
        scores = self.scores
        return not self.tripwires and scores is not None and all(x.holds(scores.mean(x.metric)) for x in self.limits)


@dataclass(frozen=True)
class Evaluation:
    original: Path
    sampling: Sampling
    samples: Sequence[Sample]
    drawn: Run
    floor: Mapping[str, Scores]  # what changed → the original against itself
    candidates: Sequence[Candidate]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)


def evaluate(
    original: str, quantized: Sequence[str], sampling: Sampling, *, limits: Sequence[Limit] = (),
    share_text: bool = True, cache: Path | None = None, progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Compares quantized pipelines with their original on the same prompts, seeds and settings.

    share_text: every candidate uses the original's text encoders, so that only the other components differ.
    cache: where pictures are kept, keyed by everything that decides them; by default the user's cache folder.

    Raises:
        SourceError: no such pipeline. JobError: the original cannot be drawn or scored.
    """
    report = progress or (lambda what: None)
    store = cache or default_cache()
    source = open_pipeline(original).folder
    folders = {name: open_pipeline(model).folder for name, model in _names(quantized).items()}
    samples = list(sampling.samples())
    report("original")
    drawn = _draw(source, sampling, samples, store / sampling.key(source))
    if broken := list(bad_pictures(samples, drawn.pictures, drawn.folder)):
        raise JobError(Problem("the original itself draws broken pictures", original, got="; ".join(broken)))
    floor = _floor(source, sampling, samples, drawn, store, report)
    candidates = []
    for name, folder in folders.items():
        report(name)
        text_from = source if share_text else None
        judged = _judge(name, folder, source, text_from, sampling, samples, drawn, store, limits)
        candidates.append(replace(judged, closeness=_closeness(judged.scores, floor)))
    return Evaluation(source, sampling, samples, drawn, floor, candidates, _environment(sampling))


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitroute" / "eval"


def _names(quantized: Sequence[str]) -> dict[str, str]:
    """A short name for each candidate; the parent's name is added where two folders are called alike."""
    paths = [Path(model.removeprefix("builtin:")) for model in quantized]
    short = [path.resolve().name for path in paths]
    longer = [f"{path.resolve().parent.name}/{path.resolve().name}" for path in paths]
    return {longer[i] if short.count(short[i]) > 1 else short[i]: model for i, model in enumerate(quantized)}


def _draw(
    model: Path, sampling: Sampling, samples: Sequence[Sample], folder: Path, text_from: Path | None = None
) -> Run:
    measured = draw_apart(model, sampling, folder, text_from)
    return Run(folder, read_pictures(folder, samples), measured)


def _floor(
    source: Path, sampling: Sampling, samples: Sequence[Sample], drawn: Run, store: Path, report: Progress
) -> dict[str, Scores]:
    """The original against itself: drawn again, and with the plain attention kernel."""
    report("noise floor: the original again")
    again = _draw(source, sampling, samples, store / f"{sampling.key(source)}-again")
    report("noise floor: another attention kernel")
    other = replace(sampling, attention="math")
    kernel = _draw(source, other, samples, store / other.key(source))
    return {
        "drawn again": score(samples, drawn.pictures, again.pictures),
        "another attention kernel": score(samples, drawn.pictures, kernel.pictures),
    }


def _judge(
    name: str, model: Path, source: Path, text_from: Path | None, sampling: Sampling, samples: Sequence[Sample],
    drawn: Run, store: Path, limits: Sequence[Limit],
) -> Candidate:  # fmt: skip
    same = list(unquantized(source, model))
    key = sampling.key(*([model, text_from] if text_from else [model]))
    try:
        run = _draw(model, sampling, samples, store / key, text_from)
        tripwires = [*same, *bad_pictures(samples, run.pictures, run.folder)]
        scores = score(samples, drawn.pictures, run.pictures)
    except JobError as error:
        return Candidate(name, model, None, None, [*same, str(error.problems[0])], limits)
    return Candidate(name, model, run, scores, tripwires, limits)


def _closeness(scores: Scores | None, floor: Mapping[str, Scores]) -> str:
    if scores is None:
        return ""
    if scores.identical:
        return "identical"
    lowest = min(found.mean("psnr") for found in floor.values())
    return "indistinguishable" if scores.mean("psnr") >= lowest - FLOOR_DB else ""


def _environment(sampling: Sampling) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if sampling.device.startswith("cuda") else platform.processor()
    return {
        "device": device or platform.machine(),
        "threads": sampling.threads,
        "python": platform.python_version(),
        "libraries": {library: version(library) for library in ("bitroute", *LIBRARIES)},
    }


def provenance_of(model: Path) -> dict[str, Any] | None:
    """What a checkpoint of bitroute says of itself, or None for others."""
    return read_json(model / "bitroute.json") if (model / "bitroute.json").is_file() else None
