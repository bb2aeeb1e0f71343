"""Tier 0: what quantizing did to the weights themselves; no prompt, no picture, seconds.

SQNR is set beside the rate-distortion limit: no code of R bits per weight, whatever its cost, stores independent
Gaussian weights with less than D(R) = σ²·2^-2R of squared error (Shannon 1959; Cover & Thomas, Elements of
Information Theory, chapter 10), which is an SQNR of 20·log10(2)·R = 6.02·R dB. Weights that are not Gaussian or not
independent can be stored better, so the gap is a yardstick between formats, not a proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitroute.convert.checkpoint import Pipeline
from bitroute.convert.fidelity import LayerQuality, compare_weights, decibels
from bitroute.convert.opening import open_recorded
from bitroute.convert.record import RecordedComponent, RecordedEntry, read_record
from bitroute.errors import BitrouteError, JobError, Problem, SourceError
from bitroute.eval.scores import plain

DB_PER_BIT = 20 * math.log10(2)
WORST = 10


def weigh(candidate: Path, original: Path) -> dict[str, Any]:
    """The report's `weights` (docs/report.md) of each component with quantized layers; {} for other tools' checkpoints.

    Raises:
        JobError: the record or the weights are damaged, or the original is not their source; one reason.
    """
    if not (candidate / "bitroute.json").is_file():
        return {}
    try:
        record = read_record(candidate)
        source = open_recorded(record, str(original))
        found = {component.name: _layers(component, source) for component in record.components}
    except (BitrouteError, OSError) as error:
        raise JobError(_reason(error, candidate)) from error
    return {name: plain(_describe(layers)) for name, layers in found.items() if layers}


def _layers(recorded: RecordedComponent, source: Pipeline) -> list[LayerQuality]:
    """Of the quantized layers; kept tensors are not read."""
    quantized = replace(recorded, entries=[entry for entry in recorded.entries if entry.quantized])
    if not quantized.entries:
        return []
    for entry in quantized.entries:
        _check_tensors(recorded, entry)
    layers, problems = compare_weights(quantized, source, lambda done, what: None)
    if problems:
        raise SourceError(problems)
    return layers


def _check_tensors(recorded: RecordedComponent, entry: RecordedEntry) -> None:
    """What a backend decodes must be what it writes."""
    stored, planned = recorded.component.tensors, entry.backend.outputs(entry.weight)
    for suffix, (name, _) in entry.tensors.items():
        if name not in stored or stored[name].spec != planned[suffix]:
            got = str(stored[name].spec) if name in stored else "no such tensor"
            raise SourceError(Problem(f"tensor {name!r} is not as planned", got=got, expected=str(planned[suffix])))


def _reason(error: BitrouteError | OSError, candidate: Path) -> Problem:
    """The first of the problems, and how many more there are."""
    problems: Sequence[Problem] = error.problems if isinstance(error, BitrouteError) else [Problem(str(error))]
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    found = f"{problems[0].what}: {problems[0].got}" if problems[0].got else problems[0].what
    mend = "look closer: quantize verify, with --model and the original"
    return Problem("its weights cannot be held against the original's", str(candidate), f"{found}{more}", "", mend)


def _describe(layers: Sequence[LayerQuality]) -> dict[str, Any]:
    figures = _figures(layers)
    return {
        **figures,
        "limit_db": DB_PER_BIT * figures["bits_per_weight"],
        "largest_error": max(layer.largest_error for layer in layers),
        "layers": [
            {"layer": layer.layer, "backend": layer.backend, **_figures([layer])}
            for layer in sorted(layers, key=lambda layer: layer.sqnr_db)[:WORST]
        ],
    }


def _figures(layers: Sequence[LayerQuality]) -> dict[str, float]:
    """Of all their weights together. relative_error: ||ŵ-w|| / ||w||, Frobenius. gap_db: to the limit at these bits."""
    bits = 8 * sum(layer.stored_bytes for layer in layers) / sum(layer.weights for layer in layers)
    signal, noise = sum(layer.signal for layer in layers), sum(layer.noise for layer in layers)
    sqnr_db = decibels(signal, noise)
    return {
        "bits_per_weight": bits,
        "relative_error": math.sqrt(noise / signal) if noise else 0.0,
        "sqnr_db": sqnr_db,
        "gap_db": DB_PER_BIT * bits - sqnr_db,
    }
