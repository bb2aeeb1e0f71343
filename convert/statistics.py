"""A statistics file: what calibration measured of the inputs of a model's layers, in safetensors.

`COMPONENT/LAYER/second_moment`, `/absmax`, `/hessian`, `/inputs` as backends.base.Statistics has them, and
`/rows`, int64 [2]: how many rows were seen, and how many of them were all zeros. The header's metadata says of what
model, and how it was run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bitroute.backends.base import NONE, Statistics, TensorSpec
from bitroute.convert.layout import StoredTensor, read_header
from bitroute.convert.reading import read_tensor
from bitroute.errors import Problem, SourceError

METADATA = "bitroute_statistics"
FORMAT_VERSION = 1
KINDS = tuple(kind.name for kind in fields(Statistics))
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

    def of(self, component: str, layer: str) -> Statistics:
        """What was measured of a layer; NONE where nothing was.

        Raises:
            SourceError: the file ends early or cannot be read.
        """
        found = {kind: self.tensors[f"{component}/{layer}/{kind}"] for kind in self.kinds(component, layer)}
        return Statistics(**{kind: read_tensor(tensor) for kind, tensor in found.items()}) if found else NONE

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


def metadata(model: str, components: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """What `open_statistics` reads back."""
    record = {"format_version": FORMAT_VERSION, "model": model, "components": components, "settings": settings}
    return {METADATA: json.dumps(record)}


def _is_named(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[2] in (*KINDS, "rows")


def _fits(kind: str, spec: TensorSpec, columns: int) -> bool:
    shape = spec.shape
    if len(shape) != DIMENSIONS[kind] or not spec.dtype.is_floating_point:
        return False
    if kind == "hessian":
        return spec.dtype == torch.float32 and shape[0] * shape[1] == columns and shape[1] == shape[2]
    return shape[-1] == columns and (kind == "inputs" or spec.dtype == torch.float32)


def _no_statistics(file: Path, got: str) -> SourceError:
    return SourceError(
        Problem("not a statistics file", str(file), got, "what `quantize calibrate MODEL --out FILE` wrote")
    )
