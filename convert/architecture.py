"""A component as its class builds it, on the meta device: which layers there are, without a byte of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitroute.convert.checkpoint import Component
from bitroute.convert.layout import StoredTensor
from bitroute.errors import Problem, SourceError


@dataclass(frozen=True)
class Architecture:
    """layers: layer → module class, for every module with a weight; sources: tensor name → where it is stored."""

    layers: dict[str, str]
    sources: dict[str, StoredTensor]

    @property
    def parameters(self) -> int:
        return sum(tensor.spec.numel for tensor in self.sources.values())

    @property
    def linear(self) -> list[str]:
        """Layers a quantizing backend can take: linear ones whose weight the checkpoint stores under their name."""
        return [
            name
            for name, kind in self.layers.items()
            if kind == "Linear" and f"{name}.weight" in self.sources
        ]

    @property
    def other(self) -> list[str]:
        linear = set(self.linear)
        return [name for name in self.layers if name not in linear]


def build(component: Component) -> Architecture:
    """The layers of a component, matched with the tensors of its checkpoint.

    Raises:
        SourceError: unknown class, a config the class refuses, a tensor missing or of another shape than the
            class wants, or weights that are already quantized. All mismatches at once.
    """
    _refuse_quantized(component)
    model = build_model(component)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = _match(component, model, expected)
    tied = _tied(model)
    problems = [
        Problem(f"the checkpoint lacks tensor {name!r}", str(component.folder),
                expected=f"{component.class_name} wants it with shape {list(shape)}")
        for name, shape in expected.items() if name not in sources and name not in tied
    ] + [
        Problem(f"tensor {name!r} has another shape than {component.class_name} wants", str(component.folder),
                got=str(list(sources[name].spec.shape)), expected=str(list(shape)),
                next_step="config.json and the weights belong to different models")
        for name, shape in expected.items() if name in sources and sources[name].spec.shape != shape
    ]  # fmt: skip
    if problems:
        raise SourceError(problems[:20])
    return Architecture(dict(_layers(model)), sources)


def build_model(component: Component) -> nn.Module:
    """The component's class on the meta device. Only classes of diffusers and transformers: no remote code runs."""
    model_class = _find_class(component)
    try:
        with torch.device("meta"):
            if component.library == "diffusers":
                model: nn.Module = model_class.from_config(_without_quantization(component.config))
            else:
                model = model_class(
                    model_class.config_class.from_dict(_without_quantization(component.config))
                )
    except Exception as error:  # the classes raise whatever they like on a config that is not theirs
        raise SourceError(
            Problem(
                f"{component.class_name} refuses its config", str(component.folder / "config.json"),
                got=f"{type(error).__name__}: {error}",
                next_step="check that model_index.json names the right class and that the config is complete",
            )
        ) from error  # fmt: skip
    return model


def _find_class(component: Component) -> Any:
    import diffusers
    import transformers

    library = diffusers if component.library == "diffusers" else transformers
    found = getattr(library, component.class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SourceError(
            Problem(
                f"{component.library} {library.__version__} has no model class {component.class_name!r}",
                str(component.folder.parent / "model_index.json"),
                next_step=f"pip install -U {component.library}, or leave {component.name!r} out of the recipe",
            )
        )  # fmt: skip
    return found


def _match(component: Component, model: nn.Module, expected: Mapping[str, object]) -> dict[str, StoredTensor]:
    """The stored tensors under the names the class uses; files of older transformers carry other prefixes."""
    if component.library != "transformers":
        return component.tensors
    from bitroute.backends._transformers import renaming

    rename = renaming(model)
    return {rename(name, expected): tensor for name, tensor in component.tensors.items()}


def _tied(model: nn.Module) -> set[str]:
    """Parameters that the class ties to another one, so that a checkpoint may leave them out."""
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*pairs.keys(), *pairs.values()}


def _layers(model: nn.Module) -> Iterable[tuple[str, str]]:
    for name, module in model.named_modules():
        if name and isinstance(getattr(module, "weight", None), torch.Tensor):
            kind = "Linear" if type(module) is nn.Linear else type(module).__name__
            yield name, kind


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _refuse_quantized(component: Component) -> None:
    config = component.config.get("quantization_config")
    stored = {tensor.spec.dtype for tensor in component.tensors.values()} - {torch.bool}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in stored if dtype.itemsize == 1}
    if config or dtypes:
        got = (
            f"quant_method {config.get('quant_method')!r}"
            if config
            else f"{', '.join(sorted(dtypes))} tensors"
        )
        raise SourceError(
            Problem(
                f"component {component.name!r} is already quantized", str(component.folder), got=got,
                expected="bf16, fp16 or fp32 weights",
                next_step="start from the original model: quantizing twice adds the errors of both",
            )
        )  # fmt: skip
