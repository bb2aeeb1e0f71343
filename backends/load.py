"""The bitroute container as diffusers and transformers load it: what their two quantizers share.

`config.json` names the backend of each quantized layer L, and the weight files hold `L.<suffix>` for every
output of that backend. Stored tensors stay as they are, whatever dtype the model is loaded in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import nn

from bitroute.backends import create
from bitroute.backends.base import CODES, Backend, TensorSpec
from bitroute.backends.layers import QuantizedLayer, is_convolution
from bitroute.errors import Problem, SourceError

FORMAT_VERSION = 1
WHERE = "quantization_config"
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Rename = Callable[[str, Mapping[str, object]], str]  # a stored name, the names of the model → its own name for it
SHOWN = 20  # problems of one checkpoint that an error lists


class QuantMethod(str, Enum):  # noqa: UP042 - the libraries compare it with plain strings and also read `.value`
    BITROUTE = "bitroute"


class Group(BaseModel):
    """The layers of one backend with one set of options."""

    backend: str
    options: dict[str, Any]
    layers: list[str]


GROUPS = TypeAdapter(list[Group])


class Manifest:
    """`quantization_config` as it stands in config.json; keys that this version does not know are kept.

    Raises:
        SourceError: written by another version of bitroute, or malformed.
    """

    def __init__(
        self,
        /,
        groups: Sequence[Mapping[str, Any]] = (),
        compute_dtype: str = "bfloat16",
        format_version: int = FORMAT_VERSION,
        **others: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise SourceError(
                Problem(
                    "the checkpoint was written by another version of bitroute",
                    WHERE,
                    got=f"format_version {format_version!r}",
                    expected=f"format_version {FORMAT_VERSION}",
                    next_step="pip install -U bitroute",
                )
            )
        taken = [key for key in others if key != "quant_method" and hasattr(type(self), key)]
        if taken:
            raise _malformed(f"the key {taken[0]!r}", "no key with the name of a method")
        if compute_dtype not in tuple(COMPUTE_DTYPES):
            raise _malformed(f"compute_dtype {compute_dtype!r}", f"one of {', '.join(COMPUTE_DTYPES)}")
        try:
            GROUPS.validate_python(groups)
        except ValidationError as error:
            detail = error.errors()[0]
            place = ".".join(map(str, ("groups", *detail["loc"])))
            raise _malformed(f"{place}: {repr(detail['input'])[:200]}", detail["msg"]) from error
        self.__dict__.update(others)
        self.quant_method = QuantMethod.BITROUTE
        self.format_version = format_version
        self.compute_dtype = compute_dtype
        self.groups = groups

    def to_dict(self) -> dict[str, Any]:
        return {**copy.deepcopy(self.__dict__), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in where its user names no dtype."""
        return COMPUTE_DTYPES[self.compute_dtype]

    def backends(self) -> dict[str, Backend]:
        """Layer → backend. Imports them, so not under `torch.device("meta")`: their tables would be empty."""
        found: dict[str, Backend] = {}
        for group in self.groups:
            backend = create(group["backend"], **group["options"])
            for layer in group["layers"]:
                if layer in found:
                    raise _malformed(f"layer {layer!r} twice", "every layer in one group")
                found[layer] = backend
        return found


@dataclass(frozen=True)
class StoredLayer:
    """A layer of the model on the meta device, and what the checkpoint holds in its place."""

    name: str
    module: nn.Module
    backend: Backend

    @cached_property
    def outputs(self) -> dict[str, TensorSpec]:
        return self.backend.outputs(_spec(self.module))

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        return {f"{self.name}.{suffix}": spec for suffix, spec in self.outputs.items()}


def refuse_unquantized(pre_quantized: bool) -> None:
    """A quantizer is asked to quantize a model while it loads."""
    if not pre_quantized:
        raise SourceError(
            Problem(
                "bitroute does not quantize while loading, and this model is not quantized",
                expected="a checkpoint whose config.json says quant_method bitroute",
                next_step="quantize --recipe RECIPE --model MODEL, then load the folder that it writes",
            )
        )


