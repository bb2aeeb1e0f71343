"""Reopens a finished checkpoint and proves it: against its plan, against its source, and by loading it."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import Component, Pipeline, open_pipeline, read_rows, read_tensor
from bitroute.convert.layout import StoredTensor
from bitroute.convert.plan import LOADING_BYTES
from bitroute.convert.profile import find_profile
from bitroute.convert.record import RecordedComponent, RecordedEntry, read_record
from bitroute.convert.workers import one_torch_thread
from bitroute.errors import BitrouteError, Problem, SourceError, VerifyError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LayerQuality:
    component: str
    layer: str
    backend: str
    sqnr_db: float  # 10·log10(Σw² / Σ(ŵ-w)²); infinite where nothing was lost


@dataclass
class Verification:
    """What was found; empty `problems` means that the checkpoint is what its plan promised."""

    folder: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[LayerQuality] = field(default_factory=list)
    components: dict[str, str] = field(default_factory=dict)  # name → how it was loaded

    @property
    def worst(self) -> list[LayerQuality]:
        return sorted(self.layers, key=lambda layer: layer.sqnr_db)[:10]


def verify(
    folder: str | Path, model: str | None = None, *, load: bool = True, progress: Progress | None = None
) -> Verification:
    """Checks a checkpoint folder that bitroute wrote.

    model: the source to compare with, by default the one that the checkpoint names. load: whether to load each
    component in a fresh process.

    Raises:
        SourceError: the folder is not a finished checkpoint of bitroute.
    """
    found = Verification(Path(folder))
    with one_torch_thread():
        _verify(found, model, load, progress or (lambda what: None))
    return found


def _verify(found: Verification, model: str | None, load: bool, report: Progress) -> None:
    record = read_record(found.folder)
    source = _open_source(model or record.model, found)
    found.problems += [
        Problem(f"the file {name} is missing", str(found.folder), next_step="convert again")
        for name in record.written
        if not (found.folder / name).is_file()
    ]
    for recorded in record.components:
        try:
            report(f"{recorded.name}: weights")
            if _check_tensors(recorded, found):
                _check_weights(recorded, source, found, report)
                _check_loading(recorded, load, found, report)
        except BitrouteError as error:
            found.problems += error.problems
    _check_copies(record.copied, source, found)


def raise_for_problems(found: Verification) -> None:
    if found.problems:
        raise VerifyError(found.problems)


def _open_source(model: str, found: Verification) -> Pipeline | None:
    try:
        return open_pipeline(model)
    except SourceError:
        found.notes.append(
            f"source {model} is not here: weights were decoded but not compared (give --model)"
        )
        return None


def _check_tensors(recorded: RecordedComponent, found: Verification) -> bool:
    """Every planned tensor is there with its dtype and shape, and no other."""
    planned = {name: spec for entry in recorded.entries for name, spec in entry.tensors.values()}
    stored = {name: tensor.spec for name, tensor in recorded.component.tensors.items()}
    where = str(recorded.component.folder)
    problems = [Problem(f"tensor {name!r} is missing", where) for name in planned.keys() - stored.keys()]
    problems += [
        Problem(f"tensor {name!r} was not planned", where) for name in stored.keys() - planned.keys()
    ]
    problems += [
        Problem(f"tensor {name!r} is not as planned", where, got=str(stored[name]), expected=str(spec))
        for name, spec in planned.items()
        if name in stored and stored[name] != spec
    ]
    found.problems += sorted(problems, key=str)[:20]
    return not problems


def _check_weights(
    recorded: RecordedComponent, source: Pipeline | None, found: Verification, report: Progress
) -> None:
    component = recorded.component
    originals = _originals(source, component.name) if source else {}
    for entry in recorded.entries:
        report(f"{component.name}: {entry.name}")
        original = originals.get(entry.name)
        if source and (original is None or original.spec.rows.shape != entry.weight.rows.shape):
            other = f"the source has {list(original.spec.shape)}" if original else "the source has no such tensor"
            found.problems.append(_bad_layer(component, entry, f"shape {list(entry.weight.shape)}", other))
            continue
        if not entry.quantized:
            if original is not None:
                _check_kept(component, entry, original, found)
            continue
        signal, noise, finite = _compare(component, entry, original)
        ratio = signal / noise if noise else float("inf")
        sqnr_db = 10 * torch.tensor(ratio, dtype=torch.float64).log10().item() if ratio > 0 else -float("inf")
        if original is not None:
            found.layers.append(LayerQuality(component.name, entry.layer, entry.backend.name, sqnr_db))
        if not finite:
            found.problems.append(_bad_layer(component, entry, "NaN or infinite values", "finite weights"))
        elif original is not None and sqnr_db < entry.backend.lowest_sqnr_db:
            expected = f"at least {entry.backend.lowest_sqnr_db:.0f} dB for {entry.backend.name}"
            found.problems.append(_bad_layer(component, entry, f"SQNR {sqnr_db:.1f} dB", expected))


def _originals(source: Pipeline, name: str) -> dict[str, StoredTensor]:
    if name not in source.components:
        raise SourceError(Problem(f"the source has no component {name!r}", str(source.folder)))
    return build(source.components[name]).sources


def _compare(
    component: Component, entry: RecordedEntry, original: StoredTensor | None
) -> tuple[float, float, bool]:
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


def _check_kept(component: Component, entry: RecordedEntry, original: StoredTensor, found: Verification) -> None:
    """A kept tensor is its source, byte for byte or cast to the planned dtype."""
    name, spec = entry.tensors["weight"]
    stored = component.tensors[name]
    for start, stop in entry.backend.block_bounds(original.spec.rows):
        rows = read_rows(original, start, stop).to(spec.dtype)
        if not torch.equal(_raw(read_rows(stored, start, stop)), _raw(rows)):
            found.problems.append(
                _bad_layer(component, entry, "other values than the source", "an exact copy")
            )
            return


def _raw(rows: torch.Tensor) -> torch.Tensor:
    """NaN is not equal to itself, its bytes are."""
    return rows.contiguous().reshape(-1).view(torch.uint8)


def _bad_layer(component: Component, entry: RecordedEntry, got: str, expected: str) -> Problem:
    return Problem(
        f"tensor {entry.name!r} does not hold its weight", str(component.folder), got, expected,
        next_step="convert again; if it comes back, give this layer another backend",
    )  # fmt: skip


def _check_loading(
    recorded: RecordedComponent, load: bool, found: Verification, report: Progress
) -> None:
    component = recorded.component
    needed = int(1.2 * recorded.size_bytes) + LOADING_BYTES
    available = psutil.virtual_memory().available
    if not load or needed > available:
        reason = (
            "--no-load"
            if not load
            else f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
        )
        found.components[component.name] = f"not loaded ({reason})"
        return
    report(f"{component.name}: loading in a fresh process")
    no_gpu = recorded.container == "bitsandbytes" and not torch.cuda.is_available()
    if no_gpu:
        found.notes.append(
            f"{component.name}: the loader's GPU check was lifted, in verify's own process only"
        )
    answer = _run_loading(recorded, no_gpu)
    found.problems += list(_loading_problems(recorded, answer))
    words = _loading_words(recorded, answer, found)
    found.components[component.name] = f"{recorded.bits_per_weight:.2f} bits per weight as planned; {words}"


def _run_loading(recorded: RecordedComponent, lift_gpu_check: bool) -> dict[str, Any]:
    component = recorded.component
    profile = find_profile(component.class_name)
    probe = profile.probe(component.config) if profile else {}
    request = {
        "folder": str(component.folder), "library": component.library, "class": component.class_name,
        "needs_bitroute": recorded.container == "bitroute", "lift_gpu_check": lift_gpu_check,
        "probe": {name: asdict(given) for name, given in probe.items()},
    }  # fmt: skip
    # -P: the script's own folder must not shadow the standard library
    command = [sys.executable, "-P", str(Path(__file__).with_name("loading.py"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"the loading process ended with {done.returncode}: {done.stderr.strip()[-400:]}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _loading_problems(recorded: RecordedComponent, answer: Mapping[str, Any]) -> Iterator[Problem]:
    where = str(recorded.component.folder)
    if "error" in answer:
        yield Problem(f"{recorded.component.class_name} does not load", where, got=answer["error"])
        return
    if answer["bitroute_imported"] and recorded.container != "bitroute":
        yield Problem("loading imported bitroute, which the plan said it would not need", where)
    for key, words in (
        ("missing_keys", "newly initialized"), ("unexpected_keys", "unknown to the model"),
        ("mismatched_keys", "of another shape"), ("meta_tensors", "left on the meta device"),
    ):  # fmt: skip
        if answer[key]:
            yield Problem(
                f"{len(answer[key])} tensors are {words} after loading", where, got=str(answer[key][:3])
            )


def _loading_words(recorded: RecordedComponent, answer: Mapping[str, Any], found: Verification) -> str:
    """`loaded, forward ok` and its other outcomes; a forward that should have run and did not is a problem."""
    component = recorded.component
    how = "with bitroute" if recorded.container == "bitroute" else "without bitroute"
    if "error" in answer:
        return f"does not load {how}"
    forward = answer["forward"]
    needs = sorted({entry.backend.gpu_to_compute() for entry in recorded.entries if entry.quantized} - {""})
    if forward is None:
        return f"loaded {how}; forward not run: no probe inputs are known for {component.class_name}"
    if "error" in forward and needs:
        return f"loaded {how}; forward not run: needs {', '.join(needs)}"
    if "error" in forward or not forward["finite"]:
        got = forward.get("error", "NaN or infinite outputs")
        found.problems.append(Problem("a forward after loading fails", str(component.folder), got=got))
        return f"loaded {how}; forward failed"
    return f"loaded {how}; forward ok"


def _check_copies(copied: Mapping[str, int], source: Pipeline | None, found: Verification) -> None:
    for name, size_bytes in copied.items():
        copy = found.folder / name
        if not copy.is_file() or copy.stat().st_size != size_bytes:
            found.problems.append(Problem(f"the copied file {name} is missing or changed", str(found.folder)))
        elif source and not filecmp.cmp(source.folder / name, copy, shallow=False):
            found.problems.append(
                Problem(f"the copied file {name} differs from its source", str(found.folder))
            )
