"""Every stored layer decoded and held against its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.layout import StoredTensor
from bitroute.convert.reading import read_blocks, read_tensor
from bitroute.convert.record import RecordedComponent, RecordedEntry
from bitroute.convert.workers import check_stop, run_all
from bitroute.errors import Problem, SourceError

Progress = Callable[[int, str], None]  # stored bytes done since the last call, what was looked at; from any thread


@dataclass(frozen=True)
class LayerQuality:
    """A stored weight ŵ beside its source w, both times the backend's importance of each input channel."""

    component: str
    layer: str
    backend: str
    weights: int
    stored_bytes: int  # scales included
    signal: float  # Σw²
    noise: float  # Σ(ŵ-w)²
    largest_error: float  # max |ŵ-w|

    @property
    def sqnr_db(self) -> float:
        return decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise); infinite where nothing was lost."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def compare_weights(
    recorded: RecordedComponent, source: Pipeline | None, progress: Progress
) -> tuple[list[LayerQuality], list[Problem]]:
    """The quality of each quantized layer, and what is wrong with any tensor.

    Without a source, weights are decoded and checked for NaN and infinity only.

    Raises:
        SourceError: the source has no such component, or is not a model of that class any more.
    """
    originals = _originals(source, recorded.name) if source else {}
    qualities: dict[str, LayerQuality] = {}
    problems: dict[str, Problem] = {}

    def check(entry: RecordedEntry) -> None:
        quality, problem = _check(recorded.component, entry, originals.get(entry.name), source is not None)
        if quality:
            qualities[entry.name] = quality
        if problem:
            problems[entry.name] = problem
        progress(sum(spec.size_bytes for _, spec in entry.tensors.values()), f"{recorded.name}: {entry.name}")

    run_all(partial(check, entry) for entry in recorded.entries)
    names = [entry.name for entry in recorded.entries]
    return [qualities[n] for n in names if n in qualities], [problems[n] for n in names if n in problems]


def _check(
    component: Component, entry: RecordedEntry, original: StoredTensor | None, compared: bool
) -> tuple[LayerQuality | None, Problem | None]:
    if compared and (original is None or original.spec.rows.shape != entry.weight.rows.shape):
        other = f"the source has {list(original.spec.shape)}" if original else "the source has no such tensor"
        return None, _bad_layer(component, entry, f"shape {list(entry.weight.shape)}", other)
    if not entry.quantized:
        same = original is None or _is_copy(component, entry, original)
        return None, None if same else _bad_layer(component, entry, "other values than the source", "an exact copy")
    stored = {suffix: read_tensor(component.tensors[name]) for suffix, (name, _) in entry.tensors.items()}
    quality = _compare(component.name, entry, stored, original) if original else None
    if not (math.isfinite(quality.noise) if quality else _is_finite(entry, stored)):
        return None, _bad_layer(component, entry, "NaN or infinite values", "finite weights")
    lowest = entry.lowest_sqnr_db
    if quality and quality.sqnr_db < lowest:
        expected = f"at least {lowest:.0f} dB for {entry.backend.name}"
        return quality, _bad_layer(component, entry, f"SQNR {quality.sqnr_db:.1f} dB", expected)
    return quality, None


def _originals(source: Pipeline, name: str) -> dict[str, StoredTensor]:
    if name not in source.components:
        raise SourceError(Problem(f"the source has no component {name!r}", str(source.folder)))
    return build(source.components[name]).sources


def _is_finite(entry: RecordedEntry, stored: Mapping[str, Tensor]) -> bool:
    bounds = entry.backend.block_bounds(entry.weight)
    return all(bool(entry.backend.decode(stored, entry.weight, rows=rows).isfinite().all()) for rows in bounds)


def _compare(
    component: str, entry: RecordedEntry, stored: Mapping[str, Tensor], original: StoredTensor
) -> LayerQuality:
    """Both are taken in blocks of rows; no temporary is larger than one, and sums are in float64."""
    importance = entry.backend.importance(stored)
    signal = noise = largest = 0.0
    bounds = list(entry.backend.block_bounds(entry.weight))
    for (start, stop), block in zip(bounds, read_blocks(original, iter(bounds)), strict=True):
        check_stop()
        rows = block.float()
        error = entry.backend.decode(stored, entry.weight, rows=(start, stop)).sub_(rows)
        if importance is not None:
            error, rows = error * importance, rows * importance
        low, high = error.aminmax()
        largest = max(largest, -low.item(), high.item())
        signal += _energy(rows)
        noise += _energy(error)
    stored_bytes = sum(spec.size_bytes for _, spec in entry.tensors.values())
    return LayerQuality(
        component, entry.layer, entry.backend.name, entry.weight.numel, stored_bytes, signal, noise, largest
    )


def _energy(rows: Tensor) -> float:
    norm: float = torch.linalg.vector_norm(rows, dtype=torch.float64).item()
    return norm**2


def _is_copy(component: Component, entry: RecordedEntry, original: StoredTensor) -> bool:
    """A kept tensor is its source, byte for byte or cast to the planned dtype."""
    name, spec = entry.tensors["weight"]
    stored = component.tensors[name]
    bounds = list(entry.backend.block_bounds(original.spec.rows))
    for copy, rows in zip(read_blocks(stored, iter(bounds)), read_blocks(original, iter(bounds)), strict=True):
        check_stop()
        if not torch.equal(_raw(copy), _raw(rows.to(spec.dtype))):
            return False
    return True


def _raw(rows: Tensor) -> Tensor:
    """NaN is not equal to itself, its bytes are."""
    return rows.contiguous().reshape(-1).view(torch.uint8)


def _bad_layer(component: Component, entry: RecordedEntry, got: str, expected: str) -> Problem:
    return Problem(
        f"tensor {entry.name!r} does not hold its weight", str(component.folder), got, expected,
        next_step="convert again; if it comes back, give this layer another backend",
    )  # fmt: skip
