"""Reopens a finished checkpoint and proves it: against its record, against its source, and by loading it."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bitroute.convert.checkpoint import Pipeline
from bitroute.convert.fidelity import LayerQuality, Progress, compare_weights
from bitroute.convert.files import sha256
from bitroute.convert.opening import open_recorded
from bitroute.convert.record import Record, RecordedComponent, read_record
from bitroute.convert.reload import Reload, reload
from bitroute.convert.workers import run_all
from bitroute.errors import BitrouteError, Problem, SourceError


@dataclass
class Verification:
    """What was found; without problems the checkpoint is what its job wrote and its plan promised."""

    folder: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[LayerQuality] = field(default_factory=list)
    components: dict[str, str] = field(default_factory=dict)  # name → bits per weight, and how it was loaded
    compared: bool = False  # whether the source was there to hold the weights against
    record_sha256: str = ""  # of bitroute.json, which holds the hashes of all other files

    @property
    def verified(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> list[LayerQuality]:
        return sorted(self.layers, key=lambda layer: layer.sqnr_db)[:10]

    @property
    def verdict(self) -> str:
        if self.problems:
            return f"{len(self.problems)} problems found"
        return "verified" if self.compared else "intact, NOT compared with its source"


def verify(
    folder: str | Path,
    model: str | Pipeline | None = None,
    *,
    load: bool = True,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Checks a checkpoint folder that bitroute wrote.

    model: the source to compare with, by default the one that the checkpoint names, if it is there.
    load: whether to load the components in fresh processes. allow_pickle: as of the job that read such a source.

    Raises:
        SourceError: the folder is not a finished checkpoint of bitroute, or `model` is no pipeline.
    """
    found = Verification(Path(folder).expanduser())
    report = progress or (lambda done, what: None)
    record = read_record(found.folder)
    found.record_sha256 = sha256(found.folder / "bitroute.json")
    source = model if isinstance(model, Pipeline) else _open_source(record, model, found, allow_pickle)
    found.compared = source is not None
    report(0, "hashes")
    _check_hashes(record, found)
    sound = [recorded for recorded in record.components if _check_weights(recorded, source, found, report)]
    _load(sound, load, found, report)
    if source:
        _check_copies(record.copied, source, found)
        _check_loras(source, found)
    return found


def _open_source(record: Record, model: str | None, found: Verification, allow_pickle: bool) -> Pipeline | None:
    """Never from the network: a model on the Hub is looked for in the cache, at the commit that was converted."""
    try:
        return open_recorded(record, model, allow_pickle=allow_pickle)
    except SourceError:
        if model is not None:
            raise
        name = f"{record.model}@{record.revision}" if record.revision else record.model
        found.notes.append(f"source {name} is not here: weights were decoded but not compared (give --model)")
        return None


def _check_loras(source: Pipeline, found: Verification) -> None:
    """Each LoRA left its mark: a small one can vanish when a weight is rounded to 16 bits."""
    for lora in source.loras:
        layers = sum(len(parts) for parts in lora.layers.values())
        found.notes.append(f"{lora.source.words}: {len(lora.changed)} of {layers} weights came out changed")
        if not lora.changed:
            found.problems.append(Problem(f"{lora.source.words} changed no weight", str(lora.source.file)))


def _check_hashes(record: Record, found: Verification) -> None:
    """Every file is there and is, to the last bit, what the job wrote."""
    changed: dict[str, Problem] = {}

    def check(name: str) -> None:
        file = found.folder / name
        if not file.is_file():
            changed[name] = Problem(f"the file {name} is missing", str(found.folder), next_step="convert again")
        elif sha256(file) != record.hashes.get(name):
            mend = "convert again, or copy the checkpoint again"
            changed[name] = Problem(f"the file {name} was changed after the job", str(found.folder), next_step=mend)

    run_all(partial(check, name) for name in record.files)
    found.problems += [changed[name] for name in record.files if name in changed]


def _check_weights(recorded: RecordedComponent, source: Pipeline | None, found: Verification, report: Progress) -> bool:
    """Whether the component can be loaded: all that was planned is there."""
    try:
        if not _check_tensors(recorded, found):
            return False
        layers, problems = compare_weights(recorded, source, report)
    except BitrouteError as error:
        found.problems += error.problems
        return False
    found.layers += layers
    found.problems += problems
    return True


def _load(components: Sequence[RecordedComponent], load: bool, found: Verification, report: Progress) -> None:
    loaded = dict.fromkeys((recorded.name for recorded in components), Reload("not loaded (--no-load)"))
    if load and components:
        report(0, f"{', '.join(loaded)}: loading in a fresh process")
        loaded = reload(components)
    for recorded in components:
        outcome = loaded[recorded.name]
        found.problems += outcome.problems
        found.notes += outcome.notes
        planned = f"{recorded.bits_per_weight:.2f} bits per weight as planned"
        found.components[recorded.name] = f"{planned}; {outcome.words}"


def _check_tensors(recorded: RecordedComponent, found: Verification) -> bool:
    """Every planned tensor is there with its dtype and shape, and no other."""
    planned = {name: spec for entry in recorded.entries for name, spec in entry.tensors.values()}
    stored = {name: tensor.spec for name, tensor in recorded.component.tensors.items()}
    where = str(recorded.component.folder)
    problems = [Problem(f"tensor {name!r} is missing", where) for name in planned.keys() - stored.keys()]
    problems += [Problem(f"tensor {name!r} was not planned", where) for name in stored.keys() - planned.keys()]
    problems += [
        Problem(f"tensor {name!r} is not as planned", where, got=str(stored[name]), expected=str(spec))
        for name, spec in planned.items()
        if name in stored and stored[name] != spec
    ]
    found.problems += sorted(problems, key=str)[:20]
    return not problems


def _check_copies(copied: Iterable[str], source: Pipeline, found: Verification) -> None:
    for name in copied:
        original, copy = source.folder / name, found.folder / name
        if not original.is_file():
            found.problems.append(Problem(f"the source lacks the copied file {name}", str(original.parent)))
        elif copy.is_file() and not filecmp.cmp(original, copy, shallow=False):
            found.problems.append(Problem(f"the copied file {name} differs from its source", str(found.folder)))
