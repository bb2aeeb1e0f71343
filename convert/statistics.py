"""A statistics file: what calibration measured of the inputs of a model's layers, in safetensors.

`COMPONENT/LAYER/second_moment`, `/absmax`, `/hessian`, `/inputs` as backends.base.Statistics has them, and
`/rows`, int64 [2]: how many rows were seen, and how many of them were all zeros. The header's metadata says of what
model, and how it was run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from bitroute.backends.base import ARITHMETIC_DTYPES, NONE, Statistics, TensorSpec
from bitroute.convert.checkpoint import Component
from bitroute.convert.entry import Entry
from bitroute.convert.layout import StoredTensor, read_header
from bitroute.convert.reading import read_tensor
from bitroute.convert.recipe import RecipeFile
from bitroute.errors import Problem, SourceError

METADATA = "bitroute_statistics"
FORMAT_VERSION = 1
KINDS = tuple(kind.name for kind in fields(Statistics))
OPTIONAL = frozenset({"second_moment"})  # weighs the errors of a search
SAMPLES = frozenset({"inputs"})  # tell how large inputs get after a rotation
LEAST_MOMENT = 0.01  # of a channel, of the mean
DIMENSIONS = {"second_moment": 1, "absmax": 1, "hessian": 3, "inputs": 2}


@dataclass(frozen=True)
class StatisticsFile:
    """components: of the calibrated model, name → class. settings: how it was run, for people."""

    file: Path
    tensors: Mapping[str, StoredTensor]
    model: str
    components: Mapping[str, str]
    settings: Mapping[str, Any]

    def layers(self, component: str) -> list[str]:
        """The layers of a component that were measured."""
        parts = [name.split("/") for name in self.tensors]
        return list(dict.fromkeys(layer for found, layer, _ in parts if found == component))

    def kinds(self, component: str, layer: str) -> list[str]:
        return [kind for kind in KINDS if f"{component}/{layer}/{kind}" in self.tensors]

    def stored(self, component: str, layer: str) -> dict[str, StoredTensor]:
        """Kind → where what was measured of a layer is."""
        return {kind: self.tensors[f"{component}/{layer}/{kind}"] for kind in self.kinds(component, layer)}

    def of(self, component: str, layer: str) -> Statistics:
        """What was measured of a layer; NONE where nothing was. Raises as `read_statistics` does."""
        return read_statistics(self.stored(component, layer))

    def describe(self) -> dict[str, Any]:
        """For the record of a job."""
        return {"file": self.file.name, "model": self.model, "settings": dict(self.settings)}

    def misfit(self, component: str, layer: str, columns: int) -> Problem | None:
        """What of a layer's statistics does not fit a weight [out, columns]."""
        for kind in self.kinds(component, layer):
            spec = self.tensors[f"{component}/{layer}/{kind}"].spec
            if not _fits(kind, spec, columns):
                return Problem(
                    f"the {kind} of layer {layer!r} does not fit its weight", str(self.file),
                    got=f"{list(spec.shape)} {spec.dtype}", expected=f"for {columns} input features",
                    next_step="the statistics belong to another model: calibrate this one",
                )  # fmt: skip
        return None


def open_statistics(file: Path) -> StatisticsFile:
    """Reads the header of a statistics file.

    Raises:
        SourceError: no safetensors file, one that calibration did not write, or one of another version.
    """
    if not file.exists():
        mend = "`quantize calibrate MODEL --prompts SET --out FILE` writes one"
        raise SourceError(Problem("there are no statistics", str(file), "no such file", next_step=mend))
    header = read_header(file)
    try:
        found = json.loads(header.metadata[METADATA])
        version = found["format_version"]
        components = {str(name): str(kind) for name, kind in found["components"].items()}
        made = StatisticsFile(file, header.tensors, str(found["model"]), components, dict(found["settings"]))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise _no_statistics(file, "no record of a calibration in its header") from None
    if version != FORMAT_VERSION:
        raise _no_statistics(file, f"format_version {version!r}, where this bitroute reads {FORMAT_VERSION}")
    strangers = [name for name in header.tensors if not _is_named(name)]
    if strangers:
        raise _no_statistics(file, f"a tensor {strangers[0]!r}")
    return made


