"""Back to floats: a quantized pipeline, by an ordinary job in which every layer is kept; or a single file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from bitroute.backends import create
from bitroute.convert.checkpoint import Pipeline, folder_name, open_pipeline
from bitroute.convert.decoded import is_quantized, undecodable
from bitroute.convert.files import make_folder
from bitroute.convert.foreign import read_file
from bitroute.convert.job import run
from bitroute.convert.layout import DerivedTensor, StoredTensor, total_bytes
from bitroute.convert.plan import Plan, plan_pipeline
from bitroute.convert.reading import read_blocks
from bitroute.convert.recipe import RecipeFile
from bitroute.convert.schema import Dequantize
from bitroute.convert.streaming import Progress
from bitroute.convert.workers import check_stop, run_all
from bitroute.convert.writer import ShardWriter
from bitroute.errors import BackendError, JobError, Problem, RecipeError, SourceError

RECIPE = "dequantize"  # what errors and the record call the recipe that is made here


def dequantize(
    model: str | Path, out: str | Path | None = None, *,
    dtype: Dequantize = True, overwrite: bool = False, resume: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Writes a quantized pipeline as one that loads without any quantization library; returns what it wrote.

    model: a pipeline folder or a Hub id, or one file (*.safetensors, *.gguf), which becomes a *.safetensors of the same
    names. out: by default the model's name and `-dequantized`. resume: of folders only, files are begun anew.
    dtype: True decodes the quantized weights to bf16 and leaves the rest; bfloat16, float16 or float32 is that of all
    floats in the components that are quantized.

    Raises:
        RecipeError, SourceError: refused before anything was written; also where nothing is quantized.
        JobError: the job could not finish; what it left carries no name that a loader looks for.
    """
    if is_file(model):
        target = Path(out).expanduser() if out is not None else default_file(model)
        return write_file(plan_file(model, dtype), target, overwrite=overwrite, progress=progress)
    planned = plan_dequantized(str(model), dtype)
    folder = Path(out).expanduser() if out is not None else default_folder(planned.pipeline)
    run(planned, folder, overwrite=overwrite, resume=resume, progress=progress)
    return folder


def plan_dequantized(model: str, dtype: Dequantize = True) -> Plan:
    """The plan that keeps every layer of the components that are quantized, decoded; raises as `dequantize` does."""
    pipeline = open_pipeline(model, dequantize=dtype)
    names = [name for name, component in pipeline.components.items() if is_quantized(component)]
    if not names:
        raise SourceError(
            Problem(
                "nothing is quantized in this model", model, got=", ".join(pipeline.components) or "no components",
                expected="a component with a quantization_config, or with weights of one byte",
            )
        )  # fmt: skip
    return plan_pipeline(_recipe(names, dtype), pipeline)


def is_file(model: str | Path) -> bool:
    """False also for what cannot be a path, which `open_pipeline` explains."""
    try:
        return Path(model).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def default_folder(pipeline: Pipeline) -> Path:
    return Path(f"{folder_name(pipeline.folder.resolve())}-dequantized")


def default_file(model: str | Path) -> Path:
    return Path(f"{Path(model).stem}-dequantized.safetensors")


def plan_file(model: str | Path, dtype: Dequantize = True) -> dict[str, StoredTensor]:
    """The tensors that a file will hold; raises SourceError where none of them has to be decoded."""
    file = Path(model).expanduser()
    found = read_file(file, dtype)
    if not any(isinstance(tensor, DerivedTensor) for tensor in found.values()):
        expected = "weights in FP8, INT8, 4 bits or the blocks of a GGUF file"
        raise SourceError(Problem("nothing is quantized in this file", str(file), expected=expected))
    return found


def write_file(
    tensors: Mapping[str, StoredTensor], out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Writes them to one safetensors file, as many at a time as there are cores.

    Raises:
        RecipeError: `out` is no place for it. SourceError: a source is damaged. JobError: it could not be written.
    """
    report = progress or (lambda done, what: None)
    try:
        _check_place(tensors, out, overwrite)
        make_folder(out.absolute().parent)
        specs = {name: tensor.spec for name, tensor in tensors.items()}
        with ShardWriter(out, specs, {"format": "pt"}) as writer:
            run_all(partial(_write, writer, tensor, name, report) for name, tensor in tensors.items())
    except OSError as error:
        got = error.strerror or str(error)
        raise JobError(Problem("the file cannot be written", str(error.filename or out), got=got)) from error
    except BackendError as error:
        raise JobError(error.problems) from error
    finally:
        with suppress(OSError):
            out.with_name(f"{out.name}.part").unlink()
    return out


def _write(writer: ShardWriter, tensor: StoredTensor, name: str, report: Progress) -> None:
    for rows in read_blocks(tensor, create("keep").block_bounds(tensor.spec.rows)):
        check_stop()
        if isinstance(tensor, DerivedTensor) and not rows.isfinite().all():
            raise SourceError(undecodable(tensor, name, "NaN or infinite values", "finite weights"))
        writer.append(name, rows)
        report(rows.numel() * rows.dtype.itemsize, name)


def _check_place(tensors: Mapping[str, StoredTensor], out: Path, overwrite: bool) -> None:
    place = out.resolve()
    sources = {part.file.resolve() for tensor in tensors.values() for part in (tensor, *getattr(tensor, "parts", ()))}
    above = next(folder for folder in place.parents if folder.is_dir())
    free, needed = shutil.disk_usage(above).free, total_bytes(tensor.spec for tensor in tensors.values())
    refusals = {
        ("the output is the source", "give another --out"): place in sources,
        ("the output is not named as what it will be", "give --out NAME.safetensors"): out.suffix != ".safetensors",
        ("the output is a folder", "give a file as --out"): out.is_dir(),
        ("the output exists already", "give another --out, or --overwrite"): out.is_file() and not overwrite,
        (f"the disk is too full: {needed} bytes to write, {free} free", "free some room"): free < needed,
    }
    problems = [Problem(what, str(out), next_step=mend) for (what, mend), holds in refusals.items() if holds]
    if problems:
        raise RecipeError(problems)


def _recipe(names: list[str], dtype: Dequantize) -> RecipeFile:
    lines = [f"  {json.dumps(name)}: {{backend: keep}}\n" for name in names]
    return RecipeFile.made(RECIPE, f"dequantize: {json.dumps(dtype)}\ncomponents:\n{''.join(lines)}")
