"""Components that other tools quantized, read as floats: by their config, their headers, and a few bytes of state.

Layouts: torchao 0.18 (prototype/safetensors), bitsandbytes 0.50 (functional.py, QuantState.as_dict), optimum-quanto
0.2.7 (tensor/qbits.py), and the bitroute container where the record of its job is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute import backends
from bitroute.backends.base import TensorSpec
from bitroute.convert.architecture import build_model
from bitroute.convert.checkpoint import Component
from bitroute.convert.decoded import DTYPES, as_floats, derive, raise_all, undecodable
from bitroute.convert.document import shown
from bitroute.convert.fourbit import decode_four_bit
from bitroute.convert.gguf import read_gguf
from bitroute.convert.layout import StoredTensor, read_header
from bitroute.convert.reading import read_tensor
from bitroute.convert.scaled import decode_scaled
from bitroute.convert.schema import Dequantize
from bitroute.errors import Problem, SourceError

Tensors = dict[str, StoredTensor]
Reader = Callable[[Component, Tensors, torch.dtype], Tensors]
TORCHAO = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "MXTensor", "NVFP4Tensor")  # decode on a CPU
QUANTO_BITS = {"int2": 2, "int4": 4, "int8": 8, "float8": 8}
ITS_OWN = "load it with the library that made it, `model.dequantize()`, `model.save_pretrained(…)`, and take that"


def decode_foreign(component: Component, stored: Tensors, dtype: torch.dtype) -> Tensors:
    """The component's tensors, quantized weights derived from theirs.

    Raises:
        SourceError: quantized in a way that is not known, or the tensors are not what their method stores.
    """
    config = component.config.get("quantization_config")
    config = config if isinstance(config, dict) else {}
    found = _reader(component, config)(component, stored, dtype)
    _refuse_codes(found)
    return found


def read_file(file: Path, dequantize: Dequantize) -> Tensors:
    """The tensors of one file of its own names, *.gguf or *.safetensors, as floats.

    Raises:
        SourceError: the file cannot be read, or holds weights in a form that is not known.
    """
    dtype = DTYPES[dequantize]
    if file.suffix == ".gguf":
        found = read_gguf(file, dtype)
    else:
        found = decode_scaled(decode_four_bit(read_header(file).tensors, dtype), dtype)
        _refuse_codes(found)
    return found if dequantize is True else as_floats(found, dtype)


def _refuse_codes(found: Tensors) -> None:
    """Bytes that are left would be read as weights, or not at all."""
    left = [t for t in found.values() if t.spec.dtype.itemsize == 1 and t.spec.dtype != torch.bool]
    raise_all([_unknown_form(tensor) for tensor in left])


def _reader(component: Component, config: Mapping[str, Any]) -> Reader:
    method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None)
    if not component.config.get("quantization_config"):
        return lambda component, stored, dtype: decode_scaled(decode_four_bit(stored, dtype), dtype)
    if not isinstance(method, str) or method not in READERS:
        what = f"component {component.name!r} is quantized in a way that is not known here"
        where, expected = str(component.folder / "config.json"), ", ".join(READERS)
        raise SourceError(Problem(what, where, f"quant_method {shown(method)}", expected, ITS_OWN))
    return READERS[method]


def _torchao(component: Component, stored: Tensors, dtype: torch.dtype) -> Tensors:
    """Every weight has its record in the header of its file."""
    records = {name: text for header in component.headers.values() for name, text in header.metadata.items()}
    names = [name for name, text in records.items() if '"_tensor_data_names"' in text]
    if not names:
        what = f"component {component.name!r} does not say how torchao stored it"
        raise SourceError(Problem(what, str(component.folder), "headers without records of tensors", next_step=ITS_OWN))
    found = dict(stored)
    problems = []
    for name in names:
        try:
            parts = _torchao_parts(name, records[name], found)
            found[name] = _torchao_weight(name, records[name], parts, dtype)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
            got = f"{type(error).__name__}: {error}"[:200]
            problems.append(_bad_record(component, name, got))
    raise_all(problems)
    return found


def _torchao_parts(name: str, record: str, found: Tensors) -> Tensors:
    layer, _, parameter = name.rpartition(".")
    prefix = f"{layer}._{parameter}_" if layer else f"_{parameter}_"
    return {part: found.pop(f"{prefix}{part}") for part in json.loads(record)["_tensor_data_names"]}


def _torchao_weight(name: str, record: str, parts: Tensors, dtype: torch.dtype) -> StoredTensor:
    """Raises ValueError for a tensor that only a GPU decodes, and whatever torchao raises on parts that do not fit."""
    kind = json.loads(record)["_type"]
    if kind not in TORCHAO:
        raise ValueError(f"{shown(kind)}, expected one of {', '.join(TORCHAO)}")
    on_meta = {part: torch.empty(t.spec.shape, dtype=t.spec.dtype, device="meta") for part, t in parts.items()}
    shape = tuple(_torchao_tensor(record, on_meta).shape)

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        decoded: Tensor = _torchao_tensor(record, tensors).dequantize()
        return decoded

    return derive(name, parts, shape, dtype, decode)


def _torchao_tensor(record: str, parts: Mapping[str, Tensor]) -> Any:
    from torchao.prototype.safetensors.safetensors_utils import object_from_dict

    content = json.loads(record)
    content["_data"].update(parts)
    return object_from_dict(content)


def _bitsandbytes(component: Component, stored: Tensors, dtype: torch.dtype) -> Tensors:
    """4 bits with their state beside them, 8 bits with the absolute maxima of the rows."""
    found = decode_four_bit(stored, dtype)
    decode = backends.create("bnb-int8").decode
    problems = []
    for scale in [name for name in found if name.endswith(".SCB")]:
        layer = scale.removesuffix(".SCB")
        name = f"{layer}.weight"
        parts = {"SCB": found.pop(scale)}
        order = found.pop(f"{layer}.weight_format", None)
        if name not in found or found[name].spec.shape[:1] != parts["SCB"].spec.shape:
            problems.append(undecodable(parts["SCB"], name, "no rows of codes for its scales"))
        elif order is not None and (order.spec.numel != 1 or read_tensor(order).item() != 0):
            problems.append(undecodable(order, name, "codes in the order of a GPU", "weight_format 0, plain rows"))
        else:
            parts["codes"] = found[name]
            spec = found[name].spec
            found[name] = derive(name, parts, spec.shape, dtype, partial(decode, weight=spec))
    raise_all(problems)
    return found


def _quanto(component: Component, stored: Tensors, dtype: torch.dtype) -> Tensors:
    """A scale for each row of 8 bits, a scale and a shift for each group of 4 or 2."""
    kind = component.config["quantization_config"].get("weights_dtype")
    if not isinstance(kind, str) or kind not in QUANTO_BITS:
        where, expected = str(component.folder / "config.json"), ", ".join(QUANTO_BITS)
        raise SourceError(Problem("weights of an unknown type", where, shown(kind), expected, ITS_OWN))
    shapes = _shapes(component) if QUANTO_BITS[kind] < 8 else {}
    found = dict(stored)
    for scale in [name for name in stored if name.endswith(".weight._scale")]:
        name = scale.removesuffix("._scale")
        keys = {"data": "._data._data" if shapes else "._data", "scale": "._scale", "shift": "._shift"}
        parts = {part: found.pop(name + key) for part, key in keys.items() if name + key in found}
        if "data" not in parts or (shapes and ("shift" not in parts or name not in shapes)):
            raise SourceError(undecodable(stored[scale], name, "scales without codes, shifts or a layer"))
        shape = shapes.get(name, parts["data"].spec.shape)
        if not _quanto_fits({part: tensor.spec for part, tensor in parts.items()}, shape, QUANTO_BITS[kind]):
            raise SourceError(undecodable(stored[scale], name, f"codes, scales and shifts that make no {list(shape)}"))
        found[name] = derive(name, parts, shape, dtype, _quanto_decoder(QUANTO_BITS[kind], shape))
        for activation in ("input_scale", "output_scale"):
            found.pop(f"{name.removesuffix('weight')}{activation}", None)
    return found


def _quanto_fits(specs: Mapping[str, TensorSpec], shape: tuple[int, ...], bits: int) -> bool:
    """Whether groups of equal size, packed as many to a byte as fit, make a weight of this shape."""
    groups, weights = specs["scale"].numel, math.prod(shape)
    if bits == 8:
        return groups in (1, shape[0])
    packed = -(-groups * bits // 8)
    return (
        bool(groups) and weights % groups == 0 and specs["shift"].numel == groups
        and specs["data"] == TensorSpec((packed, weights // groups), torch.uint8)
    )  # fmt: skip


def _quanto_decoder(bits: int, shape: tuple[int, ...]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """ŵ = q · s, or q · s - shift; a byte holds codes of groups that lie equal parts of the tensor apart."""

    def decode(given: Mapping[str, Tensor]) -> Tensor:
        scale, data = given["scale"].float(), given["data"]
        if bits == 8:
            return data.float() * scale
        codes = torch.cat([data >> low & (1 << bits) - 1 for low in range(0, 8, bits)])[: len(scale)]
        return (codes * scale - given["shift"].float()).reshape(shape)

    return decode


def _bitroute(component: Component, stored: Tensors, dtype: torch.dtype) -> Tensors:
    """Raises SourceError also for a config that is malformed, BackendError for a backend that is not here."""
    from bitroute.backends.load import Manifest

    shapes, found = _shapes(component), dict(stored)
    problems = []
    for layer, backend in Manifest(**component.config["quantization_config"]).backends().items():
        name = f"{layer}.weight"
        weight = TensorSpec(shapes.get(name, ()), torch.bfloat16).rows
        outputs = backend.outputs(weight) if name in shapes else {}
        parts = {suffix: found.pop(f"{layer}.{suffix}", None) for suffix in outputs}
        there = {suffix: tensor for suffix, tensor in parts.items() if tensor and tensor.spec == outputs[suffix]}
        if not outputs or len(there) < len(outputs):
            problems.append(_bad_record(component, name, f"not the tensors of {backend.name}"))
            continue
        found[name] = derive(name, there, weight.shape, dtype, partial(backend.decode, weight=weight))
    raise_all(problems)
    return found


READERS: Mapping[str, Reader] = {
    "torchao": _torchao, "bitsandbytes": _bitsandbytes, "quanto": _quanto, "bitroute": _bitroute,
}  # fmt: skip


def _shapes(component: Component) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in build_model(component).state_dict().items()}


def _bad_record(component: Component, name: str, got: str) -> Problem:
    return Problem(
        f"the weight {name!r} is not stored as its record says", str(component.folder), got,
        next_step=f"download it again; if that does not help, {ITS_OWN}",
    )  # fmt: skip


def _unknown_form(tensor: StoredTensor) -> Problem:
    what = f"tensor {tensor.name!r} is quantized in a form that nothing explains"
    return Problem(what, str(tensor.file), str(tensor.spec.dtype).removeprefix("torch."), "bf16, fp16 or fp32", ITS_OWN)
