"""What the search may choose: for every linear layer of a component the formats that can hold it, and their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from bitroute.backends import Kind, create
from bitroute.backends.base import Backend
from bitroute.calibrate.search_candidates import KEEP
from bitroute.convert.architecture import build_model
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.container import NATIVE
from bitroute.convert.entry import Entry
from bitroute.convert.inference import infer
from bitroute.convert.layout import StoredTensor, total_bytes
from bitroute.convert.plan import Plan, plan_pipeline
from bitroute.convert.profile import Profile, find_profile
from bitroute.convert.recipe import RecipeFile
from bitroute.convert.schema import ComponentRecipe
from bitroute.convert.statistics import StatisticsFile
from bitroute.errors import Problem, RecipeError
from bitroute.eval.recording import DENOISERS

__all__ = ["Assignment", "Keep", "Layer", "Space", "choose_component", "open_space"]

Keep = Literal["8-bit", "profile", "none"]
Assignment = Mapping[str, str]  # layer → the label of its candidate


@dataclass(frozen=True)
class Layer:
    """One layer and the bytes of its weight in each candidate that can hold it, by the candidate's label."""

    entry: Entry  # as it is
    role: str
    size_bytes: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.entry.layer

    @property
    def source(self) -> StoredTensor:
        return self.entry.source


@dataclass(frozen=True)
class Space:
    """planned: the recipe for all other components, and this one as it is."""

    planned: Plan
    component: Component
    layers: tuple[Layer, ...]
    candidates: Mapping[str, Backend]  # label → backend
    native: bool = False  # whether one library's container must hold the choice

    @cached_property
    def parameters(self) -> int:
        return next(part.parameters for part in self.planned.components if part.name == self.component.name)

    @cached_property
    def _own_bytes(self) -> int:
        return next(part.size_bytes for part in self.planned.components if part.name == self.component.name)

    @cached_property
    def fixed_bytes(self) -> int:
        """What is no weight of a linear layer, of the component."""
        return self._own_bytes - sum(layer.source.spec.size_bytes for layer in self.layers)

    @cached_property
    def other_bytes(self) -> int:
        """The rest of the checkpoint."""
        return self.planned.size_bytes - self._own_bytes

    def size_bytes(self, chosen: Assignment) -> int:
        """Of the component."""
        return self.fixed_bytes + sum(layer.size_bytes[chosen[layer.name]] for layer in self.layers)

    def bits(self, chosen: Assignment) -> float:
        """Per weight of the component, everything counted."""
        return 8 * self.size_bytes(chosen) / self.parameters

    def held(self, candidate: str) -> set[str]:
        """The layers that can be in it."""
        return {layer.name for layer in self.layers if candidate in layer.size_bytes}

    def uniform(self, candidate: str) -> Assignment:
        """The candidate wherever it can be, the others as they are."""
        return {layer.name: candidate if candidate in layer.size_bytes else KEEP for layer in self.layers}

    def only(self, candidates: Sequence[Backend]) -> Space:
        """The same space with fewer candidates."""
        allowed = {str(backend) for backend in candidates} | {KEEP}
        layers = (
            replace(layer, size_bytes={name: size for name, size in layer.size_bytes.items() if name in allowed})
            for layer in self.layers
        )
        found = replace(self, layers=tuple(layers))
        return replace(found, layers=tuple(map(found._kept_apart, found.layers))) if self.native else found

    def unloadable(self, kept: str = "") -> str:
        """Why no native container can hold all layers that can be quantized, but for `kept`; empty where one can."""
        entries = []
        for layer in self.layers:
            own = next((n for n in layer.size_bytes if n != KEEP), KEEP) if layer.name != kept else KEEP
            entries.append(replace(layer.entry, backend=self.candidates[own]))
        families = {entry.backend.family for entry in entries if entry.quantized} & NATIVE.keys()
        return "".join(NATIVE[family].cannot(entries, self.component.library) for family in sorted(families))

    def _kept_apart(self, layer: Layer) -> Layer:
        """Without `keep` where the loader would keep others too."""
        if len(layer.size_bytes) < 2 or KEEP not in layer.size_bytes or not self.unloadable(layer.name):
            return layer
        return replace(layer, size_bytes={name: size for name, size in layer.size_bytes.items() if name != KEEP})


def choose_component(pipeline: Pipeline, wanted: str | None) -> Component:
    """The denoiser, or the one that was asked for.

    Raises:
        RecipeError: there is none of that name, or nothing here denoises.
    """
    known = [name for name in DENOISERS if name in pipeline.components]
    if not known:
        got = ", ".join(pipeline.components) or "no component with weights"
        expected = f"one of {', '.join(DENOISERS)}"
        raise RecipeError(Problem("the model has no denoiser to search", pipeline.name, got, expected))
    if wanted is not None and wanted not in known:
        raise RecipeError(Problem("no such denoiser", "--component", got=repr(wanted), expected=", ".join(known)))
    return pipeline.components[wanted or known[0]]


def open_space(
    base: RecipeFile, pipeline: Pipeline, component: Component, candidates: Sequence[Backend], keep: Keep,
    statistics: StatisticsFile | None = None,
) -> Space:  # fmt: skip
    """The choices in a component; `base` says what becomes of the others.

    Raises:
        RecipeError, SourceError: what `plan_pipeline` refuses, or no layer can be quantized.
    """
    planned = plan_pipeline(_all_kept(base, component.name), pipeline, statistics)
    entries = next(part.entries for part in planned.components if part.name == component.name)
    linear = [entry for entry in entries if entry.kind == "Linear"]
    own = base.profiles.get(component.name)
    profile = own.profile if own else _profile(component)
    names = [entry.layer for entry in linear]
    roles = profile.roles_of(names) if profile else {}
    kept = profile.kept(names) if profile else {}
    known = {str(backend): backend for backend in (*candidates, create(KEEP))}
    layers = []
    for entry in linear:
        weight, barred = entry.source.spec.rows, _barred(kept.get(entry.layer, frozenset()), keep)
        fitting = {n: b for n, b in known.items() if b.kind not in barred and (n == KEEP or not b.refuse(weight))}
        sizes = {name: total_bytes(backend.outputs(weight).values()) for name, backend in fitting.items()}
        layers.append(Layer(entry, roles.get(entry.layer, ""), sizes))
    if not any(len(layer.size_bytes) > 1 for layer in layers):
        raise RecipeError(Problem(f"no candidate can hold any layer of {component.name!r}", pipeline.name))
    return Space(planned, component, tuple(layers), known)


def _barred(kept: frozenset[Kind], keep: Keep) -> frozenset[Kind]:
    """The kinds of quantization that a layer may not get."""
    if keep == "none":
        return frozenset()
    return kept - {"8-bit"} if keep == "8-bit" else kept


def _profile(component: Component) -> Profile | None:
    found = find_profile(component.class_name)
    if found:
        return found
    inferred = infer(build_model(component))
    return inferred.profile if inferred else None


def _all_kept(base: RecipeFile, component: str) -> RecipeFile:
    assert base.recipe is not None
    kept = ComponentRecipe.model_validate({"keep": "none"})
    components = {name: said for name, said in base.recipe.components.items() if name != component}
    return replace(base, recipe=base.recipe.model_copy(update={"components": {component: kept, **components}}))
