"""A calibration: what is refused before the pipeline is loaded, the run over the prompts, the statistics file."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import Timeout

from bitroute.calibrate.budget import Measures, measures
from bitroute.calibrate.capture import Capture
from bitroute.calibrate.layers import find_layers
from bitroute.calibrate.statistics import Accumulator
from bitroute.calibrate.unfinished import Accumulators, Facts, place_of, restore, save
from bitroute.convert.bare import check_draws
from bitroute.convert.checkpoint import Pipeline, open_pipeline
from bitroute.convert.files import held, make_folder, take_lock
from bitroute.convert.job import check_device, no_access
from bitroute.convert.reading import read_tensor
from bitroute.convert.statistics import metadata, open_statistics
from bitroute.convert.workers import torch_threads
from bitroute.convert.writer import ShardWriter
from bitroute.errors import BitrouteError, JobError, Problem, RecipeError, SourceError
from bitroute.eval.calling import check_call, parameters, run_pipeline
from bitroute.eval.generate import load
from bitroute.eval.sampling import Sampling, files_in, library_versions

BUDGET_BYTES = 4 * 10**9
ROWS = 256
SAVE_SECONDS = 5.0
SAVE_SHARE = 20  # times what saving takes, at least, lies between two savings
MARGIN_BYTES = 10**7  # of the disk: headers, and what is rounded up
Offload = Literal["none", "model", "block"]
Progress = Callable[[str, str], None]  # what is done, and how far that is: empty, then `3 of 16`


@dataclass(frozen=True)
class Calibration:
    """What was measured. uncalled: layers that no sample called, which have no statistics."""

    file: Path
    layers: int
    rows: int
    uncalled: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        if not self.uncalled:
            return []
        named = ", ".join(self.uncalled[:20]) + (", …" if len(self.uncalled) > 20 else "")
        return [f"{len(self.uncalled)} layers were never called and have no statistics: {named}"]


@dataclass(frozen=True)
class Planned:
    """A calibration that nothing speaks against before it loads the pipeline, which may be an outline."""

    pipeline: Pipeline
    out: Path
    sampling: Sampling
    measures: Measures
    timesteps: int | None
    offload: Offload

    @property
    def words(self) -> str:
        components = ", ".join(dict.fromkeys(layer.component for layer in self.measures.layers))
        samples = len(list(self.sampling.samples()))
        steps = "all steps" if self.timesteps is None else f"{self.timesteps} steps"
        return (
            f"{len(self.measures.layers)} layers of {components}: {self.measures.words}; "
            f"{self.measures.memory_bytes / 1e6:,.1f} MB; {samples} samples, {steps} of each"
        )

    def facts(self) -> Facts:
        """Those of a pipeline whose files are all here."""
        described = {name: value for name, value in self.sampling.describe().items() if value or name == "seeds"}
        versions = {f"version of {library}": version for library, version in library_versions().items()}
        settings = {
            **described, "timesteps": self.timesteps, "rows": self.measures.rows, "offload": self.offload,
            "hardware": self.sampling.hardware, **versions,
        }  # fmt: skip
        folder = self.pipeline.folder
        stats = {str(file.relative_to(folder)): file.stat() for file in sorted(files_in(folder))}
        source = {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}
        layers = {layer.key: layer.block for layer in self.measures.layers}
        return Facts(json.loads(json.dumps(settings)), layers, source)


def calibrate(
    model: str, out: str | Path, sampling: Sampling, *, components: Sequence[str] = (), layers: Sequence[str] = (),
    timesteps: int | None = None, rows: int = ROWS, hessian: bool = True, budget_bytes: int = BUDGET_BYTES,
    offload: Offload = "none", overwrite: bool = False, resume: bool = False, progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Calibration:  # fmt: skip
    """Runs the pipeline and writes what the inputs of its layers are like: a statistics file (convert/statistics.py).

    components: whose layers; by default the denoisers. layers: patterns that choose some of them.
    timesteps: at how many of a sample's steps, spread evenly, others for the next sample; None: at all of them.
    rows: of each layer's inputs that are kept, a uniform sample. hessian: whether E[x xᵀ] is measured, in the largest
    blocks that fit. budget_bytes: of main memory for all of it; the file is smaller.
    save_seconds: a state to resume from is written after a sample when the last one is that old, or seldomer where
    that would take more than a twentieth of the time; 0: after every sample.

    Raises:
        RecipeError: it cannot be done as asked, all reasons at once. SourceError: no such pipeline.
        JobError: the pipeline cannot be loaded or run, or a layer is given NaN or infinities.
    """
    planned = plan_calibration(
        model, out, sampling, components=components, layers=layers, timesteps=timesteps, rows=rows, hessian=hessian,
        budget_bytes=budget_bytes, offload=offload,
    )  # fmt: skip
    check_output(planned, overwrite, resume)
    return run(planned, overwrite, resume, progress, save_seconds)


def plan_calibration(
    model: str, out: str | Path, sampling: Sampling, *, components: Sequence[str] = (), layers: Sequence[str] = (),
    timesteps: int | None = None, rows: int = ROWS, hessian: bool = True, budget_bytes: int = BUDGET_BYTES,
    offload: Offload = "none",
) -> Planned:  # fmt: skip
    """What `calibrate` would measure; loads no weights, and downloads none."""
    check_device(sampling.device)
    pipeline = open_pipeline(model, access="outline")
    check_draws(pipeline)
    if pipeline.config is not None or pipeline.held:
        mend = "quantize convert FILE --config DIR --out FOLDER, then calibrate that folder"
        raise RecipeError(Problem("a calibration runs a pipeline in a folder", model, next_step=mend))
    check_call(pipeline.folder, sampling)
    found = measures(find_layers(pipeline, components, layers), rows, hessian, budget_bytes)
    return Planned(pipeline, Path(os.path.expanduser(out)), sampling, found, timesteps, offload)


def check_output(planned: Planned, overwrite: bool, resume: bool) -> None:
    """Raises RecipeError where the statistics file cannot be written, or is there already."""
    try:
        _check_output(planned, overwrite, resume)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(Problem("not a usable file", str(planned.out)[:200], got=str(error)[:200])) from error


def _check_output(planned: Planned, overwrite: bool, resume: bool) -> None:
    out, unfinished = planned.out, place_of(planned.out)
    if out.is_dir() or planned.pipeline.folder.resolve() in out.resolve().parents:
        got = "a folder" if out.is_dir() else "a file inside the model"
        raise RecipeError(Problem("the statistics cannot go there", str(out), got, next_step="give another --out"))
    if out.exists() and (overwrite or resume):
        _check_replaceable(out)
    elif overwrite or resume:
        pass
    elif unfinished.is_file():
        mend = "--resume to go on, --overwrite to begin anew"
        raise RecipeError(Problem("an unfinished calibration is there", str(unfinished), next_step=mend))
    elif out.exists():
        raise RecipeError(Problem("the file is there already", str(out), next_step="--overwrite, or another --out"))
    folder = next(place for place in out.absolute().parents if place.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecipeError(Problem("the folder cannot be written", str(folder)))
    free, needed = shutil.disk_usage(folder).free, 2 * planned.measures.memory_bytes + MARGIN_BYTES
    if free < needed:
        raise RecipeError(
            Problem("the disk is too full", str(folder), f"{free / 1e9:.2f} GB free", f"{needed / 1e9:.2f} GB",
                    "give a smaller --budget, or --out on another disk")
        )  # fmt: skip


def _check_replaceable(out: Path) -> None:
    """Only what a calibration wrote is replaced: somebody else's file can be all there is of it."""
    try:
        open_statistics(out)
    except SourceError as error:
        mend = "give another --out, or remove the file yourself"
        raise RecipeError(Problem("another file is there", str(out), error.problems[0].what, next_step=mend)) from error


