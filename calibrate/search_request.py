"""What a search is asked for, and everything that can be refused before anything is measured."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bitroute.backends.base import Backend
from bitroute.calibrate.search_candidates import (
    KEEP,
    can_use,
    default_candidates,
    is_fitted,
    native_families,
    parse_candidates,
    without_plain,
)
from bitroute.calibrate.search_methods import MOST, trials
from bitroute.calibrate.search_solver import check_solver
from bitroute.calibrate.search_space import Keep, Layer, Space, choose_component, open_space
from bitroute.convert.bare import check_draws
from bitroute.convert.checkpoint import BUILTIN, Pipeline, open_pipeline
from bitroute.convert.document import check_new, shown
from bitroute.convert.job import check_device
from bitroute.convert.recipe import RecipeFile, read_recipe
from bitroute.convert.statistics import StatisticsFile, statistics_of, with_statistics
from bitroute.errors import Problem, RecipeError
from bitroute.eval.calling import check_call
from bitroute.eval.gate import parse_gate
from bitroute.eval.sampling import Sampling

__all__ = ["Search", "Wish", "prepare", "settings"]


@dataclass(frozen=True)
class Wish:
    """What is searched, as `quantize search` is asked for it; exactly one of bits, budget_bytes and gate."""

    model: str | None
    recipe_out: Path
    sampling: Sampling
    bits: float | None = None  # per weight of the component, everything counted
    budget_bytes: int | None = None  # of the whole checkpoint
    gate: str | None = None
    base: str | None = None  # a recipe: the model, the other components
    component: str | None = None
    candidates: str | None = None
    keep: Keep = "8-bit"
    native: bool = False
    samples: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    statistics: Path | None = None
    estimate: bool = False
    methods: bool = False
    give_up: float = 0.01
    work: Path | None = None
    eval: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Search:
    """A search that nothing speaks against. listed: with the candidates as they were asked for, without methods."""

    wish: Wish
    base: RecipeFile
    pipeline: Pipeline
    space: Space
    listed: Space
    families: Sequence[Sequence[Backend]]
    statistics: StatisticsFile | None

    @property
    def work(self) -> Path:
        out = self.wish.recipe_out
        return self.wish.work or out.with_name(f"{out.stem}-search")

    @property
    def source(self) -> Mapping[str, str]:
        """As the recipe says it, which may be run from another folder."""
        said = _source(self.wish, self.base)
        place = Path(said["model"]).expanduser()
        is_local = not said["model"].startswith(BUILTIN) and place.exists()
        return {**said, "model": os.path.abspath(place)} if is_local else said

    @cached_property
    def tasks(self) -> list[tuple[Layer, Backend]]:
        """What has to be measured."""
        lossy = {name: backend for name, backend in self.space.candidates.items() if backend.name != KEEP}
        return [(layer, lossy[name]) for layer in self.space.layers for name in layer.size_bytes if name in lossy]

    @property
    def forwards(self) -> int:
        """Of the denoiser, without those that record the original; with methods at most so many."""
        alone = [(layer, backend) for layer, backend in self.tasks if not backend.quantizes_activations]
        run = len(alone)
        if self.wish.methods:
            run = len({layer.name for layer, _ in alone}) * (2 if self.wish.estimate else MOST)
        elif self.wish.estimate:
            run = sum(backend is self.probe(layer, backend) for layer, backend in alone)
        return (len(self.tasks) - len(alone) + run) * self.wish.samples

    @property
    def encodings(self) -> int:
        """Of weights with methods, by the statistics alone, at most."""
        return trials(self.listed) if self.wish.methods else 0

    def probe(self, layer: Layer, backend: Backend) -> Backend:
        """The candidate of the layer whose error tells that of this one: those fitted to the same statistics are alike.

        What GPTQ fits to a Hessian loses less by that Hessian than on other inputs.
        """
        alike = (self.space.candidates[name] for name in layer.size_bytes)
        return next(
            b for b in alike if b.name != KEEP and not b.quantizes_activations and is_fitted(b) is is_fitted(backend)
        )

    def budget(self) -> int | None:
        """Of the weights of linear layers alone; None for a gate."""
        space, wish = self.space, self.wish
        if wish.bits is not None:
            return math.floor(wish.bits * space.parameters / 8) - space.fixed_bytes
        if wish.budget_bytes is not None:
            return wish.budget_bytes - space.other_bytes - space.fixed_bytes
        return None


def prepare(wish: Wish) -> Search:
    """Everything that can be refused before anything is measured; reads no weight, and downloads none.

    Raises:
        RecipeError, SourceError, BackendError: what is wrong with the wish.
    """
    check_solver()
    check_new(wish.recipe_out)
    _check_goal(wish)
    check_device(wish.sampling.device)
    base = _base(wish)
    assert base.recipe is not None
    statistics = statistics_of(base, wish.statistics)
    hessians = statistics is not None and any(name.endswith("/hessian") for name in statistics.tensors)
    candidates = default_candidates(hessians) if wish.candidates is None else parse_candidates(wish.candidates)
    _check_flags(wish, statistics)
    families = list(native_families(candidates).values()) if wish.native else [candidates]
    if not families:
        mend = "leave --container native out, or give candidates that one library runs"
        raise RecipeError(Problem("no native container holds any candidate", "--candidates", next_step=mend))
    source = _source(wish, base)
    pipeline = open_pipeline(source["model"], source.get("revision"), source.get("variant"), access="outline")
    check_draws(pipeline)
    check_call(pipeline.folder, wish.sampling)
    component = choose_component(pipeline, wish.component)
    space = open_space(base, pipeline, component, [b for family in families for b in family], wish.keep, statistics)
    space = replace(_measurable(space, statistics, wish), native=wish.native)
    families = _loadable(space, families) if wish.native else families
    search = Search(wish, base, pipeline, space, space, families, statistics)
    _check_budget(search)
    return search


def _loadable(space: Space, families: list[list[Backend]]) -> list[list[Backend]]:
    """Those whose loader can keep the layers that nothing else can hold apart from the others."""
    reasons = [space.only(family).unloadable() for family in families]
    if all(reasons):
        mend = "leave --container native out, or give candidates of another library"
        raise RecipeError(Problem("no native container can be loaded", "--candidates", reasons[0], next_step=mend))
    return [family for family, reason in zip(families, reasons, strict=True) if not reason]


def _base(wish: Wish) -> RecipeFile:
    """The recipe that the search completes."""
    if wish.base is None or wish.model == "":
        if not wish.model:
            raise RecipeError(Problem("no model", next_step="give MODEL, or --recipe with a `model:`"))
        made = RecipeFile.made("search", f"model: {json.dumps(wish.model)}\ncomponents: {{none: {{}}}}\n")
        assert made.recipe is not None
        return replace(made, recipe=made.recipe.model_copy(update={"components": {}}))
    base = read_recipe(wish.base)
    if base.recipe is None or base.problems:
        raise RecipeError(base.problems)
    if wish.model is None and base.recipe.model is None:
        raise RecipeError(Problem("no model", base.name, next_step="give MODEL, or `model:` in the recipe"))
    said = [key for key in ("fuse_loras", "dequantize", "config") if getattr(base.recipe, key)]
    if said:
        mend = "write that model first (`backend: keep`, or quantize convert), and search it"
        raise RecipeError(Problem("the search runs the original, as a folder", base.name, got=said[0], next_step=mend))
    return base


def _source(wish: Wish, base: RecipeFile) -> dict[str, str]:
    """The model as a recipe names it; another one than the base recipe's has other revisions."""
    assert base.recipe is not None
    recipe = base.recipe
    said = {"model": wish.model or recipe.model, "revision": recipe.revision, "variant": recipe.variant}
    own = wish.model in (None, recipe.model)
    return {key: value for key, value in said.items() if value is not None and (own or key == "model")}