def read_statistics(stored: Mapping[str, StoredTensor]) -> Statistics:
    """Kind → the tensor in a file, read; NONE of nothing.

    No channel's mean square is taken as less than a hundredth of their mean: what the prompts of a calibration did not
    use others may, and its weights must stay what they were.

    Raises:
        SourceError: the file ends early or cannot be read, or holds numbers that nothing can have measured.
    """
    found = {kind: read_tensor(tensor) for kind, tensor in stored.items()}
    for kind, tensor in found.items():
        negative = kind in ("second_moment", "absmax") and bool((tensor < 0).any())
        if negative or not tensor.isfinite().all():
            got = "a negative number" if negative else "NaN or infinity"
            mend = "the file is damaged: calibrate again"
            raise SourceError(
                Problem(f"{stored[kind].name!r} was not measured", str(stored[kind].file), got, next_step=mend)
            )
    if "second_moment" in found:
        moments = found["second_moment"]
        found["second_moment"] = moments.clamp(min=LEAST_MOMENT * moments.mean().item())
    return Statistics(**found) if found else NONE


def statistics_of(recipe: RecipeFile, chosen: str | Path | None) -> StatisticsFile | None:
    """The chosen file, or the recipe's own, seen from it; None where neither is said.

    Raises:
        SourceError: as `open_statistics`.
    """
    said = recipe.recipe.statistics if recipe.recipe else None
    if chosen is not None:
        return open_statistics(Path(os.path.expanduser(chosen)))
    if said is None:
        return None
    beside = Path(recipe.document.nearest(("statistics",)).file).parent
    return open_statistics(beside / os.path.expanduser(said))


def with_statistics(
    entries: Sequence[Entry], component: Component, file: StatisticsFile | None
) -> tuple[list[Entry], list[Problem]]:
    """The entries with what their backends read of the file, and the layers for which it lacks something."""
    problems, found = _other_model(component, file), list[Entry]()
    lacking: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        stored = file.stored(component.name, entry.layer) if file and entry.quantized else {}
        wanted = entry.backend.measured if entry.quantized else frozenset()
        if missing := ", ".join(sorted(wanted - stored.keys())):
            lacking.setdefault((entry.where, missing), []).append(entry)
        if misfit := file.misfit(component.name, entry.layer, entry.weight.shape[1]) if file and stored else None:
            problems.append(misfit)
        elif refusal := entry.backend.refuse_statistics({kind: stored[kind].spec for kind in wanted & stored.keys()}):
            problems.append(_unusable(entry, refusal))
        used = wanted | OPTIONAL | (SAMPLES if "absmax" in wanted else frozenset())
        found.append(replace(entry, statistics={kind: stored[kind] for kind in KINDS if kind in stored.keys() & used}))
    return found, [*problems, *(_lacking(missing, group, file) for (_, missing), group in lacking.items())]


def metadata(model: str, components: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """What `open_statistics` reads back."""
    record = {"format_version": FORMAT_VERSION, "model": model, "components": components, "settings": settings}
    return {METADATA: json.dumps(record)}


def _other_model(component: Component, file: StatisticsFile | None) -> list[Problem]:
    measured = file.components.get(component.name, component.class_name) if file else component.class_name
    if file is None or measured == component.class_name:
        return []
    return [
        Problem(
            "the statistics are of another model", str(file.file), f"{measured} as {component.name!r}",
            component.class_name, "calibrate the model of this recipe",
        )
    ]  # fmt: skip


def _lacking(missing: str, entries: Sequence[Entry], file: StatisticsFile | None) -> Problem:
    names = ", ".join(entry.layer for entry in entries[:3])
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    if file is None:
        what, got = f"{entries[0].backend} needs statistics", f"none, for {names}{more}"
        mend = "`quantize calibrate MODEL --prompts SET --out FILE`, then `--statistics FILE`"
        return Problem(what, entries[0].where, got, next_step=mend)
    return Problem(
        f"{entries[0].backend} needs {missing} of its layer's input", entries[0].where,
        got=f"{file.file} has none for {names}{more}",
        next_step="calibrate with these layers and kinds, or give the layers a rule without that method",
    )  # fmt: skip


def _unusable(entry: Entry, refusal: str) -> Problem:
    mend = "calibrate with a larger --budget, or give the layer a rule without that method"
    return Problem(f"{entry.backend} cannot use the statistics of layer {entry.layer!r}", entry.where, refusal,
                   next_step=mend)  # fmt: skip


def _is_named(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[2] in (*KINDS, "rows")


def _fits(kind: str, spec: TensorSpec, columns: int) -> bool:
    shape = spec.shape
    if len(shape) != DIMENSIONS[kind] or not spec.dtype.is_floating_point:
        return False
    if kind == "hessian":
        return spec.dtype == torch.float32 and shape[0] * shape[1] == columns and shape[1] == shape[2]
    if kind == "inputs":
        return shape[0] > 0 and shape[1] == columns and spec.dtype in ARITHMETIC_DTYPES
    return shape[-1] == columns and spec.dtype == torch.float32


def _no_statistics(file: Path, got: str) -> SourceError:
    return SourceError(Problem("not a statistics file", str(file), got, "what `quantize calibrate` wrote"))
