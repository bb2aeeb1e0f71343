"""Runs a plan: one block of rows of one layer in memory, each file complete before it has its name."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitroute.convert.architecture import without_choices
from bitroute.convert.bare import CONFIG, INDEX
from bitroute.convert.describe import index_names, summary
from bitroute.convert.entry import Entry
from bitroute.convert.files import FULL, copy, make_folder, sha256, write_json
from bitroute.convert.journal import DONE, Journal, journal_of
from bitroute.convert.layout import total_bytes
from bitroute.convert.output import begin, claimed
from bitroute.convert.plan import ComponentPlan, Plan, fetch, plan
from bitroute.convert.schema import Dequantize
from bitroute.convert.streaming import Progress, Shard, write_shards
from bitroute.convert.workers import run_all
from bitroute.convert.writer import ShardWriter, is_written
from bitroute.errors import JobError, Problem, RecipeError, SourceError


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
    hashes = write_shards(list(_left(plan, out, done)), device, report)
    for component in plan.components:
        for name in index_names(component):
            write_json(out / component.component.place / name, _index(component))
    for name, size_bytes in plan.copied.items():
        _copy(plan, name, size_bytes, out)
    for component, config in zip(plan.components, configs, strict=True):  # last: with it a component looks whole
        write_json(out / component.component.place / CONFIG, config)
    if not plan.pipeline.bare:
        copy(plan.pipeline.folder / INDEX, out / INDEX)
    changed = journal.changes(journal_of(plan, str(device)))
    if changed:
        raise JobError(changed)
    others = [name for name in journal.files if name != DONE and out / name not in hashes]
    found = {out / name: digest for name, digest in _hashes(out, others).items()} | hashes
    journal.finish(out, {name: found[out / name] for name in journal.files if name != DONE})


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
        file: total_bytes(entry.source.spec for entry in shard)
        for component in plan.components
        for file, shard in _shards(component, out / component.component.place)
        if is_written(file, component.specs(shard), component.container.metadata(shard, component.entries))
    }


def _left(plan: Plan, out: Path, done: Container[Path]) -> Iterator[Shard]:
    """What is to be written; whatever has the name of a shard goes, as its room is needed."""
    for component in plan.components:
        folder, container = out / component.component.place, component.container
        make_folder(folder)
        for file, entries in _shards(component, folder):
            if file not in done:
                file.unlink(missing_ok=True)
                names = [container.names(entry) for entry in entries]
                yield Shard(file, entries, names, partial(_writer, component, file, entries))


def _writer(component: ComponentPlan, file: Path, entries: Sequence[Entry]) -> ShardWriter:
    metadata = component.container.metadata(entries, component.entries)
    return ShardWriter(file, component.specs(entries), metadata)


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


def _config(plan: Plan, component: ComponentPlan) -> dict[str, Any]:
    config: dict[str, Any] = without_choices(component.component.config)
    quantization = component.container.config(component.entries)
    if quantization:
        config["quantization_config"] = {**quantization, "bitroute": summary(plan, component)}
    return config


def _index(component: ComponentPlan) -> dict[str, Any]:
    weight_map = {
        stored: name
        for name, shard in zip(component.shard_names, component.shards, strict=True)
        for stored in component.specs(shard)
    }
    total = total_bytes(component.specs(component.entries).values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