def _check_goal(wish: Wish) -> None:
    goals = {"--bits": wish.bits, "--budget": wish.budget_bytes, "--gate": wish.gate}
    said = [name for name, goal in goals.items() if goal is not None]
    if len(said) != 1:
        got, expected = " and ".join(said) or "none", f"one of {', '.join(goals)}"
        raise RecipeError(Problem("a search has one goal", "", got, expected))
    if wish.gate is not None and not parse_gate(wish.gate):
        raise RecipeError(Problem("the gate has no limit", "--gate", expected="such as lpips<0.1"))
    if wish.bits is not None and not 0 < wish.bits <= 64:
        raise RecipeError(Problem("not a number of bits", "--bits", got=f"{wish.bits}", expected="such as 4.6"))
    if not 0 <= wish.give_up <= 1:
        raise RecipeError(Problem("not a share", "--simplify", got=f"{wish.give_up}", expected="0 to 100 percent"))


def _check_flags(wish: Wish, statistics: StatisticsFile | None) -> None:
    asked = [flag for flag, wanted in (("--estimate", wish.estimate), ("--methods", wish.methods)) if wanted]
    problems = [
        Problem(f"{flag} needs the statistics of the layers' inputs", next_step="give --statistics FILE")
        for flag in asked
        if statistics is None
    ]
    if wish.methods and wish.native:
        mend = "leave one of them out"
        problems.append(Problem("no native container holds what --methods adds", "--container", "native", "auto", mend))
    if problems:
        raise RecipeError(problems)


