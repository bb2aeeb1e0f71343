"""Runs a plan: one block of rows of one layer in memory, each file complete before it has its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.checkpoint import read_blocks, read_json
from bitroute.convert.describe import index_names, provenance, summary
from bitroute.convert.entry import Entry
from bitroute.convert.layout import total_bytes
from bitroute.convert.plan import ComponentPlan, Plan, check_room, plan
from bitroute.convert.workers import run_all
from bitroute.convert.writer import ShardWriter
from bitroute.errors import JobError, Problem, RecipeError, SourceError

UNFINISHED = "bitroute.json.part"  # gets its final name when everything else has
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
    folder = Path(out) if out is not None else Path(Path(planned.recipe.name).stem)
    run(planned, folder, device=device, overwrite=overwrite, progress=progress)
    return folder


def run(
    plan: Plan, out: Path, *, device: str = "cpu", overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Writes the checkpoint; raises as `quantize` does."""
    report = progress or (lambda done, what: None)
    check_device(device)
    claim(plan, out, overwrite)
    try:
        _write_text(out / UNFINISHED, json.dumps(provenance(plan), indent=1))
        for component in plan.components:
            _write_component(plan, component, out / component.name, torch.device(device), report)
        for name in plan.copied:
            _copy(plan.pipeline.folder / name, out / name)
        _copy(plan.pipeline.folder / "model_index.json", out / "model_index.json")
        os.replace(out / UNFINISHED, out / "bitroute.json")
    except OSError as error:
        raise JobError(
            Problem(
                "the job cannot write its output", str(error.filename2 or error.filename or out),
                got=error.strerror or str(error), next_step="mend that, then run the same command with --overwrite",
            )
        ) from error  # fmt: skip


def check_device(device: str) -> None:
    """Raises RecipeError where torch does not know or have the device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            Problem(f"no device {device!r}", "--device", got=str(error).partition("\n")[0],
                    expected="cpu, cuda, cuda:0, mps, …")
        ) from error  # fmt: skip


def claim(plan: Plan, out: Path, overwrite: bool) -> None:
    """Makes the output folder ours: new, empty, or an earlier output whose files `overwrite` may remove.

    Raises:
        RecipeError: it holds other files, is a file, or is the source itself, or its disk is too full. Then
            nothing was removed.
    """
    source = plan.pipeline.folder.resolve()
    if out.resolve() == source or source in out.resolve().parents:
        raise RecipeError(
            Problem("the output folder lies in the source model", str(out), next_step="give another --out")
        )
    if out.exists() and not out.is_dir():
        raise RecipeError(Problem("the output is a file", str(out), next_step="give a folder as --out"))
    marks = [mark for mark in (out / "bitroute.json", out / UNFINISHED) if mark.is_file()]
    if out.is_dir() and any(out.iterdir()) and not (overwrite and marks):
        raise RecipeError(_occupied(out, bool(marks)))
    earlier = {file for mark in marks for file in _files_of(mark)}
    check_room(plan, out, sum(file.stat().st_size for file in earlier))
    try:
        _remove(out, earlier)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            Problem("the output folder cannot be written", str(error.filename or out), got=error.strerror or "")
        ) from error


def _occupied(out: Path, ours: bool) -> Problem:
    return Problem(
        "the output folder is not empty", str(out), got="an earlier output of bitroute" if ours else "other files",
        next_step="give --overwrite to replace it" if ours else "give another --out",
    )  # fmt: skip


def _files_of(mark: Path) -> set[Path]:
    """The files that an earlier job listed as its own and that are there, finished or not; none outside."""
    try:
        names = read_json(mark).get("files", [])
    except SourceError:
        if mark.name != UNFINISHED:
            raise
        names = []  # that job ended while it wrote its first file, this one
    found = {mark}
    for name in map(str, names):
        for file in (mark.parent / name, mark.parent / f"{name}.part"):
            if mark.parent.resolve() in file.resolve().parents and file.is_file():
                found.add(file)
    return found


def _remove(out: Path, files: Iterable[Path]) -> None:
    """The files, and the folders that this empties."""
    for file in files:
        file.unlink()
    for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


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
        _write_json(folder / name, _index(component))
    config = dict(component.component.config)
    quantization = component.container.config(component.entries)
    if quantization:
        config["quantization_config"] = {**quantization, "bitroute": summary(plan, component)}
    _write_json(folder / "config.json", config)


def _write_entry(
    writer: ShardWriter, entry: Entry, names: dict[str, str], device: torch.device, report: Progress
) -> None:
    survey = entry.backend.survey(_blocks(entry, device), entry.weight)
    for suffix, tensor in survey.outputs.items():
        writer.append(names[suffix], tensor)
    for rows in _blocks(entry, device):
        for suffix, part in entry.backend.encode(rows, survey).items():
            writer.append(names[suffix], part)
        report(rows.nbytes, entry.layer or entry.name)


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
        yield rows.to(device)


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


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    shutil.copyfile(source, partial)
    with open(partial, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, target)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    _write_text(file.with_name(file.name + ".part"), json.dumps(content, indent=1, ensure_ascii=False))
    os.replace(file.with_name(file.name + ".part"), file)


def _write_text(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
