"""Another layout of the same weights, by an ordinary job in which every layer is kept: dtype, files, folder."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.decoded import DTYPES, as_floats
from bitroute.convert.describe import written_files
from bitroute.convert.document import SHOWN, printable
from bitroute.convert.job import run
from bitroute.convert.layout import StoredTensor
from bitroute.convert.plan import Plan, fetch, named, plan_pipeline
from bitroute.convert.recipe import RecipeFile
from bitroute.convert.schema import Dequantize
from bitroute.convert.shards import VARIANT
from bitroute.convert.streaming import Progress
from bitroute.errors import Problem, RecipeError

Format = Literal["folder", "single-file"]
RECIPE = "convert"  # what errors and the record call the recipe that is made here
ONE_FILE_BYTES = 10**14


def convert(
    source: str | Path, out: str | Path, *,
    dtype: Literal["source", "bfloat16", "float16", "float32"] = "source", format: Format = "folder",
    shard_bytes: int | None = None, config: str | None = None, variant: str | None = None,
    out_variant: str | None = None, overwrite: bool = False, resume: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Writes a pipeline with its weights in another dtype or in other files; returns its folder.

    source: a pipeline folder, a Hub id, or a single file with the pipeline that it belongs to as `config`.
    format: single-file puts each component in one file, which `from_single_file(FILE, config=OUT)` loads too.
    shard_bytes: at most in one file otherwise, 5 GB by default.
    variant: of the weights to read, such as fp16. out_variant: in the names of the files that are written.

    Raises:
        RecipeError, SourceError: refused before anything was written.
        JobError: the job could not finish; what it left carries no name that a loader looks for.
    """
    read_as = False if dtype == "source" else dtype
    planned = fetch(plan_conversion(str(source), read_as, format, shard_bytes, config, variant, out_variant))
    folder = Path(out).expanduser()
    run(planned, folder, overwrite=overwrite, resume=resume, progress=progress)
    return folder


def plan_conversion(
    source: str, dtype: Dequantize, format: Format, shard_bytes: int | None = None, config: str | None = None,
    variant: str | None = None, out_variant: str | None = None,
) -> Plan:  # fmt: skip
    """The plan that keeps every layer of every component; raises as `convert` does."""
    if format == "single-file" and shard_bytes:
        raise RecipeError(Problem("a single file is not split", got="a shard size", next_step="leave one of them out"))
    if out_variant is not None and not VARIANT.fullmatch(out_variant):
        raise RecipeError(_no_word(out_variant))
    opened = open_pipeline(source, variant=variant, access="outline", dequantize=dtype, config=config)
    names = list(opened.components)
    views = {name: (partial(_cast, dtype),) for name in names} if dtype else {}
    limit = ONE_FILE_BYTES if format == "single-file" else shard_bytes
    planned = named(plan_pipeline(_recipe(names, dtype, limit), replace(opened, views=views)), out_variant)
    if out_variant is not None and not opened.bare:
        _check_names(planned)
    return planned


def _check_names(planned: Plan) -> None:
    """diffusers 0.42 looks for a variant behind the first dot of every name in a part, and fails where there is none.

    Source: _identify_model_variants in pipelines/pipeline_loading_utils.py.
    """
    inside = [name for name in written_files(planned) if "/" in name]
    dotless = [name for name in inside if "." not in name.split("/")[1]]
    if dotless:
        what = "diffusers loads no variant beside a name without a dot"
        mend = "rename or remove that in the source, or leave --out-variant out"
        raise RecipeError(Problem(what, planned.pipeline.name, ", ".join(dotless[:5]), next_step=mend))


def _no_word(variant: str) -> Problem:
    expected = "a word such as fp16 or ema: a letter, then letters, digits and _"
    return Problem("not a variant that file names can carry", "--out-variant", printable(variant[:SHOWN]), expected)


def _cast(dtype: Dequantize, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What is not quantized too."""
    return as_floats(stored, DTYPES[dtype])


def _recipe(names: list[str], dtype: Dequantize, shard_bytes: int | None) -> RecipeFile:
    said: dict[str, Any] = {"dequantize": dtype, "shard_size": shard_bytes}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in said.items() if value]
    kept = [f"  {json.dumps(name)}: {{backend: keep, keep: none}}\n" for name in names]
    return RecipeFile.made(RECIPE, f"{''.join(lines)}components:\n{''.join(kept)}")