def _measurable(space: Space, statistics: StatisticsFile | None, wish: Wish) -> Space:
    """Refuses what does not fit the model; candidates that need what was not measured are dropped, per layer."""
    name, layers = space.component.name, list[Layer]()
    _, problems = with_statistics([], space.component, statistics)
    for layer in space.layers:
        columns = layer.source.spec.rows.shape[1]
        misfit = statistics.misfit(name, layer.name, columns) if statistics else None
        problems += [misfit] if misfit else []
        stored = statistics.stored(name, layer.name) if statistics else {}
        sizes = {key: size for key, size in layer.size_bytes.items() if can_use(space.candidates[key], stored)}
        by_default = wish.candidates is None
        sizes = without_plain(space.candidates, sizes) if by_default else sizes
        layers.append(replace(layer, size_bytes=sizes))
    if problems:
        raise RecipeError(problems[:20])
    for key, backend in space.candidates.items():
        if backend.measured and not any(key in layer.size_bytes for layer in layers):
            what = f"candidate {key} needs statistics: {', '.join(sorted(backend.measured))}"
            mend = "`quantize calibrate MODEL --prompts SET --out FILE`, then --statistics FILE"
            problems.append(Problem(what, "--candidates", next_step=mend))
    if problems:
        raise RecipeError(problems)
    return replace(space, layers=tuple(layers))


def _check_budget(search: Search) -> None:
    """Raises RecipeError with the smallest possible number."""
    space, wish, budget = search.space, search.wish, search.budget()
    spaces = [space.only(family) for family in search.families]
    least = min(sum(min(layer.size_bytes.values()) for layer in part.layers) for part in spaces)
    if budget is None or budget >= least:
        return
    bits = 8 * (least + space.fixed_bytes) / space.parameters
    whole = least + space.fixed_bytes + space.other_bytes
    got = f"{wish.bits:g} bits" if wish.bits is not None else f"{wish.budget_bytes:,} bytes for the whole checkpoint"
    mend = "" if wish.keep == "none" else "--keep none lets few bits into the layers that the profile keeps"
    if wish.bits is None and space.other_bytes > least + space.fixed_bytes:
        mend = f"{space.other_bytes:,} bytes are other parts: quantize them by a recipe, --recipe BASE"
    raise RecipeError(
        Problem("the budget is too small for these candidates", "--bits" if wish.bits is not None else "--budget", got,
                f"at least {math.ceil(bits * 100) / 100:.2f} bits per weight, a checkpoint of {whole:,} bytes", mend)
    )  # fmt: skip


def settings(search: Search) -> dict[str, Any]:
    """What all measurements depend on; candidates may be added and budgets be changed at will."""
    wish, statistics = search.wish, search.statistics
    return {
        "model": search.pipeline.name, "component": search.space.component.name,
        **{name: value for name, value in wish.sampling.describe().items() if value},
        "prompts": hashlib.sha256(json.dumps(wish.sampling.prompts).encode()).hexdigest()[:16],
        "hardware": wish.sampling.hardware,
        "original or libraries": wish.sampling.key(Path(search.pipeline.folder).absolute()),
        "number of samples": wish.samples, "dtype": wish.dtype,
        "way to measure": "estimate" if wish.estimate else "all",
        "statistics file": _fingerprint(statistics.file) if statistics else None,
    }  # fmt: skip


def _fingerprint(file: Path) -> str:
    found = file.stat()
    return shown(f"{file.name}, {found.st_size} bytes, {found.st_mtime_ns}")
