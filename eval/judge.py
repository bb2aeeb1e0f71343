"""One candidate beside its original: its weights, pictures, denoiser, text encoders, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.apart import Heard
from bitroute.eval.drift import drift
from bitroute.eval.emulated import emulated
from bitroute.eval.gate import Limit
from bitroute.eval.generate import draw_apart
from bitroute.eval.recording import PROMPTS
from bitroute.eval.replay import Replay, replay_apart
from bitroute.eval.sampling import Sample, Sampling
from bitroute.eval.scores import Scores, read_pictures, score
from bitroute.eval.standalone import Chosen, standalone
from bitroute.eval.tripwires import bad_pictures, broken_text, unquantized, unrelated
from bitroute.eval.weights import weigh

FLOOR_DB = 1.0  # a candidate within 1 dB of the noise floor is indistinguishable from the original


@dataclass(frozen=True)
class Run:
    """One pipeline's pictures and what drawing them cost."""

    folder: Path
    pictures: Sequence[Tensor]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Yardstick:
    """What every candidate is held against, and how."""

    original: Path
    sampling: Sampling
    samples: Sequence[Sample]
    store: Path  # of everything that was drawn
    drawn: Run
    floor: Mapping[str, Scores]  # what changed → the original against itself
    share_text: bool = True
    unrelated_lpips: float | None = None  # of the original's pictures of different prompts
    recorded: Path | None = None  # what the original's denoiser was given and answered; None: pictures only
    recorded_prompts: int = PROMPTS
    scores: Sequence[Chosen] = ()  # plug-ins that judge each picture alone


@dataclass(frozen=True)
class Candidate:
    """Whatever could not be measured is empty, and a tripwire says why."""

    name: str
    model: Path
    run: Run | None = None
    scores: Scores | None = None
    tripwires: Sequence[str] = ()
    limits: Sequence[Limit] = ()
    closeness: str = ""  # identical, indistinguishable, or empty
    replay: Replay | None = None  # errors of denoiser and text encoders on the original's inputs
    weights: Mapping[str, Any] = field(default_factory=dict)
    drift: Sequence[Mapping[str, Any]] = ()
    standalone: Mapping[str, Any] = field(default_factory=dict)
    emulated: Sequence[str] = ()  # components whose quantized activations are emulated on this device

    @property
    def passed(self) -> bool:
        """No tripwire, and every limit of the gate holds."""
        scores = self.scores
        return not self.tripwires and scores is not None and all(x.holds(scores.mean(x.metric)) for x in self.limits)


def judge(name: str, model: Path, beside: Yardstick, limits: Sequence[Limit], heard: Heard | None = None) -> Candidate:
    """Everything that can be measured; one thing that fails does not keep the others from being measured."""
    found = Candidate(
        name, model, limits=limits, tripwires=list(unquantized(beside.original, model, beside.share_text))
    )
    measures: list[Callable[[Candidate, Yardstick], Candidate]] = [partial(_draw, heard=heard), _score, _drift]
    if beside.recorded:
        measures = [_weigh, *measures, partial(_replay, heard=heard)]
    for measure in measures:
        try:
            found = measure(found, beside)
        except JobError as error:
            found = _tripped(found, [_reason(error, name, model, beside.store)])
    return _standalone(found, beside)  # where a plug-in fails, that is not the candidate's fault


def draw(
    model: Path, sampling: Sampling, samples: Sequence[Sample], folder: Path, text_from: Path | None = None,
    heard: Heard | None = None,
) -> Run:  # fmt: skip
    measured = draw_apart(model, sampling, folder, text_from, heard)
    return Run(folder, read_pictures(folder, samples), measured)


def _weigh(found: Candidate, beside: Yardstick) -> Candidate:
    return replace(found, weights=weigh(found.model, beside.original))


def _draw(found: Candidate, beside: Yardstick, heard: Heard | None) -> Candidate:
    text_from = beside.original if beside.share_text else None
    folder = beside.store / beside.sampling.key(found.model, *([text_from] if text_from else []))
    run = draw(found.model, beside.sampling, beside.samples, folder, text_from, heard)
    found = replace(found, run=run, emulated=emulated(found.model, beside.sampling.device))
    return _tripped(found, bad_pictures(beside.samples, run.pictures, run.folder))


def _score(found: Candidate, beside: Yardstick) -> Candidate:
    if found.run is None:
        return found
    scores = score(beside.samples, beside.drawn.pictures, found.run.pictures)
    far = unrelated(scores.mean("lpips"), beside.unrelated_lpips)
    return _tripped(replace(found, scores=scores, closeness=closeness(scores, beside.floor)), far)


def _drift(found: Candidate, beside: Yardstick) -> Candidate:
    if found.run is None or found.tripwires:
        return found
    return replace(found, drift=drift(beside.drawn.folder, found.run.folder, beside.samples))


def _standalone(found: Candidate, beside: Yardstick) -> Candidate:
    if found.run is None or found.tripwires:
        return found
    return replace(found, standalone=standalone(beside.scores, beside.drawn.folder, found.run.folder, beside.samples))


def _replay(found: Candidate, beside: Yardstick, heard: Heard | None) -> Candidate:
    """Also of a candidate whose pictures are bad: the worst layer says where to look."""
    if found.run is None or beside.recorded is None:
        return found
    asked = f"replayed-{beside.recorded_prompts}"
    cache = beside.store / f"{beside.sampling.key(found.model, beside.original)}-{asked}"
    found_errors = replay_apart(found.model, beside.original, beside.recorded, beside.sampling, cache, heard)
    return _tripped(replace(found, replay=found_errors), broken_text(found_errors.text))


def _tripped(found: Candidate, reasons: Iterable[str]) -> Candidate:
    return replace(
        found, tripwires=[*found.tripwires, *(reason for reason in reasons if reason not in found.tripwires)]
    )


def _reason(error: JobError, name: str, model: Path, store: Path) -> str:
    """On one line, and without this machine's paths: the report may be published."""
    problem = error.problems[0]
    words = " ".join(f"{problem.what}: {problem.got}".split()) if problem.got else problem.what
    for path, instead in ((model, name), (store, "cache"), (Path.home(), "~")):
        words = words.replace(str(path), instead)
    return words


def closeness(scores: Scores | None, floor: Mapping[str, Scores]) -> str:
    """Both the mean of the dB and the dB of the mean error must lie within the floor, or one bad sample could hide."""
    if scores is None:
        return ""
    if scores.identical:
        return "identical"
    lowest = min(found.mean("psnr") for found in floor.values())
    lowest_of_mse = min(found.db_of_mse for found in floor.values())
    close = scores.mean("psnr") >= lowest - FLOOR_DB and scores.db_of_mse >= lowest_of_mse - FLOOR_DB
    return "indistinguishable" if close else ""
