"""What an interrupted calibration leaves: the state of its sums after a sample, of what model, and how it was run.

It lies beside the statistics file as NAME.unfinished, in safetensors, and is no statistics file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitroute.backends.base import TensorSpec
from bitroute.calibrate.statistics import Accumulator
from bitroute.convert.layout import Header, read_header
from bitroute.convert.reading import read_tensor
from bitroute.convert.writer import ShardWriter
from bitroute.errors import Problem, RecipeError, SourceError

METADATA = "bitroute_calibration"
Accumulators = Mapping[str, Accumulator]  # by the key of their layer


@dataclass(frozen=True)
class Facts:
    """All that decides the bytes of a statistics file.

    settings: how it is run. layers: key → block of the Hessian. source: file of the model → bytes, when written in ns.
    """

    settings: Mapping[str, Any]
    layers: Mapping[str, int]
    source: Mapping[str, list[int]]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def changes(self, now: Facts) -> list[Problem]:
        """Why `now` would not give the same statistics."""
        pairs = [
            *_differences("the setting {!r}", self.settings, now.settings),
            *_differences("what is measured of layer {!r}", self.layers, now.layers),
            *_differences("the model's file {!r}", self.source, now.source),
        ]
        return [
            Problem(f"{what} has changed since the calibration began", got=_shown(new), expected=_shown(old))
            for what, old, new in pairs
        ][:5]


def place_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def save(out: Path, facts: Facts, accumulators: Accumulators, done: int) -> None:
    """After so many samples."""
    states = {f"{key}/{part}": tensor for key, found in accumulators.items() for part, tensor in found.state().items()}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in states.items()}
    record = json.dumps({"facts": asdict(facts), "done": done})
    with ShardWriter(place_of(out), specs, {METADATA: record}) as writer:
        for name, tensor in states.items():
            writer.append(name, tensor)


def restore(out: Path, facts: Facts, accumulators: Accumulators) -> int:
    """Fills the accumulators; how many samples they have seen.

    Raises:
        RecipeError: it was begun with other settings or another model. SourceError: it is damaged.
    """
    file = place_of(out)
    header = read_header(file)
    then, done = _record(file, header)
    if changes := then.changes(facts):
        anew = Problem("this calibration cannot go on", str(file), next_step="give --overwrite to begin anew")
        raise RecipeError([anew, *changes])
    for key, accumulator in accumulators.items():
        stored = {name: header.tensors.get(f"{key}/{name}") for name in accumulator.state()}
        found = {name: tensor for name, tensor in stored.items() if tensor}
        if not accumulator.fits({name: tensor.spec for name, tensor in found.items()}):
            raise _damaged(file)
        accumulator.restore({name: read_tensor(tensor) for name, tensor in found.items()})
    return done


def _record(file: Path, header: Header) -> tuple[Facts, int]:
    try:
        record = json.loads(header.metadata[METADATA])
        return Facts(**{name: dict(content) for name, content in record["facts"].items()}), int(record["done"])
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> SourceError:
    mend = "remove it, or give --overwrite to begin anew"
    return SourceError(Problem("not the state of a calibration", str(file), next_step=mend))


def _differences(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            yield what.format(name), then.get(name, "none"), now.get(name, "none")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:200]