def attach(
    model: nn.Module,
    backends: Mapping[str, Backend],
    files: Sequence[str] | None = None,
    float32: Iterable[str] = (),
    rename: Rename = lambda name, expected: name,
) -> frozenset[str]:
    """Puts each layer's stored form, on the meta device, in its place.

    Args:
        files: the checkpoint's weight files; their headers are compared with what the backends expect.
        float32: names of modules that the model class wants to compute in float32.
        rename: what the library makes of a name in the files, given the names that the model expects.

    Returns:
        The names of the stored tensors, which must be loaded without a cast.

    Raises:
        SourceError: a layer is missing or of another kind, a tensor is missing or has another shape or dtype, or a
            layer is stored in a form that no backend is named for.
    """
    layers = _find_layers(model, backends)
    expected = {name: spec for layer in layers for name, spec in layer.tensors.items()}
    if files is not None:
        headers = _read_headers(files)
        found = {rename(name, expected): tensor for name, tensor in headers.items()}
        _raise_all(problem for layer in layers for problem in _differences(layer, found))
        _raise_all(_unexplained(model, headers, expected, rename))
    for layer in layers:
        if not set(layer.name.split(".")).isdisjoint(float32):
            layer.module.to(torch.float32)
        stored = layer.backend.on_meta(_spec(layer.module))
        model.set_submodule(layer.name, layer.backend.attach(layer.module, stored))
    _tell_dtype(model)
    return frozenset(expected)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts plain layers with decoded weights back, in `dtype` or in what each layer computes in."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLayer):
            target = dtype or layer.spec.dtype
            plain = layer.plain()
            plain.weight = nn.Parameter(layer.decoded(target))
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.to(target))
            model.set_submodule(name, plain)


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def _tell_dtype(model: nn.Module) -> None:
    """The libraries take the dtype of the first floating parameter for that of the model: a scale must not be it."""
    for module in model.modules():
        own = next((tensor for tensor in module.parameters(recurse=False) if tensor.is_floating_point()), None)
        if isinstance(module, QuantizedLayer) and own is not module.bias:
            module.hide()
        elif own is not None:
            return


def _find_layers(model: nn.Module, backends: Mapping[str, Backend]) -> list[StoredLayer]:
    """Layers whose backend stores the weight under its own name stay plain: the library loads them."""
    found = [_find_layer(model, name, backend) for name, backend in backends.items()]
    _raise_all(layer for layer in found if isinstance(layer, Problem))
    layers = [layer for layer in found if isinstance(layer, StoredLayer)]
    return [layer for layer in layers if "weight" not in layer.outputs]


def _find_layer(model: nn.Module, name: str, backend: Backend) -> StoredLayer | Problem:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return Problem(
            f"{type(model).__name__} has no layer {name!r}",
            WHERE,
            got=f"backend {backend.name!r} for it",
            next_step="load with the model class and the library versions that the checkpoint was made with",
        )
    if not (isinstance(module, nn.Linear) or is_convolution(module)):
        what = f"layer {name!r} is not linear, nor a plain convolution"
        return Problem(what, WHERE, type(module).__name__, expected="Linear or Conv1d to Conv3d of one group")
    refusal = (backend.refuse_convolution() if is_convolution(module) else None) or backend.refuse(_spec(module))
    if refusal:
        return Problem(f"backend {backend.name!r} cannot hold layer {name!r}", WHERE, got=refusal)
    return StoredLayer(name, module, backend)


def _read_headers(files: Sequence[str]) -> dict[str, str]:
    """Tensor name → its dtype and shape in words."""
    found = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise SourceError(Problem("the weights are not in safetensors", str(file)))
        with safe_open(file, framework="numpy") as header:  # torch's would follow the default device, meta
            for name in header.keys():  # noqa: SIM118 - no mapping
                tensor = header.get_slice(name)
                found[name] = f"{tensor.get_dtype()} {tensor.get_shape()}"
    return found


def _differences(layer: StoredLayer, found: Mapping[str, str]) -> Iterator[Problem]:
    for name, spec in layer.tensors.items():
        expected = f"{CODES.get(spec.dtype, spec.dtype)} {list(spec.shape)}"
        if found.get(name) != expected:
            yield Problem(
                f"tensor {name!r} of layer {layer.name!r} does not fit its backend {layer.backend.name!r}",
                got=found.get(name, "no such tensor in the weight files"),
                expected=expected,
                next_step="the checkpoint is damaged or was edited: download or write it again",
            )


def _unexplained(
    model: nn.Module, names: Iterable[str], expected: Mapping[str, TensorSpec], rename: Rename
) -> Iterator[Problem]:
    """Layers with stored tensors that are neither a backend's nor their own.

    The libraries would only warn, and give such a layer random weights.
    """
    own: dict[str, object] = {**model.state_dict(), **expected}
    strangers: dict[str, list[str]] = {}
    for name in names:
        stored, _, suffix = name.rpartition(".")
        layer = rename(f"{stored}.weight", own).rpartition(".")[0]  # the libraries rename what the model has
        if f"{layer}.weight" in own and f"{layer}.{suffix}" not in own:
            strangers.setdefault(layer, []).append(name)
    for layer, tensors in strangers.items():
        yield Problem(
            f"layer {layer!r} is stored in a form that no group explains",
            WHERE,
            got=", ".join(sorted(tensors)),
            expected=f"a group that names the backend of {layer!r}",
            next_step="the config was edited or belongs to other weights: download or write both again",
        )


def _raise_all(problems: Iterable[Problem]) -> None:
    listed = list(problems)
    if listed:
        raise SourceError(listed[:SHOWN])


def _spec(layer: Any) -> TensorSpec:
    """The weight as backends see it: [out, everything else]."""
    return TensorSpec(tuple(layer.weight.shape), layer.weight.dtype).rows


def _malformed(got: str, expected: str) -> SourceError:
    return SourceError(Problem("the quantization config is malformed", WHERE, got, expected))
