"""The model of a recipe, opened as the recipe and the command say; that of a checkpoint, as its record says."""

from __future__ import annotations

import os
from pathlib import Path

from bitroute.convert.checkpoint import Pipeline, open_pipeline
from bitroute.convert.document import sorted_problems
from bitroute.convert.lora import LoraFile, with_loras
from bitroute.convert.reading import read_json
from bitroute.convert.recipe import RecipeFile
from bitroute.convert.record import Record
from bitroute.convert.schema import Dequantize, Recipe
from bitroute.errors import Problem, RecipeError, SourceError


def open_model(
    file: RecipeFile, recipe: Recipe, model: str | None, allow_pickle: bool, dequantize: Dequantize,
    config: str | None, variant: str | None = None,
) -> Pipeline:  # fmt: skip
    """The pipeline that `model`, or else the recipe, names, with the recipe's LoRAs; an outline where it is on the Hub.

    Raises:
        RecipeError: there is none; the recipe's own problems are reported with that.
    """
    chosen = recipe.model if model is None else model
    if chosen is None:
        missing = Problem("no model", file.name, next_step="give --model DIR, or `model:` in the recipe")
        raise RecipeError([*file.problems, missing])
    own = chosen == recipe.model  # another model has other revisions
    try:
        revision, variant = (recipe.revision, variant or recipe.variant) if own else (None, variant)
        read_as = dequantize or recipe.dequantize
        beside = config or (recipe.config if own or os.path.isfile(chosen) else None)
        pipeline = open_pipeline(
            chosen, revision, variant, access="outline", allow_pickle=allow_pickle, dequantize=read_as, config=beside
        )
        return _fused(pipeline, recipe, file)
    except SourceError as error:
        raise RecipeError(sorted_problems([*file.problems, *error.problems])) from error


def open_recorded(record: Record, model: str | None = None, *, allow_pickle: bool = False) -> Pipeline:
    """The source of a checkpoint, or `model` in its place, read as the job read it; never from the network.

    Raises:
        SourceError: it is not here, nor in the cache of the Hub.
    """
    chosen = model or record.model
    revision, variant = (record.revision, record.variant) if chosen == record.model else (None, None)
    opened = open_pipeline(
        chosen, revision, variant, access="cache", allow_pickle=allow_pickle, dequantize=record.dequantize,
        config=record.config if os.path.isfile(chosen) else None,
    )  # fmt: skip
    if not record.loras or fused_in(opened.folder) == [lora.sha256 for lora in record.loras]:
        return opened  # or they were fused into this source before
    return with_loras(opened, record.loras)


def fused_in(folder: Path) -> list[str]:
    """The hashes of the LoRAs that a checkpoint of bitroute has in its weights; none of another folder."""
    if not (folder / "bitroute.json").is_file():
        return []
    source = read_json(folder / "bitroute.json").get("source")
    loras = source.get("loras") if isinstance(source, dict) else None
    return [str(lora.get("sha256")) for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else []


def _fused(pipeline: Pipeline, recipe: Recipe, file: RecipeFile) -> Pipeline:
    """The pipeline with the LoRAs of its recipe."""
    return with_loras(pipeline, [
        LoraFile(_beside(file, index) / Path(lora.path).expanduser(), lora.path, lora.scale, lora.into)
        for index, lora in enumerate(recipe.fuse_loras)
    ])  # fmt: skip


def _beside(file: RecipeFile, index: int) -> Path:
    """The folder of the recipe that names this LoRA."""
    return Path(file.document.nearest(("fuse_loras", index)).file).parent
