"""What the tests of model families share: a class from its config, its layers, its profile."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from torch import nn

from bitroute.convert.profile import EVERY_KIND, Profile, find_profile

Facts = dict[str, Any]


def make(class_name: str, config: Facts) -> Any:
    if hasattr(diffusers, class_name):
        return getattr(diffusers, class_name).from_config(config)
    model_class: Any = getattr(transformers, class_name)
    return model_class(model_class.config_class.from_dict(config))


def on_meta(class_name: str, config: Facts) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = make(class_name, config)
    return model


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if getattr(part, "weight", None) is not None}


def linear(model: nn.Module) -> dict[str, int]:
    """Name → weights of the linear layers."""
    found = {name: part for name, part in weighted(model).items() if isinstance(part, nn.Linear)}
    return {name: part.weight.numel() for name, part in found.items()}


def profile_of(class_name: str) -> Profile:
    found = find_profile(class_name)
    assert found and found.class_name == class_name
    return found


def kept_always(profile: Profile, names: Iterable[str]) -> set[str]:
    """The layers that stay as they are in every kind of quantization."""
    return {name for name, kinds in profile.kept(names).items() if kinds == EVERY_KIND}


def write_index(folder: Path, classes: dict[str, str]) -> None:
    library = {name: "diffusers" if hasattr(diffusers, name) else "transformers" for name in classes.values()}
    entries = {component: [library[name], name] for component, name in classes.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **entries}))


def recipe(tmp_path: Path, model: Path, **backends: str) -> str:
    components = {name: {"backend": backend, "keep": "profile"} for name, backend in backends.items()}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": str(model), "components": components}))
    return str(file)
