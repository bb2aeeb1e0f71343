"""The plan in words for machines: what `--json` prints and what `bitroute.json` keeps beside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from bitroute.backends.base import CODES
from bitroute.convert.bare import INDEX
from bitroute.convert.checkpoint import Pipeline
from bitroute.convert.entry import Entry
from bitroute.convert.fold import fold
from bitroute.convert.plan import ComponentPlan, Plan
from bitroute.convert.shards import index_name
from bitroute.errors import JobError, Problem

FORMAT_VERSION = 1
LIBRARIES = ("torch", "diffusers", "transformers", "torchao", "bitsandbytes", "optimum-quanto", "safetensors")


def describe(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes; `tensors` maps an output suffix to its stored name, dtype and shape."""
    return {
        "model": plan.pipeline.name,
        "components": {component.name: _component(component) for component in plan.components},
        "copied": dict(plan.copied),
        "source_bytes": plan.source_bytes,
        "size_bytes": plan.size_bytes,
        "job_peak_bytes": plan.job_peak_bytes,
        "verify_peak_bytes": plan.verify_peak_bytes,
        "packages": plan.packages,
        "devices": plan.devices,
    }


def provenance(plan: Plan) -> dict[str, Any]:
    """The content of `bitroute.json`: everything needed to make or to judge the checkpoint again."""
    recipe = plan.recipe.recipe
    evaluated = {"eval": recipe.eval.model_dump(mode="json")} if recipe and recipe.eval else {}
    return {**_origin(plan), **evaluated, "files": written_files(plan), "plan": describe(plan)}


def summary(plan: Plan, component: ComponentPlan) -> dict[str, Any]:
    """What a component's `quantization_config` carries of its origin, and its layers folded into ranges.

    Raises:
        JobError: the plan is of an outline; its zeros must not become loadable.
    """
    if plan.pipeline.is_outline:
        raise JobError(Problem("the model is not downloaded yet", plan.pipeline.name, next_step="fetch(plan) first"))
    layers: dict[str, list[str]] = {}
    for entry in component.quantized:
        layers.setdefault(str(entry.backend), []).append(entry.layer)
    return {**_origin(plan), "layers": {name: [str(f) for f in fold(names)] for name, names in layers.items()}}


def written_files(plan: Plan) -> list[str]:
    """Every file that a job writes, relative to the output folder, in about the order of writing."""
    own = [
        str(component.component.place / name)
        for component in plan.components
        for name in [*component.shard_names, *index_names(component), "config.json"]
    ]
    index = [] if plan.pipeline.bare else [INDEX]
    return [*own, *plan.copied, *index, "bitroute.json"]


def index_names(component: ComponentPlan) -> list[str]:
    return [index_name(component.component.stem, component.variant)] if len(component.shards) > 1 else []


@cache
def _versions() -> Mapping[str, str]:
    return {library: version(library) for library in LIBRARIES}


def _origin(plan: Plan) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "bitroute": version("bitroute"),
        "libraries": dict(_versions()),
        "source": _source(plan.pipeline),
        **({"statistics": plan.statistics.describe()} if plan.statistics else {}),
        "recipe": {"name": plan.recipe.name, "text": plan.recipe.text},
    }


def _source(pipeline: Pipeline) -> dict[str, Any]:
    """revision: the commit on the Hub. dequantize: as what quantized components were read; loras: fused."""
    read_as: dict[str, Any] = {"dequantize": pipeline.dequantize} if pipeline.dequantize else {}
    if pipeline.loras:
        read_as["loras"] = [lora.record() for lora in pipeline.loras]
    if pipeline.config is not None:
        hub, config = pipeline.hub, pipeline.config.name
        config = f"{hub.repo}@{hub.commit}" if hub else config
        return {"model": pipeline.name, "revision": None, "config": config, **read_as}
    if pipeline.hub is None:
        read_as |= {"variant": pipeline.variant} if pipeline.variant else {}
        return {"model": pipeline.name, "revision": None, **read_as}
    return {"model": pipeline.hub.repo, "revision": pipeline.hub.commit, "variant": pipeline.hub.variant, **read_as}


def _component(plan: ComponentPlan) -> dict[str, Any]:
    files = {entry.name: name for name, shard in zip(plan.shard_names, plan.shards, strict=True) for entry in shard}
    return {
        "library": plan.component.library,
        "class": plan.component.class_name,
        "place": str(plan.component.place),
        "variant": plan.variant,
        "container": plan.container.name,
        "notes": list(plan.notes),
        "parameters": plan.parameters,
        "source_bytes": plan.source_bytes,
        "size_bytes": plan.size_bytes,
        "entries": [{**_entry(plan, entry), "file": files[entry.name]} for entry in plan.entries],
    }


def _entry(plan: ComponentPlan, entry: Entry) -> dict[str, Any]:
    names = plan.container.names(entry)
    return {
        "name": entry.name,
        "layer": entry.layer,
        "role": entry.role,
        "rule": entry.reason,
        "where": entry.where,
        "backend": entry.backend.name,
        "options": entry.backend.options,
        "shape": list(entry.weight.shape),
        **({"source_shape": list(entry.source.spec.shape)} if len(entry.source.spec.shape) > 2 else {}),
        **({"statistics": list(entry.statistics)} if entry.statistics else {}),
        "dtype": CODES[entry.weight.dtype],
        "bits_per_weight": round(entry.bits_per_weight, 4),
        "tensors": {
            suffix: [names[suffix], CODES[spec.dtype], list(spec.shape)] for suffix, spec in entry.outputs.items()
        },
    }
