"""Writes small random pipelines of model families."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from families import Facts, make

TOKENIZERS = Path(str(files("bitroute.recipes"))) / "tiny-flux"


def write_pipeline(folder: Path, facts: Facts) -> Path:
    """Writes the components that `facts` describes, in bfloat16, as diffusers saves a pipeline."""
    torch.manual_seed(0)
    index: dict[str, Any] = {"_class_name": facts["class"], "_diffusers_version": diffusers.__version__}
    for name, wanted in facts["components"].items():
        index[name] = _write_component(folder / name, wanted)
    (folder / "model_index.json").write_text(json.dumps(index | facts.get("settings", {})))
    return folder


def _write_component(folder: Path, wanted: list[Any] | str | None) -> list[str | None]:
    if wanted is None:
        return [None, None]
    name, config = (wanted, None) if isinstance(wanted, str) else wanted
    if (TOKENIZERS / name).is_dir():
        return _write_tokenizer(folder, name, config)
    library, made = _made(name, config)
    (made.to(torch.bfloat16) if isinstance(made, torch.nn.Module) else made).save_pretrained(folder)
    return [library, type(made).__name__]


def _write_tokenizer(folder: Path, name: str, chat: str | None) -> list[str | None]:
    shutil.copytree(TOKENIZERS / name, folder)
    if chat:
        (folder / "chat_template.jinja").write_text(chat)
    return ["transformers", "PreTrainedTokenizerFast"]


def _made(name: str, config: Facts) -> tuple[str, Any]:
    """The library as model_index.json names it, and the object. `ltx2.LTX2Vocoder` is a class of a pipeline's own."""
    library, dot, class_name = name.rpartition(".")
    if dot:
        return library, getattr(import_module(f"diffusers.pipelines.{library}"), class_name).from_config(config)
    if name.endswith("Tokenizer"):
        return "transformers", getattr(transformers, name)(**config)
    return "diffusers" if hasattr(diffusers, name) else "transformers", make(name, config)
