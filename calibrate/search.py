"""Which format for which layer: measures every layer in every candidate, and spends a budget where it counts most.

The model is additive: what a recipe loses is taken as the sum of what its layers lose one by one. How far that holds
is measured: the recipe that is written, and each candidate for all layers alike, run as a whole beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bitroute.backends.base import Backend
from bitroute.calibrate.search_candidates import KEEP
from bitroute.calibrate.search_front import Front, Point
from bitroute.calibrate.search_gate import pass_gate
from bitroute.calibrate.search_journal import Journal
from bitroute.calibrate.search_methods import with_methods
from bitroute.calibrate.search_recipe import Draft, planned_recipe, recipe_text
from bitroute.calibrate.search_report import head
from bitroute.calibrate.search_request import Search, Wish, prepare, settings
from bitroute.calibrate.search_sensitivity import Bench
from bitroute.calibrate.search_space import Layer
from bitroute.convert.document import write_new
from bitroute.convert.plan import Plan, fetch
from bitroute.errors import JobError, Problem
from bitroute.eval.evaluate import default_cache
from bitroute.eval.recording import record_apart, recording_of
from bitroute.eval.sampling import Sampling

__all__ = ["Found", "run", "search", "trial"]

Progress = Callable[[str, int, int], None]  # what, how many are done, of how many
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Found:
    """front: from small to large; uniform: each candidate wherever it can be. All errors are relative ones."""

    search: Search
    recipe: Path
    plan: Plan
    chosen: Point
    front: Sequence[Point]
    uniform: Sequence[Point] = ()
    gate: Mapping[str, Any] = field(default_factory=dict)


def search(
    model: str, recipe_out: str | Path, sampling: Sampling, *, bits: float | None = None,
    budget_bytes: int | None = None, gate: str | None = None, progress: Progress | None = None,
    cache: Path | None = None, **options: Any,
) -> Found:  # fmt: skip
    """Finds the recipe that loses least within a budget, and writes it.

    bits: per weight of the denoiser, everything counted; or budget_bytes: of the whole checkpoint; or gate: the
    smallest that an evaluation passes (`lpips<0.1`). sampling: prompts and call of the original that is recorded.
    options: of search_request.Wish: base, component, candidates, keep, native, samples, dtype, statistics, estimate,
    methods, give_up, work. cache: of recordings and pictures, as `evaluate` has it.

    Raises:
        RecipeError, SourceError, BackendError: refused before anything is measured. JobError: it cannot be measured.
    """
    wish = Wish(model, Path(recipe_out), sampling, bits=bits, budget_bytes=budget_bytes, gate=gate, **options)
    return run(prepare(wish), progress, cache)


def run(search: Search, progress: Progress | None = None, cache: Path | None = None) -> Found:
    """Measures what is not measured yet, solves, writes the recipe.

    Raises:
        JobError: the original cannot be recorded or run. RecipeError: the work folder is that of another search.
    """
    report = progress or (lambda what, done, total: None)
    if search.pipeline.is_outline:
        fetch(search.space.planned)
        search = prepare(search.wish)
    _make_folder(search.work)
    with _locked(search.work, report):
        journal = Journal(search.work, settings(search))
        measure = _Measure(search, journal, report, cache or default_cache())
        if search.wish.methods:
            search = measure.with_methods()
        front = Front(search.space, measure.errors(), search.families, search.wish.give_up)
        gate: Mapping[str, Any] = {}
        budget = search.budget()
        if budget is None:
            chosen, gate = pass_gate(search, front, lambda point: trial(search, front, point), report, cache)
        else:
            chosen = front.best(budget)
        chosen = measure.together(chosen)
        uniform = [measure.together(point) for point in front.uniform(search.listed)]
        report("the front", 0, 0)
        swept = front.sweep()
        text, plan = draft(search, front, chosen, uniform)
        place = write_new(text, search.wish.recipe_out, search.wish.recipe_out.name)
    return Found(search, place, plan, chosen, swept, uniform, gate)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(
            Problem("cannot make the folder of the measurements", str(folder), error.strerror or "")
        ) from error


@contextmanager
def _locked(folder: Path, report: Progress) -> Iterator[None]:
    """One search at a time; the next one finds what this one measured."""
    lock = FileLock(folder / "lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("waiting for another search in the same folder", 0, 0)
            lock.acquire()
    except OSError as error:
        raise JobError(Problem("cannot keep measurements", str(folder), got=error.strerror or "")) from error
    try:
        yield
    finally:
        lock.release()


def draft(search: Search, front: Front, point: Point, uniform: Sequence[Point] = ()) -> tuple[str, Plan]:
    """The text of the recipe for a point of the front, and its plan."""
    wish = search.wish
    title = f"searched: {search.space.component.name} at {point.bits:.2f} bits per weight"
    said = replace(
        _bare(search), head=head(search, point, uniform), description=title, statistics=_beside(search), eval=wish.eval
    )
    text = recipe_text(search.space, point.chosen, front.errors, said)
    return text, planned_recipe(search.space, point.chosen, text, said, wish.recipe_out.name, search.statistics)


def trial(search: Search, front: Front, point: Point) -> Plan:
    """Of a point that a gate judges: the same for other gates and other places of the recipe."""
    said = _bare(search)
    text = recipe_text(search.space, point.chosen, front.errors, said)
    return planned_recipe(search.space, point.chosen, text, said, "trial.yaml", search.statistics)


def _bare(search: Search) -> Draft:
    statistics = os.path.abspath(search.statistics.file) if search.statistics else None
    return Draft(search.source, (), "", search.base, "native" if search.wish.native else "auto", statistics)


def _beside(search: Search) -> str | None:
    """The statistics file, seen from the recipe."""
    if search.statistics is None:
        return None
    return Path(os.path.relpath(search.statistics.file, search.wish.recipe_out.parent)).as_posix()


class _Measure:
    """What the journal knows, and else the bench, which is made when it is needed."""

    def __init__(self, search: Search, journal: Journal, report: Progress, cache: Path) -> None:
        self.search, self.journal, self.report, self.cache = search, journal, report, cache

    @cached_property
    def bench(self) -> Bench:
        wish, folder = self.search.wish, Path(self.search.pipeline.folder).absolute()
        recorded = recording_of(folder, wish.sampling, self.cache)
        record_apart(folder, wish.sampling, recorded, heard=self._heard)
        space = self.search.space
        return Bench(space.component, recorded, wish.sampling, wish.samples, DTYPES[wish.dtype], self.search.statistics)

    def with_methods(self) -> Search:
        """The search goes on with the candidates that each layer's statistics speak for."""
        assert self.search.statistics is not None
        space = with_methods(self.search.space, self.search.statistics, self._expected, self.report)
        self.search = replace(self.search, space=space, families=[list(space.candidates.values())])
        return self.search

    def errors(self) -> dict[str, dict[str, float]]:
        """Layer → label → squared error of the output; what a format could not do is infinite."""
        found: dict[str, dict[str, float]] = {layer.name: {KEEP: 0.0} for layer in self.search.space.layers}
        tasks = self.search.tasks
        for done, (layer, backend) in enumerate(tasks):
            self.report("layers in candidates", done, len(tasks))
            found[layer.name][str(backend)] = self._once(f"{layer.name} {backend}", layer, backend)
        self.report("layers in candidates", len(tasks), len(tasks))
        return found

    def together(self, point: Point) -> Point:
        """The point with what all its layers lose together."""
        space = self.search.space
        chosen = [(layer, space.candidates[point.chosen[layer.name]]) for layer in space.layers]
        digest = hashlib.sha256(json.dumps(dict(point.chosen), sort_keys=True).encode()).hexdigest()[:16]
        what = f"together {digest}"
        if what not in self.journal.errors:
            self.report(f"together: {point.name}", 0, 0)
            self.journal.add(what, self.bench.error_with(chosen))
        return point.measured_as(self.journal.errors[what])

    def _heard(self, far: str) -> None:
        """`3 of 16` of the process that records."""
        numbers = [int(number) for number in re.findall(r"\d+", far)]
        if len(numbers) == 2:
            self.report("the original's denoiser", *numbers)

    def _once(self, what: str, layer: Layer, backend: Backend) -> float:
        if what not in self.journal.errors:
            with _told(layer, backend):
                found = self._estimated(layer, backend) if self.search.wish.estimate else None
                self.journal.add(what, self.bench.error_with([(layer, backend)]) if found is None else found)
        return self.journal.errors[what]

    def _estimated(self, layer: Layer, backend: Backend) -> float | None:
        """The error of the layer's own output, times what that of its probe became at the end of the model.

        None for the probe itself, for quantized activations, and where nothing was measured of the input.
        """
        if backend.quantizes_activations:
            return None
        probe = self.search.probe(layer, backend)
        probe_lost = self._expected(layer, probe)
        if backend is probe or not probe_lost or math.isinf(probe_lost):
            return None
        lost = self._expected(layer, backend)
        return None if lost is None else self._once(f"{layer.name} {probe}", layer, probe) * lost / probe_lost

    def _expected(self, layer: Layer, backend: Backend) -> float | None:
        """What the layer's own output loses; None where nothing was measured of its input."""
        what = f"expected {layer.name} {backend}"
        if what not in self.journal.errors:
            with _told(layer, backend):
                lost = self.bench.lost(layer, backend)
            if lost is None:
                return None
            rounded = max(lost, 0.0)  # a sum that is 0 may come out as less
            self.journal.add(what, rounded if math.isfinite(lost) else math.inf)
        return self.journal.errors[what]


@contextmanager
def _told(layer: Layer, backend: Backend) -> Iterator[None]:
    """What a device or a library cannot, as an error that names the candidate."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        mend = "leave this candidate out, or search where it runs (--device)"
        problem = Problem(f"{backend} cannot be measured here", layer.name, str(error)[:300], next_step=mend)
        raise JobError(problem) from error
