"""Runs a plan: one block of rows of one layer in memory, each file complete before it has its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.describe import index_names, provenance, summary
from bitroute.convert.entry import Entry
from bitroute.convert.files import copy, sha256, write_json, write_text
from bitroute.convert.layout import total_bytes
from bitroute.convert.output import DONE, UNFINISHED, claimed
from bitroute.convert.plan import ComponentPlan, Plan, plan
from bitroute.convert.reading import read_blocks
from bitroute.convert.workers import run_all
from bitroute.convert.writer import ShardWriter
from bitroute.errors import BackendError, JobError, Problem, RecipeError, SourceError

Progress = Callable[[int, str], None]  # source bytes done since the last call, what was worked on; from any thread


def quantize(
    recipe: str, model: str | None = None, out: str | Path | None = None, *,
    device: str = "cpu", overwrite: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Plans and runs a recipe; returns the checkpoint folder. Verification is `bitroute.verify`.

    recipe: a file or a built-in name. model: a pipeline folder or builtin:NAME, else the recipe's own.
    out: the folder to write, by default one named after the recipe. device: where the arithmetic runs.

    Raises:
        RecipeError, SourceError: refused before anything was written.
        JobError: the job could not finish; what it left carries no name that a loader looks for.
    """
    planned = plan(recipe, model)
    folder = Path(out).expanduser() if out is not None else Path(Path(planned.recipe.name).stem)
    run(planned, folder, device=device, overwrite=overwrite, progress=progress)
    return folder


def run(
    plan: Plan, out: Path, *, device: str = "cpu", overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Writes the checkpoint; raises as `quantize` does."""
    report = progress or (lambda done, what: None)
    check_device(device)
    record = provenance(plan)
    with claimed(plan, out, record["files"], overwrite):
        try:
            write_text(out / UNFINISHED, json.dumps(record, indent=1))
            for component in plan.components:
                _write_component(plan, component, out / component.name, torch.device(device), report)
            for name in plan.copied:
                _copy(plan, name, out)
            copy(plan.pipeline.folder / "model_index.json", out / "model_index.json")
            hashes = _hashes(out, [name for name in record["files"] if name != DONE])
            write_json(out / DONE, {**record, "sha256": hashes})
        except OSError as error:
            raise JobError(
                Problem(
                    "the job cannot write its output", str(error.filename2 or error.filename or out),
                    got=error.strerror or str(error),
                    next_step="mend that, then run the same command with --overwrite",
                )
            ) from error  # fmt: skip


def _copy(plan: Plan, name: str, out: Path) -> None:
    source = plan.pipeline.folder / name
    if not os.access(source, os.R_OK):
        raise SourceError(Problem("cannot read a file that is to be copied", str(source)))
    copy(source, out / name)


def _hashes(out: Path, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}

    def hash_one(name: str) -> None:
        found[name] = sha256(out / name)

    run_all(partial(hash_one, name) for name in names)
    return {name: found[name] for name in names}


def check_device(device: str) -> None:
    """Raises RecipeError where torch does not know or have the device."""
    try:
        torch.empty(1, device=device)
        usable = device != "meta"
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        usable = False
    if not usable:
        raise RecipeError(
            Problem(f"no device {device!r} here", "--device", expected="cpu, cuda, cuda:0, mps, …",
                    next_step="`quantize doctor` shows this machine's devices")
        )  # fmt: skip


def _write_component(
    plan: Plan, component: ComponentPlan, folder: Path, device: torch.device, report: Progress
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(component.shard_names, component.shards, strict=True):
        metadata = component.container.metadata(shard, component.entries)
        with ShardWriter(folder / name, component.specs(shard), metadata) as writer:
            names = component.container.names
            run_all(partial(_write_entry, writer, entry, names(entry), device, report) for entry in shard)
    for name in index_names(component):
        write_json(folder / name, _index(component))
    config = dict(component.component.config)
    quantization = component.container.config(component.entries)
    if quantization:
        config["quantization_config"] = {**quantization, "bitroute": summary(plan, component)}
    write_json(folder / "config.json", config)


def _write_entry(
    writer: ShardWriter, entry: Entry, names: dict[str, str], device: torch.device, report: Progress
) -> None:
    """Raises JobError where the backend cannot hold the values."""
    try:
        survey = entry.backend.survey(_blocks(entry, device), entry.weight)
        for suffix, tensor in survey.outputs.items():
            writer.append(names[suffix], tensor)
        for rows in _blocks(entry, device):
            for suffix, part in entry.backend.encode(rows, survey).items():
                writer.append(names[suffix], part)
            report(rows.numel() * entry.source.spec.dtype.itemsize, entry.layer or entry.name)
    except BackendError as error:
        raise JobError([replace(problem, where=entry.name) for problem in error.problems]) from error


def _blocks(entry: Entry, device: torch.device) -> Iterator[Tensor]:
    """Raises JobError at the first block of a weight to quantize that holds NaN or infinity."""
    for rows in read_blocks(entry.source, entry.backend.block_bounds(entry.source.spec.rows)):
        if entry.quantized and not _finite(rows):
            bad = int((~rows.isfinite()).sum())
            raise JobError(
                Problem(
                    f"the weight of layer {entry.layer!r} is not finite", str(entry.source.file),
                    got=f"{bad} NaN or infinite values in one block of rows",
                    next_step="the source is damaged: download it again, or keep this layer to copy it as it is",
                )
            )  # fmt: skip
        yield entry.backend.arithmetic(rows).to(device)


def _finite(rows: Tensor) -> bool:
    """A sum is one pass without temporaries; only a sum that overflows needs the slow look."""
    return bool(rows.sum(dtype=torch.float32).isfinite()) or bool(rows.isfinite().all())


def _index(component: ComponentPlan) -> dict[str, Any]:
    weight_map = {
        stored: name
        for name, shard in zip(component.shard_names, component.shards, strict=True)
        for stored in component.specs(shard)
    }
    total = total_bytes(component.specs(component.entries).values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
