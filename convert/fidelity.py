"""Every stored layer decoded and held against its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.layout import StoredTensor
from bitroute.convert.reading import read_rows, read_tensor
from bitroute.convert.record import RecordedComponent, RecordedEntry
from bitroute.convert.workers import run_all
from bitroute.errors import Problem, SourceError

Progress = Callable[[int, str], None]  # stored bytes done since the last call, what was looked at; from any thread


@dataclass(frozen=True)
class LayerQuality:
    component: str
    layer: str
    backend: str
    sqnr_db: float  # 10·log10(Σw² / Σ(ŵ-w)²); infinite where nothing was lost


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
    signal, noise, finite = _compare(component, entry, original)
    if not finite:
        return None, _bad_layer(component, entry, "NaN or infinite values", "finite weights")
    if original is None:
        return None, None
    sqnr_db = _decibels(signal, noise)
    quality = LayerQuality(component.name, entry.layer, entry.backend.name, sqnr_db)
    lowest = entry.backend.lowest_sqnr_db
    if sqnr_db < lowest:
        expected = f"at least {lowest:.0f} dB for {entry.backend.name}"
        return quality, _bad_layer(component, entry, f"SQNR {sqnr_db:.1f} dB", expected)
    return quality, None


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _originals(source: Pipeline, name: str) -> dict[str, StoredTensor]:
    if name not in source.components:
        raise SourceError(Problem(f"the source has no component {name!r}", str(source.folder)))
    return build(source.components[name]).sources


def _compare(component: Component, entry: RecordedEntry, original: StoredTensor | None) -> tuple[float, float, bool]:
    """Σw², Σ(ŵ-w)² and whether every decoded value is finite; the source is read in blocks of rows."""
    stored = {suffix: read_tensor(component.tensors[name]) for suffix, (name, _) in entry.tensors.items()}
    decoded = entry.backend.decode(stored, entry.weight)
    if original is None:
        return 0.0, 0.0, bool(decoded.isfinite().all())
    signal = noise = 0.0
    for start, stop in entry.backend.block_bounds(entry.weight):
        rows = read_rows(original, start, stop).float()
        signal += rows.double().square().sum().item()
        noise += (decoded[start:stop] - rows).double().square().sum().item()
    return signal, noise, noise == noise and noise != float("inf")


def _is_copy(component: Component, entry: RecordedEntry, original: StoredTensor) -> bool:
    """A kept tensor is its source, byte for byte or cast to the planned dtype."""
    name, spec = entry.tensors["weight"]
    stored = component.tensors[name]
    return all(
        torch.equal(_raw(read_rows(stored, start, stop)), _raw(read_rows(original, start, stop).to(spec.dtype)))
        for start, stop in entry.backend.block_bounds(original.spec.rows)
    )


def _raw(rows: torch.Tensor) -> torch.Tensor:
    """NaN is not equal to itself, its bytes are."""
    return rows.contiguous().reshape(-1).view(torch.uint8)


def _bad_layer(component: Component, entry: RecordedEntry, got: str, expected: str) -> Problem:
    return Problem(
        f"tensor {entry.name!r} does not hold its weight", str(component.folder), got, expected,
        next_step="convert again; if it comes back, give this layer another backend",
    )  # fmt: skip
