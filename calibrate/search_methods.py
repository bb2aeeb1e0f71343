"""Which methods may go with which format in a layer: those that lower its expected error per byte.

The expected error of a layer's output comes from the statistics of its input and takes no forward pass. What GPTQ fits
to a Hessian loses less by that Hessian than on other inputs, so that formats with it and without it are never held
against each other: each sort has its own front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bitroute.backends import create
from bitroute.backends._rounded import Rounded
from bitroute.backends.base import Backend
from bitroute.calibrate.search_candidates import KEEP, can_use, is_fitted
from bitroute.calibrate.search_solver import Option, undominated
from bitroute.calibrate.search_space import Layer, Space
from bitroute.convert.layout import StoredTensor, total_bytes
from bitroute.convert.statistics import StatisticsFile
from bitroute.errors import BackendError

__all__ = ["MOST", "trials", "with_methods"]

ROTATIONS, SMOOTHINGS, RANKS = (16, 32, 64, 128), (0.25, 0.5), (4, 8, 16)
TRIALS = 2 + len(ROTATIONS) + len(SMOOTHINGS) + len(RANKS)  # of a format, alone and both sorts together too
SHARE = 0.25  # what a method stores beside the format, of the format's own bytes, at most
MARGIN = 0.9  # what a layer has to do at every step must bring its expected error down to so much
MOST = 8  # candidates of a layer that are measured beside keep, where the weight alone tells their error

Expect = Callable[[Layer, Backend], float | None]
Method = Mapping[str, Any]


def trials(space: Space) -> int:
    """How many weights are encoded, at most."""
    found = (_listed(space, layer) for layer in space.layers)
    return sum(len(listed) + TRIALS * len(_formats(listed)) for listed in found)


def with_methods(
    space: Space, statistics: StatisticsFile, expect: Expect, report: Callable[[str, int, int], None]
) -> Space:
    """The space in which each layer has those candidates, with methods or without, that are worth measuring.

    expect: the error of a layer's own output in a format.
    """
    layers, known = list[Layer](), {KEEP: space.candidates[KEEP]}
    for done, layer in enumerate(space.layers):
        report("methods of layers", done, len(space.layers))
        found = _worth_measuring(space, layer, statistics.stored(space.component.name, layer.name), expect)
        layers.append(replace(layer, size_bytes={name: _size_bytes(layer, found[name]) for name in found}))
        known |= found
    report("methods of layers", len(space.layers), len(space.layers))
    return replace(space, layers=tuple(layers), candidates=known)


def _listed(space: Space, layer: Layer) -> list[Backend]:
    """The candidates of the layer whose error the decoded weight alone tells."""
    found = (space.candidates[name] for name in layer.size_bytes if name != KEEP)
    return [backend for backend in found if not backend.quantizes_activations]


def _formats(listed: Sequence[Backend]) -> list[Backend]:
    """Those that round weight by weight, without their methods, each once."""
    bare = [create(b.name, **{name: value for name, value in b.options.items() if name != "method"}) for b in listed]
    return list(dict.fromkeys(b for b in bare if isinstance(b, Rounded) and b.in_two_steps))


def _size_bytes(layer: Layer, backend: Backend) -> int:
    return total_bytes(backend.outputs(layer.source.spec.rows).values())


def _worth_measuring(
    space: Space, layer: Layer, stored: Mapping[str, StoredTensor], expect: Expect
) -> dict[str, Backend]:
    before = {name: space.candidates[name] for name in layer.size_bytes}
    if not stored.keys() & {"hessian", "second_moment"}:
        return before
    listed, tried = _listed(space, layer), _Trials(layer, stored, expect)
    for backend in listed:
        tried.error(backend)
    for backend in _formats(listed):
        _try_methods(tried, backend)
    run = {name: backend for name, backend in before.items() if name == KEEP or backend.quantizes_activations}
    return run | tried.best()


def _try_methods(tried: _Trials, backend: Backend) -> None:
    """Rotations and smoothings alone, the best of both together, and branches of low rank beside the best of these."""

    def best(methods: Sequence[Method]) -> Method:
        return min(methods, key=lambda method: tried.error_with(backend, method))

    rotated = best([{}, *({"rotate": block} for block in ROTATIONS)])
    smoothed = best([{}, *({"smooth": strength} for strength in SMOOTHINGS)])
    both = best([rotated, smoothed, {**rotated, **smoothed}])
    for rank in RANKS:
        tried.error_with(backend, {**both, "low_rank": rank})


@dataclass
class _Trials:
    """What was tried in a layer. stored: what was measured of its input, kind → tensor."""

    layer: Layer
    stored: Mapping[str, StoredTensor]
    expect: Expect
    found: dict[str, tuple[Backend, float]] = field(default_factory=dict)  # by label: the expected error

    def error(self, backend: Backend) -> float:
        name = str(backend)
        if name not in self.found:
            lost = self.expect(self.layer, backend)
            self.found[name] = backend, math.inf if lost is None else lost
        return self.found[name][1]

    def error_with(self, backend: Backend, method: Method) -> float:
        """With GPTQ where there is a Hessian; infinite for what cannot be, not with these weights, or stores much."""
        changed = create(backend.name, **backend.options, method={**method, "gptq": "hessian" in self.stored})
        if changed.refuse(self.layer.source.spec.rows) or not can_use(changed, self.stored):
            return math.inf
        too_large = _size_bytes(self.layer, changed) > (1 + SHARE) * _size_bytes(self.layer, backend)
        try:
            return math.inf if too_large else self.error(changed)
        except BackendError:
            return math.inf

    def best(self) -> dict[str, Backend]:
        """MOST of those than which none that is as small loses less."""
        fronts = [self._front(fitted) for fitted in (False, True)]
        while sum(map(len, fronts)) > MOST:
            _thin(max(fronts, key=len))
        return {option.kind: self.found[option.kind][0] for front in fronts for option in front}

    def _front(self, fitted: bool) -> list[Option]:
        """From small to large."""
        options = [
            Option(name, _size_bytes(self.layer, backend), error / MARGIN if _runs(backend) else error)
            for name, (backend, error) in self.found.items()
            if is_fitted(backend) is fitted and math.isfinite(error)
        ]
        return [options[index] for index in undominated(options)]


def _runs(backend: Backend) -> bool:
    """Whether its method is applied to the layer's input too; GPTQ is not."""
    return bool(backend.options.get("method", {}).keys() - {"gptq"})


def _thin(front: list[Option]) -> None:
    """Without the one whose place the next smaller one takes best: the least area below log error against bytes."""
    areas = [
        (larger.size_bytes - option.size_bytes) * math.log(smaller.error / option.error)
        for smaller, option, larger in zip(front, front[1:], front[2:], strict=False)
    ]
    del front[1 + areas.index(min(areas))]
