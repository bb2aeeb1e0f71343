"""Is the quantized model still good? Draws original and candidates alike, scores them, and says so with a floor."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bitroute.convert.bare import check_draws
from bitroute.convert.checkpoint import folder_name, open_pipeline
from bitroute.convert.opening import fused_in
from bitroute.convert.reading import read_json
from bitroute.errors import JobError, Problem, RecipeError
from bitroute.eval.apart import Heard
from bitroute.eval.calling import check_call
from bitroute.eval.gate import Limit, parse_gate
from bitroute.eval.judge import Candidate, Run, Yardstick, draw, judge
from bitroute.eval.recording import PROMPTS, record_apart, recording_of
from bitroute.eval.sampling import Sample, Sampling, library_versions
from bitroute.eval.scores import Scores, score, unrelated_lpips
from bitroute.eval.standalone import Chosen, check
from bitroute.eval.tripwires import bad_pictures

Progress = Callable[[str, str], None]  # what is drawn or asked, and how far that is: empty, then `3 of 16`


@dataclass(frozen=True)
class Evaluation(Yardstick):
    """The yardstick, and every candidate beside it."""

    candidates: Sequence[Candidate] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)


def evaluate(
    original: str, quantized: Sequence[str], sampling: Sampling, *, limits: Sequence[Limit] | None = None,
    share_text: bool = True, denoiser: bool = True, denoiser_prompts: int = PROMPTS,
    scores: Sequence[Chosen] = (), cache: Path | None = None, progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Compares quantized pipelines with their original on the same prompts, seeds and settings.

    limits: the gate of all candidates; None: that of the recipe that each was made with.
    share_text: every candidate uses the original's text encoders, so that only the other components differ.
    denoiser: also measure the weights, and feed the original's inputs to every candidate's denoiser and text encoders:
    their error, that of every step, and that of every layer; denoiser_prompts: for so many of the prompts.
    scores: plug-ins that judge each picture alone.
    cache: where pictures are kept, keyed by everything that decides them; by default the user's cache folder.

    Raises:
        SourceError: no such pipeline. RecipeError: its call does not take what `sampling` gives it.
        JobError: the original cannot be drawn or scored.
    """
    report = progress or (lambda what, far: None)
    source = _folder(original)
    folders = distinct_names(_folder(model) for model in quantized)
    _check_direction(source, folders)
    _check_loras(source, folders)
    check_call(source, sampling)
    for chosen in scores:
        check(chosen)
    beside = _yardstick(source, sampling, cache or default_cache(), share_text, report)
    recorded = _record(source, sampling, beside.store, denoiser_prompts, report) if denoiser else None
    beside = replace(beside, recorded=recorded, recorded_prompts=denoiser_prompts, scores=scores)
    candidates = []
    for name, folder in folders.items():
        gate = _recorded_gate(folder) if limits is None else limits
        candidates.append(judge(name, folder, beside, gate, _stage(report, name)))
    return Evaluation(**vars(beside), candidates=candidates, environment=_environment(sampling))


def _yardstick(source: Path, sampling: Sampling, store: Path, share_text: bool, report: Progress) -> Yardstick:
    samples = list(sampling.samples())
    drawn = draw(source, sampling, samples, store / sampling.key(source), heard=_stage(report, "original"))
    if broken := list(bad_pictures(samples, drawn.pictures, drawn.folder)):
        raise JobError(Problem("the original itself draws broken pictures", str(source), got="; ".join(broken)))
    floor = _floor(source, sampling, samples, drawn, store, report)
    return Yardstick(
        source, sampling, samples, store, drawn, floor, share_text, unrelated_lpips(samples, drawn.pictures)
    )


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitroute" / "eval"


def _folder(model: str) -> Path:
    """Absolute, so that it has a name; links keep theirs."""
    pipeline = open_pipeline(model)
    check_draws(pipeline)
    return Path(os.path.abspath(pipeline.folder))


def distinct_names(folders: Iterable[Path]) -> dict[str, Path]:
    """Each folder by its name; parents' names are added where two are called alike. A folder twice counts once."""
    parts = {path: (*path.parts[:-1], folder_name(path)) for path in folders}
    named = {}
    for path, own in parts.items():
        tails = (own[-length:] for length in range(1, len(own) + 1))
        unique = next(tail for tail in tails if sum(other[-len(tail) :] == tail for other in parts.values()) == 1)
        named["/".join(unique)] = path
    return named


def _floor(
    source: Path, sampling: Sampling, samples: Sequence[Sample], drawn: Run, store: Path, report: Progress
) -> dict[str, Scores]:
    """The original against itself: drawn again, and with the plain attention kernel."""
    heard = _stage(report, "noise floor: the original again")
    again = draw(source, sampling, samples, store / f"{sampling.key(source)}-again", heard=heard)
    heard = _stage(report, "noise floor: another attention kernel")
    other = replace(sampling, attention="math")
    kernel = draw(source, other, samples, store / other.key(source), heard=heard)
    return {
        "drawn again": score(samples, drawn.pictures, again.pictures),
        "another attention kernel": score(samples, drawn.pictures, kernel.pictures),
    }


def _check_direction(original: Path, quantized: Mapping[str, Path]) -> None:
    if provenance_of(original) and not any(provenance_of(folder) for folder in quantized.values()):
        raise RecipeError(
            Problem("the original is a quantized checkpoint, and no candidate is", str(original),
                    next_step="give the original first, then the quantized ones")
        )  # fmt: skip


def _check_loras(original: Path, quantized: Mapping[str, Path]) -> None:
    own = fused_in(original)
    others = [name for name, folder in quantized.items() if fused_in(folder) not in ([], own)]
    if others:
        mend = "fuse them into the original too: a recipe with `fuse_loras` and `backend: keep`; evaluate against that"
        what = f"{others[0]} has LoRAs in its weights that the original has not"
        raise RecipeError(Problem(what, str(original), next_step=mend))


def _recorded_gate(model: Path) -> list[Limit]:
    """Empty where nothing readable is recorded; a damaged record is a tripwire."""
    recorded = (provenance_of(model) or {}).get("eval")
    gate = recorded.get("gate") if isinstance(recorded, dict) else None
    try:
        return parse_gate(gate if isinstance(gate, dict) else None)
    except RecipeError:
        return []


def _stage(report: Progress, what: str) -> Heard:
    report(what, "")
    return partial(report, what)


def _record(source: Path, sampling: Sampling, store: Path, prompts: int, report: Progress) -> Path:
    folder = recording_of(source, sampling, store, prompts)
    record_apart(source, sampling, folder, prompts, heard=_stage(report, "the original's denoiser"))
    return folder


def _environment(sampling: Sampling) -> dict[str, Any]:
    return {
        "device": sampling.hardware,
        "threads": sampling.threads,
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def provenance_of(model: Path) -> dict[str, Any] | None:
    """What a checkpoint of bitroute says of itself, or None for others."""
    return read_json(model / "bitroute.json") if (model / "bitroute.json").is_file() else None
