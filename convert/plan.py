"""From a recipe and a model to the exact plan: every layer, its rule, its bytes. No weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from bitroute import backends
from bitroute.backends import Kind
from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.architecture import Architecture, build, build_model
from bitroute.convert.bare import no_component
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.container import Container, choose
from bitroute.convert.copies import copies
from bitroute.convert.document import sorted_problems
from bitroute.convert.entry import Entry
from bitroute.convert.inference import infer
from bitroute.convert.layout import stored_bytes
from bitroute.convert.opening import open_model
from bitroute.convert.profile import ProfileFile, find_profile
from bitroute.convert.recipe import RecipeFile, read_recipe
from bitroute.convert.routing import CONVOLUTION, Route, route
from bitroute.convert.schema import ComponentRecipe, Dequantize
from bitroute.convert.shards import cut, shard_names
from bitroute.convert.statistics import StatisticsFile, statistics_of, with_statistics
from bitroute.convert.workers import cores
from bitroute.errors import BackendError, Problem, RecipeError, SourceError

SHARD_BYTES = 5_000_000_000
WORKSPACE_BYTES = 256 * 2**20  # the allocator's slack, and what the libraries load late
BLOCK_BYTES = 32 * 2**20  # a worker's block of rows and its temporaries
LOADING_BYTES = 512 * 2**20  # activations and bookkeeping of the probe forward


KeyPath = tuple[str | int, ...]
Where = Callable[[KeyPath], str]  # a place in the recipe → file:line
Choice = tuple[str, KeyPath]  # a backend's name and the place that chose it


@dataclass(frozen=True)
class ComponentPlan:
    component: Component
    container: Container
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    shard_bytes: int | None = None  # SHARD_BYTES by default
    variant: str | None = None  # in the names of the files to write

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def quantized(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.quantized]

    @property
    def parameters(self) -> int:
        return sum(entry.source.spec.numel for entry in self.entries)

    @property
    def source_bytes(self) -> int:
        return sum(entry.source.spec.size_bytes for entry in self.entries)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / max(self.parameters, 1)

    @cached_property
    def shards(self) -> list[list[Entry]]:
        return cut(self.entries, self.shard_bytes or SHARD_BYTES)

    @property
    def shard_names(self) -> list[str]:
        return shard_names(self.component.stem, len(self.shards), self.variant)

    def specs(self, entries: Sequence[Entry]) -> dict[str, TensorSpec]:
        """Stored tensor name → what the file holds under it."""
        return {
            name: entry.outputs[suffix] for entry in entries for suffix, name in self.container.names(entry).items()
        }


@dataclass(frozen=True)
class Plan:
    """What a job will do, and what `--dry-run` prints."""

    recipe: RecipeFile
    pipeline: Pipeline
    components: tuple[ComponentPlan, ...]
    copied: Mapping[str, int] = field(default_factory=dict)  # file relative to the pipeline folder → bytes
    statistics: StatisticsFile | None = None

    @property
    def source_bytes(self) -> int:
        return stored_bytes(e.source for c in self.components for e in c.entries) + sum(self.copied.values())

    @property
    def size_bytes(self) -> int:
        return sum(c.size_bytes for c in self.components) + sum(self.copied.values())

    @property
    def variant(self) -> str | None:
        return next((component.variant for component in self.components), None)

    @property
    def packages(self) -> list[str]:
        """What `pip install` must have brought before the result loads."""
        libraries = {"accelerate", "diffusers"} | {part.library for part in self.pipeline.components.values()}
        formats = {need for c in self.components for entry in c.quantized for need in entry.backend.needs}
        return sorted(libraries | formats | {p for c in self.components for p in c.container.packages})

    @property
    def devices(self) -> list[str]:
        """What loading or computing needs of the machine; empty where bf16 is enough."""
        loading = {f"to load {c.name}: {c.container.device}" for c in self.components if c.container.device}
        computing = {
            f"to compute {c.name} in {entry.backend.name}: {entry.backend.gpu_to_compute()}"
            for c in self.components for entry in c.quantized if entry.backend.gpu_to_compute()
        }  # fmt: skip
        return sorted(loading | computing)

    @property
    def job_peak_bytes(self) -> int:
        """Anonymous memory above an idle interpreter with the libraries imported."""
        held = max((entry.held_bytes for component in self.components for entry in component.entries), default=0)
        return WORKSPACE_BYTES + cores() * (BLOCK_BYTES + held)

    @property
    def verify_peak_bytes(self) -> int:
        """Each worker with the largest layer as it is stored, or loading the largest component."""
        decode = cores() * max((e.compared_bytes for c in self.components for e in c.entries), default=0)
        load = LOADING_BYTES + max((c.size_bytes for c in self.components), default=0)
        return max(WORKSPACE_BYTES + decode, load)


def plan(
    recipe: str, model: str | None = None, *,
    allow_pickle: bool = False, dequantize: Dequantize = False, config: str | None = None,
    shard_bytes: int | None = None, variant: str | None = None, statistics: str | Path | None = None,
) -> Plan:  # fmt: skip
    """The plan for a recipe (a file or a built-in name) and a model (folder, Hub id, or the recipe's own).

    Of a model on the Hub, what is not in the cache is outlined: `fetch` downloads it before a job.
    allow_pickle: also read weights from *.bin, tensors alone. dequantize: read quantized components as floats.
    config: the pipeline that a single file belongs to. shard_bytes: at most in one file, instead of the recipe's.
    variant: of the weights that are read, such as fp16, instead of the recipe's.
    statistics: what calibration measured of this model, instead of the recipe's file.

    Raises:
        RecipeError, SourceError: everything that is wrong with the recipe, the model and their match, at once.
    """
    file = read_recipe(recipe)
    if file.recipe is None:
        raise RecipeError(file.problems)
    said = file.recipe.model_copy(update={"shard_size": shard_bytes}) if shard_bytes else file.recipe
    file = replace(file, recipe=said)
    pipeline = open_model(file, said, model, allow_pickle, dequantize, config, variant)
    return plan_pipeline(file, pipeline, statistics_of(file, statistics))


def fetch(planned: Plan, progress: Callable[[int, str], None] | None = None) -> Plan:
    """The same plan on files that are all here: those of a model on the Hub are downloaded, and planned again.

    progress: is told the bytes that arrived since the last call; without it a bar is drawn on stderr.

    Raises:
        SourceError: what arrived is not what was announced, or the disk is too full. JobError: the download failed.
    """
    pipeline = planned.pipeline
    if not pipeline.is_outline or pipeline.hub is None:
        return planned
    from bitroute.convert.download import download

    folder = download(pipeline.hub, progress)
    here = replace(pipeline, folder=folder, is_outline=False)
    return named(plan_pipeline(planned.recipe, here, planned.statistics), planned.variant)


def named(planned: Plan, variant: str | None) -> Plan:
    """The same plan with the variant in the names of the files to write."""
    return replace(planned, components=tuple(replace(component, variant=variant) for component in planned.components))


def plan_pipeline(file: RecipeFile, pipeline: Pipeline, statistics: StatisticsFile | None = None) -> Plan:
    """The plan for a recipe, a model and statistics that are read already; raises as `plan` does."""
    problems = list(file.problems)
    components = []
    whole = {name: ComponentRecipe.model_validate({}) for name in (*pipeline.held, *pipeline.views)}  # not to be copied
    said = file.recipe.components if file.recipe else {}
    for name, component_recipe in {**said, **{n: r for n, r in whole.items() if n not in said}}.items():
        if name not in pipeline.components:
            problems.append(no_component(name, pipeline, file.where))
            continue
        planned = _plan_component(pipeline.components[name], component_recipe, file, statistics, problems)
        components += [planned] if planned else []
    copied, found = copies(pipeline, [component.name for component in components])
    problems += [problem for problem in found if problem not in problems]  # a part that has no plan told its own
    if problems:
        raise RecipeError(sorted_problems(problems))
    return Plan(file, pipeline, tuple(components), copied, statistics)


def _plan_component(
    component: Component,
    recipe: ComponentRecipe,
    file: RecipeFile,
    statistics: StatisticsFile | None,
    problems: list[Problem],
) -> ComponentPlan | None:
    where = file.where
    try:
        architecture = build(component)
    except SourceError as error:
        problems += error.problems
        return None
    knowledge, found = _knowledge(component, recipe, architecture, file)
    problems += found
    routes, found = route(
        component.name, recipe, architecture.linear, architecture.other,
        knowledge.roles, knowledge.kept, where, knowledge.origin, _kind,
    )  # fmt: skip
    problems += found
    chosen, found = _create_backends(routes, where)
    problems += found
    if found or not set(architecture.linear) <= set(routes):
        return None
    entries, notes, found = _entries(architecture, routes, chosen, knowledge.roles, where)
    notes = [*component.notes, *knowledge.notes, *notes]
    entries, lacking = with_statistics(entries, component, statistics)
    problems += found + lacking
    if quantizes(recipe) and not found and not any(entry.quantized for entry in entries):
        problems.append(_takes_nothing(component, where))
    container, reason = choose(entries, component.library, recipe.container)
    if reason and recipe.container == "native":
        problems.append(_not_native(component, reason, where))
    if reason:
        notes.append(f"bitroute container, because {reason}")
    shard_bytes = file.recipe.shard_size if file.recipe else None
    return ComponentPlan(component, container, tuple(entries), tuple(notes), shard_bytes)


@dataclass(frozen=True)
class _Knowledge:
    """What the profile says of the linear layers and convolutions of one component; the role of these is given."""

    roles: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, frozenset[Kind]] = field(default_factory=dict)
    origin: Literal["profile", "inferred"] = "profile"
    notes: tuple[str, ...] = ()


def _knowledge(
    component: Component, recipe: ComponentRecipe, architecture: Architecture, file: RecipeFile
) -> tuple[_Knowledge, list[Problem]]:
    """From the profile that the recipe names, else the built-in one, else inferred where it is asked for."""
    names, linear = [*architecture.linear, *architecture.convolutions], architecture.linear
    given = dict.fromkeys(architecture.convolutions, CONVOLUTION)
    own = file.profiles.get(component.name)
    profile = own.profile if own else find_profile(component.class_name)
    if profile:
        wrong = [_other_class(component, own)] if own and profile.class_name != component.class_name else []
        notes = tuple(own.idle(architecture.layers)) if own and not wrong else ()
        return _Knowledge(profile.roles_of(linear) | given, profile.kept(names), "profile", notes), wrong
    asked = recipe.keep == "profile" or any(rule.role for rule in recipe.rules)
    if not (asked and quantizes(recipe)) or recipe.profile:  # a profile that could not be read told its own
        return _Knowledge(given), []
    inferred = infer(build_model(component))
    if inferred:
        found, words = inferred.profile, inferred.words(keeps=recipe.keep == "profile")
        return _Knowledge(found.roles_of(linear) | given, found.kept(names), "inferred", (words,)), []
    return _Knowledge(given), [_no_profile(component, file.where)] if recipe.keep == "profile" else []


def _kind(backend: str, options: Mapping[str, object]) -> Kind | None:
    """None also for options that are refused, with their line, where the backend is made."""
    try:
        return backends.create(backend, **options).kind
    except BackendError:
        return None


def _create_backends(routes: Mapping[str, Route], where: Where) -> tuple[dict[Choice, Backend], list[Problem]]:
    """One backend per place in the recipe; a bad option is reported once, with its line."""
    chosen: dict[Choice, Backend] = {}
    problems: list[Problem] = []
    for decision in routes.values():
        key = (decision.backend, decision.source)
        if key in chosen:
            continue
        try:
            chosen[key] = backends.create(decision.backend, **decision.options)
        except BackendError as error:
            chosen[key] = backends.create("keep")
            problems += [replace(p, where=where((*decision.source, p.where or "options"))) for p in error.problems]
    return chosen, problems


def _entries(
    architecture: Architecture, routes: Mapping[str, Route],
    chosen: Mapping[Choice, Backend], roles: Mapping[str, str], where: Where,
) -> tuple[list[Entry], list[str], list[Problem]]:  # fmt: skip
    """An entry per source tensor; what a backend refuses is kept where the rule says so, else a problem."""
    keep = backends.create("keep")
    entries, notes, problems = [], [], []
    for name, source in architecture.sources.items():
        layer, _, parameter = name.rpartition(".")
        decision = routes.get(layer)
        if decision is None:
            entries.append(Entry(name, source, keep, layer, "", "", "not a layer", ""))
            continue
        backend, reason = chosen[decision.backend, decision.source], decision.label
        if parameter != "weight":
            backend = backend if backend.name == "keep" else keep
        kind = architecture.layers[layer] if parameter == "weight" else ""
        refusal = (backend.refuse_convolution() if "Conv" in kind else None) or backend.refuse(source.spec.rows)
        if refusal and decision.otherwise == "keep":
            notes.append(f"{layer} is kept: {refusal}")
            backend, reason = keep, f"{reason}, otherwise keep"
        elif refusal:
            problems.append(_refused(layer, decision, refusal, where))
        place = where(decision.source)
        entries.append(Entry(name, source, backend, layer, kind, roles.get(layer, ""), reason, place))
    return entries, notes, problems


def _refused(layer: str, decision: Route, refusal: str, where: Where) -> Problem:
    return Problem(
        f"{decision.backend} cannot hold layer {layer!r}", where(decision.source), got=refusal,
        next_step="give the layer another backend, or say `otherwise: keep` in this rule",
    )  # fmt: skip


def quantizes(recipe: ComponentRecipe) -> bool:
    return recipe.backend != "keep" or any(rule.backend != "keep" for rule in recipe.rules)


def _takes_nothing(component: Component, where: Where) -> Problem:
    return Problem(
        f"the recipe quantizes no layer of {component.name!r}", where(("components", component.name)),
        got="no linear layer that is not kept",
        expected="convolutions are quantized by a rule only (role: convolution), embeddings are not",
        next_step="leave the component out, and it is copied untouched; or say `keep: none` if it has linear layers",
    )  # fmt: skip


def _no_profile(component: Component, where: Where) -> Problem:
    return Problem(
        f"no profile is known for {component.class_name}, so nothing says which layers must stay precise",
        where(("components", component.name, "keep")),
        got="no repeated blocks to infer one from",
        next_step='list them: `keep: ["*embed*", …]`, or say `keep: none` to quantize every linear layer',
    )


def _other_class(component: Component, file: ProfileFile) -> Problem:
    return Problem(
        f"the profile is for another class than {component.name!r} has", file.document.where(("class",)),
        got=file.profile.class_name, expected=component.class_name,
    )  # fmt: skip


def _not_native(component: Component, reason: str, where: Where) -> Problem:
    return Problem(
        f"component {component.name!r} has no native container",
        where(("components", component.name, "container")), got=reason,
        next_step="change the rules, or say `container: bitroute` (loading then needs `import bitroute`)",
    )  # fmt: skip
