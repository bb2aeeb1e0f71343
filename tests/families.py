"""What the tests of model families share: a class from its config, its layers, its profile."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from torch import nn

from bitroute.convert.profile import EVERY_KIND, ProbeInput, Profile, find_profile

Facts = dict[str, Any]
Models = dict[str, dict[str, Facts]]  # class → published model → its config, its size and who says so
DATA = Path(__file__).parent / "convert"


def read(name: str) -> dict[str, Any]:
    """A file of facts about families."""
    content: dict[str, Any] = yaml.safe_load((DATA / name).read_text(encoding="utf-8"))
    return content


@cache
def published() -> Models:
    """The models of all families."""
    merged: Models = {}
    for file in sorted(set(DATA.glob("families_*.yaml")) - set(DATA.glob("*_cases.yaml"))):
        for class_name, models in read(file.name).items():
            merged.setdefault(class_name, {}).update(models)
    return merged


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


def share(model: nn.Module, names: Iterable[str]) -> float:
    """Of all parameters, those in the weights of these linear layers."""
    sizes = linear(model)
    return sum(sizes[name] for name in set(names) & set(sizes)) / sum(part.numel() for part in model.parameters())


def profile_of(class_name: str) -> Profile:
    found = find_profile(class_name)
    assert found and found.class_name == class_name
    return found


def kept_always(profile: Profile, names: Iterable[str]) -> set[str]:
    """The layers that stay as they are in every kind of quantization."""
    return {name for name, kinds in profile.kept(names).items() if kinds == EVERY_KIND}


def tensor(wanted: ProbeInput) -> Any:
    """One input of a probe, in float32."""
    if wanted.value is not None:
        return wanted.value
    if wanted.dtype == "long" and wanted.fill == "random":
        return torch.randint(0, wanted.below or 1, wanted.shape)
    make_filled = {"random": torch.randn, "zeros": torch.zeros, "ones": torch.ones}[wanted.fill]
    made = make_filled(wanted.shape, dtype=torch.long if wanted.dtype == "long" else torch.float32)
    return [made] if wanted.listed else made


def nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """What is called `a.b` becomes entry b of the dict a."""
    plain = {name: value for name, value in inputs.items() if "." not in name}
    for name, value in inputs.items():
        outer, dot, inner = name.partition(".")
        if dot:
            plain.setdefault(outer, {})[inner] = value
    return plain


def write_index(folder: Path, classes: dict[str, str]) -> None:
    library = {name: "diffusers" if hasattr(diffusers, name) else "transformers" for name in classes.values()}
    entries = {component: [library[name], name] for component, name in classes.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **entries}))


def recipe(tmp_path: Path, model: Path, **backends: str) -> str:
    components = {name: {"backend": backend, "keep": "profile"} for name, backend in backends.items()}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": str(model), "components": components}))
    return str(file)