def run(
    planned: Planned, overwrite: bool = False, resume: bool = False, progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Calibration:  # fmt: skip
    """Raises as `calibrate` does."""
    report = progress or (lambda what, far: None)
    with _locked(planned.out):
        check_output(planned, overwrite, resume)
        planned = _fetched(planned)
        facts = planned.facts()
        unfinished = place_of(planned.out)
        if overwrite:
            unfinished.unlink(missing_ok=True)
        elif planned.out.exists() and not unfinished.is_file():
            earlier = _finished(planned, facts)
            report("it is finished: there is nothing to measure", "")
            return earlier
        accumulators = {layer.key: Accumulator(layer, planned.measures.rows) for layer in planned.measures.layers}
        done = restore(planned.out, facts, accumulators) if unfinished.is_file() else 0
        _measure(planned, facts, accumulators, done, report, save_seconds)
        with _writing(planned.out):
            found = _write(planned, facts, accumulators)
        unfinished.unlink(missing_ok=True)
        return found


def _fetched(planned: Planned) -> Planned:
    pipeline = planned.pipeline
    if not pipeline.is_outline or pipeline.hub is None:
        return planned
    from bitroute.convert.download import download

    return replace(planned, pipeline=replace(pipeline, folder=download(pipeline.hub), is_outline=False))


def _measure(
    planned: Planned, facts: Facts, accumulators: Accumulators, done: int, progress: Progress, save_seconds: float
) -> None:
    samples = list(planned.sampling.samples())
    if done == len(samples):
        return
    progress("loading the pipeline", "")
    with torch_threads(planned.sampling.threads), _said(planned):
        pipe = _load(planned)
        capture = Capture(pipe, accumulators, planned.timesteps)
        has_latents = "output_type" in parameters(type(pipe))
        decodes = any(layer.component == "vae" for layer in planned.measures.layers)
        options = {"output_type": "latent"} if has_latents and not decodes else {}
        saved, pause = time.monotonic(), save_seconds
        with capture.listening():
            for number, sample in enumerate(samples[done:], start=done):
                progress("samples", f"{number + 1} of {len(samples)}" if number > done else "")
                capture.begin(number)
                run_pipeline(pipe, planned.sampling, sample, **options)
                if (begun := time.monotonic()) - saved >= pause:
                    with _writing(planned.out):
                        save(planned.out, facts, accumulators, number + 1)
                    saved = time.monotonic()
                    pause = save_seconds and max(save_seconds, SAVE_SHARE * (saved - begun))


def _load(planned: Planned) -> Any:
    sampling, folder = planned.sampling, planned.pipeline.folder
    pipe = load(folder, sampling.device if planned.offload == "none" else "cpu", pipeline=sampling.pipeline)
    if planned.offload == "model":
        pipe.enable_model_cpu_offload(device=sampling.device)
    if planned.offload == "block":
        device = torch.device(sampling.device)
        pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    return pipe


def _write(planned: Planned, facts: Facts, accumulators: Accumulators) -> Calibration:
    called = {key: found for key, found in accumulators.items() if found.seen}
    uncalled = [key for key in accumulators if key not in called]
    if not called:
        raise JobError(Problem("no layer was called", planned.pipeline.name, got=f"{len(uncalled)} that never were"))
    components = dict.fromkeys(found.layer.component for found in accumulators.values())
    classes = {name: planned.pipeline.components[name].class_name for name in components}
    settings = {**facts.settings, "uncalled": uncalled, "key": facts.key}
    specs = {f"{key}/{kind}": spec for key, found in called.items() for kind, spec in found.specs().items()}
    with ShardWriter(planned.out, specs, metadata(planned.pipeline.name, classes, settings)) as writer:
        for key, found in called.items():
            for kind, part in found.parts():
                writer.append(f"{key}/{kind}", part)
    return Calibration(planned.out, len(called), sum(found.seen for found in called.values()), uncalled)


def _finished(planned: Planned, facts: Facts) -> Calibration:
    """What an earlier run of the same calibration wrote. Raises RecipeError where it was another one."""
    found = open_statistics(planned.out)
    if found.settings.get("key") != facts.key:
        what = "another calibration is finished there: with other settings, or of another model"
        raise RecipeError(Problem(what, str(planned.out), next_step="give --overwrite, or another --out"))
    counts = [read_tensor(tensor) for name, tensor in found.tensors.items() if name.endswith("/rows")]
    return Calibration(planned.out, len(counts), sum(int(rows[0]) for rows in counts), found.settings["uncalled"])


@contextmanager
def _said(planned: Planned) -> Iterator[None]:
    """Whatever the libraries raise becomes an error that names the pipeline."""
    try:
        yield
    except BitrouteError:
        raise
    except Exception as error:
        mend = "give --offload model or block" if isinstance(error, torch.OutOfMemoryError) else ""
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        raise JobError(Problem("the pipeline does not run", planned.pipeline.name, got, next_step=mend)) from error


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Half a file would take the room that the next try needs."""
    try:
        yield
    except OSError as error:
        for file in (out, place_of(out)):
            with suppress(OSError):
                file.with_name(f"{file.name}.part").unlink()
        raise JobError(no_access(error, out)) from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One calibration at a time writes this file."""
    try:
        make_folder(out.resolve().parent)
        lock = take_lock(out)
    except Timeout:
        mend = "wait for it, or give another --out"
        raise RecipeError(Problem("another calibration is writing this file", str(out), next_step=mend)) from None
    except OSError as error:
        raise JobError(no_access(error, out)) from error
    with held(lock):
        yield
