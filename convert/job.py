"""Runs a plan: one block of rows of one layer in memory, each file complete before it has its name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.architecture import without_choices
from bitroute.convert.bare import CONFIG, INDEX
from bitroute.convert.describe import index_names, summary
from bitroute.convert.entry import Entry
from bitroute.convert.files import copy, make_folder, sha256, write_json
from bitroute.convert.journal import DONE, Journal, journal_of
from bitroute.convert.layout import total_bytes
from bitroute.convert.output import begin, claimed
from bitroute.convert.plan import ComponentPlan, Plan, fetch, plan
from bitroute.convert.reading import read_blocks
from bitroute.convert.schema import Dequantize
from bitroute.convert.statistics import read_statistics
from bitroute.convert.workers import check_stop, run_all
from bitroute.convert.writer import ShardWriter, is_written
from bitroute.errors import BackendError, JobError, Problem, RecipeError, SourceError

Progress = Callable[[int, str], None]  # source bytes done since the last call, what was worked on; from any thread


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def quantize(
    recipe: str, model: str | None = None, out: str | Path | None = None, *,
    device: str = "cpu", overwrite: bool = False, resume: bool = False, allow_pickle: bool = False,
    dequantize: Dequantize = False, config: str | None = None, variant: str | None = None,
    statistics: str | Path | None = None, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Plans and runs a recipe; returns the checkpoint folder. Verification is `bitroute.verify`.

    recipe: a file or a built-in name. model: a pipeline folder, a Hub id or builtin:NAME, else the recipe's own.
    out: the folder to write, by default one named after the recipe. device: where the arithmetic runs.
    overwrite: replace an earlier output. resume: finish an interrupted one, or start where there is none.
    allow_pickle: also read weights from *.bin, tensors alone. dequantize: read quantized components as floats.
    config: the pipeline that a single file, given as the model, belongs to. variant: of the weights to read: fp16.
    statistics: what calibration measured of this model, instead of the recipe's file.

    Raises:
        RecipeError, SourceError: refused before anything was written.
        JobError: the job could not finish; what it left carries no name that a loader looks for.
    """
    chosen = plan(
        recipe, model, allow_pickle=allow_pickle, dequantize=dequantize, config=config, variant=variant,
        statistics=statistics,
    )  # fmt: skip
    planned = fetch(chosen)
    folder = Path(out).expanduser() if out is not None else Path(Path(planned.recipe.name).stem)
    run(planned, folder, device=device, overwrite=overwrite, resume=resume, progress=progress)
    return folder


def run(
    plan: Plan, out: Path, *,
    device: str = "cpu", overwrite: bool = False, resume: bool = False, progress: Progress | None = None,
) -> bool:  # fmt: skip
    """Writes the checkpoint, False where one to resume was finished already; raises as `quantize` does."""
    check_device(device)
    journal = journal_of(plan, device)
    with claimed(plan, out, journal, overwrite, resume):
        try:
            found = begin(out, journal, resume)
            if found:
                _write(plan, out, found, torch.device(device), progress or (lambda done, what: None))
        except OSError as error:
            raise JobError(no_access(error, out)) from error
    return found is not None


def _write(plan: Plan, out: Path, journal: Journal, device: torch.device, report: Progress) -> None:
    """Whole shards and copies that are there already stay as they are."""
    configs = [_config(plan, component) for component in plan.components]
    done = _written_shards(plan, out)
    if done:
        report(sum(done.values()), "done before")
    for component in plan.components:
        _write_component(component, out / component.component.place, done, device, report)
    for name, size_bytes in plan.copied.items():
        _copy(plan, name, size_bytes, out)
    for component, config in zip(plan.components, configs, strict=True):  # last: with it a component looks whole
        write_json(out / component.component.place / CONFIG, config)
    if not plan.pipeline.bare:
        copy(plan.pipeline.folder / INDEX, out / INDEX)
    journal.finish(out, _hashes(out, [name for name in journal.files if name != DONE]))


def no_access(error: OSError, out: Path) -> Problem:
    """Of a file that a job, or a calibration, reads or writes."""
    full = error.errno in FULL
    mend = "make room (or allow larger files)" if full else "mend that"
    return Problem(
        "there is no room for a file" if full else "the job cannot read or write a file",
        str(error.filename2 or error.filename or out), got=error.strerror or str(error),
        next_step=f"{mend}, then run the same command with --resume: it goes on with what is done",
    )  # fmt: skip


def _written_shards(plan: Plan, out: Path) -> dict[Path, int]:
    """The shards that have their names and their planned form, and the bytes of their sources."""
    return {
        file: sum(entry.source.spec.size_bytes for entry in shard)
        for component in plan.components
        for file, shard in _shards(component, out / component.component.place)
        if is_written(file, component.specs(shard), component.container.metadata(shard, component.entries))
    }


def _shards(component: ComponentPlan, folder: Path) -> Iterator[tuple[Path, list[Entry]]]:
    for name, shard in zip(component.shard_names, component.shards, strict=True):
        yield folder / name, shard


def _copy(plan: Plan, name: str, size_bytes: int, out: Path) -> None:
    source, target = plan.pipeline.folder / name, out / name
    if target.is_file() and not target.is_symlink() and target.stat().st_size == size_bytes:
        return
    if not os.access(source, os.R_OK):
        raise SourceError(Problem("cannot read a file that is to be copied", str(source)))
    copy(source, target)


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
    component: ComponentPlan, folder: Path, done: Container[Path], device: torch.device, report: Progress
) -> None:
    make_folder(folder)
    for file, shard in _shards(component, folder):
        if file in done:
            continue
        file.unlink(missing_ok=True)  # its room is needed for the whole one
        metadata = component.container.metadata(shard, component.entries)
        with ShardWriter(file, component.specs(shard), metadata) as writer:
            names = component.container.names
            run_all(partial(_write_entry, writer, entry, names(entry), device, report) for entry in shard)
    for name in index_names(component):
        write_json(folder / name, _index(component))


def _config(plan: Plan, component: ComponentPlan) -> dict[str, Any]:
    config: dict[str, Any] = without_choices(component.component.config)
    quantization = component.container.config(component.entries)
    if quantization:
        config["quantization_config"] = {**quantization, "bitroute": summary(plan, component)}
    return config


def _write_entry(
    writer: ShardWriter, entry: Entry, names: dict[str, str], device: torch.device, report: Progress
) -> None:
    """Raises JobError where the backend cannot hold the values."""
    try:
        statistics = read_statistics(entry.statistics)
        survey = entry.backend.survey(_blocks(entry, device), entry.weight, statistics)
        for suffix, tensor in survey.outputs.items():
            writer.append(names[suffix], tensor)
        bounds = entry.backend.block_bounds(entry.source.spec.rows)
        for (start, stop), rows in zip(bounds, _blocks(entry, device), strict=True):
            for suffix, part in entry.backend.encode(rows, survey.of_rows(start, stop), statistics).items():
                writer.append(names[suffix], part)
            report(rows.numel() * entry.source.spec.dtype.itemsize, entry.layer or entry.name)
    except BackendError as error:
        raise JobError([replace(problem, where=entry.name) for problem in error.problems]) from error


def _blocks(entry: Entry, device: torch.device) -> Iterator[Tensor]:
    """Raises JobError at the first block of a weight to quantize that holds NaN or infinity."""
    for rows in read_blocks(entry.source, entry.backend.block_bounds(entry.source.spec.rows)):
        check_stop()
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
