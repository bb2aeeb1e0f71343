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

from bitroute import backends
from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import Component, Pipeline, open_pipeline, read_json, read_rows, read_tensor
from bitroute.convert.layout import DTYPES, StoredTensor
from bitroute.convert.plan import LOADING_BYTES
from bitroute.convert.profile import find_profile
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


@dataclass(frozen=True)
class Recorded:
    """One entry of `bitroute.json`."""

    name: str
    layer: str
    backend: Backend
    weight: TensorSpec
    tensors: dict[str, tuple[str, TensorSpec]]  # suffix → stored name and what it must be

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Recorded:
        tensors = {
            suffix: (name, TensorSpec(tuple(shape), DTYPES[dtype]))
            for suffix, (name, dtype, shape) in entry["tensors"].items()
        }
        backend = backends.create(entry["backend"], **entry["options"])
        weight = TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        return cls(entry["name"], entry["layer"], backend, weight, tensors)

    @property
    def quantized(self) -> bool:
        return self.backend.name != "keep"


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
    content = _provenance(found.folder)
    source = _open_source(model or content["source"]["model"], found)
    for name, described in content["plan"]["components"].items():
        component = Component(name, described["library"], described["class"], found.folder / name)
        try:
            entries = [Recorded.parse(entry) for entry in described["entries"]]
            report(f"{name}: weights")
            if _check_tensors(component, entries, found):
                _check_weights(component, entries, source, found, report)
                _check_loading(component, described, entries, load, found, report)
        except BitrouteError as error:
            found.problems += error.problems
    _check_copies(content["plan"]["copied"], source, found)


def raise_for_problems(found: Verification) -> None:
    if found.problems:
        raise VerifyError(found.problems)


def _provenance(folder: Path) -> dict[str, Any]:
    if not (folder / "bitroute.json").is_file():
        unfinished = (folder / "bitroute.json.part").is_file()
        raise SourceError(
            Problem(
                "not a finished checkpoint of bitroute", str(folder),
                got="an unfinished one" if unfinished else "no bitroute.json",
                next_step="run the job again with --overwrite" if unfinished else "give the folder that a job wrote",
            )
        )  # fmt: skip
    content = read_json(folder / "bitroute.json")
    if content.get("format_version") != 1 or not isinstance(content.get("plan"), dict):
        raise SourceError(
            Problem(
                "bitroute.json has another format", str(folder / "bitroute.json"),
                got=f"format_version {content.get('format_version')}", expected="1",
                next_step="pip install -U bitroute",
            )
        )  # fmt: skip
    return content


def _open_source(model: str, found: Verification) -> Pipeline | None:
    try:
        return open_pipeline(model)
    except SourceError:
        found.notes.append(
            f"source {model} is not here: weights were decoded but not compared (give --model)"
        )
        return None


def _check_tensors(component: Component, entries: list[Recorded], found: Verification) -> bool:
    """Every planned tensor is there with its dtype and shape, and no other."""
    planned = {name: spec for entry in entries for name, spec in entry.tensors.values()}
    stored = {name: tensor.spec for name, tensor in component.tensors.items()}
    where = str(component.folder)
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
    component: Component,
    entries: list[Recorded],
    source: Pipeline | None,
    found: Verification,
    report: Progress,
) -> None:
    originals = build(source.components[component.name]).sources if source else {}
    for entry in entries:
        report(f"{component.name}: {entry.name}")
        original = originals.get(entry.name)
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


def _compare(
    component: Component, entry: Recorded, original: StoredTensor | None
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


def _check_kept(component: Component, entry: Recorded, original: StoredTensor, found: Verification) -> None:
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


def _bits(entries: list[Recorded]) -> float:
    """Of the tensors that were found in the files, scales included, over the weights they stand for."""
    stored = sum(spec.size_bytes for entry in entries for _, spec in entry.tensors.values())
    return 8 * stored / max(sum(entry.weight.numel for entry in entries), 1)


def _bad_layer(component: Component, entry: Recorded, got: str, expected: str) -> Problem:
    return Problem(
        f"tensor {entry.name!r} does not hold its weight", str(component.folder), got, expected,
        next_step="convert again; if it comes back, give this layer another backend",
    )  # fmt: skip


def _check_loading(
    component: Component, described: Mapping[str, Any], entries: list[Recorded], load: bool,
    found: Verification, report: Progress,
) -> None:  # fmt: skip
    needed = int(1.2 * described["size_bytes"]) + LOADING_BYTES
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
    no_gpu = described["container"] == "bitsandbytes" and not torch.cuda.is_available()
    if no_gpu:
        found.notes.append(
            f"{component.name}: the loader's GPU check was lifted, in verify's own process only"
        )
    answer = _run_loading(component, described, no_gpu)
    found.problems += list(_loading_problems(component, described, answer))
    words = _loading_words(described, answer, entries, component, found)
    found.components[component.name] = f"{_bits(entries):.2f} bits per weight as planned; {words}"


def _run_loading(component: Component, described: Mapping[str, Any], lift_gpu_check: bool) -> dict[str, Any]:
    profile = find_profile(component.class_name)
    probe = profile.probe(component.config) if profile else {}
    request = {
        "folder": str(component.folder), "library": component.library, "class": component.class_name,
        "needs_bitroute": described["container"] == "bitroute", "lift_gpu_check": lift_gpu_check,
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


def _loading_problems(
    component: Component, described: Mapping[str, Any], answer: Mapping[str, Any]
) -> Iterator[Problem]:
    where = str(component.folder)
    if "error" in answer:
        yield Problem(f"{component.class_name} does not load", where, got=answer["error"])
        return
    if answer["bitroute_imported"] and described["container"] != "bitroute":
        yield Problem("loading imported bitroute, which the plan said it would not need", where)
    for key, words in (
        ("missing_keys", "newly initialized"), ("unexpected_keys", "unknown to the model"),
        ("mismatched_keys", "of another shape"), ("meta_tensors", "left on the meta device"),
    ):  # fmt: skip
        if answer[key]:
            yield Problem(
                f"{len(answer[key])} tensors are {words} after loading", where, got=str(answer[key][:3])
            )


def _loading_words(
    described: Mapping[str, Any], answer: Mapping[str, Any], entries: list[Recorded],
    component: Component, found: Verification,
) -> str:  # fmt: skip
    """`loaded, forward ok` and its other outcomes; a forward that should have run and did not is a problem."""
    how = "with bitroute" if described["container"] == "bitroute" else "without bitroute"
    if "error" in answer:
        return f"does not load {how}"
    forward = answer["forward"]
    needs = sorted({entry.backend.gpu_to_compute() for entry in entries if entry.quantized} - {""})
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
