"""Weights that stand beside their scales in a file, read as floats: ComfyUI's formats, BFL's, and plain FP8 casts.

P.weight holds codes, and P.comfy_quant (or `_quantization_metadata` in the header) names the format:

    float8_e4m3fn, float8_e5m2   ŵ = code · P.weight_scale (P.scale_weight in older files); without one, the bare code
    int8_tensorwise              the same with a scale for the tensor or for each row; convrot: rotated back afterwards
    nvfp4                        as ours, but the first of two codes in the high half and block scales in tiles
    mxfp8                        as ours, with block scales in tiles

BFL's NVFP4 names no format: plain block scales, the first code in the low half. Sources: ComfyUI comfy/ops.py,
comfy-kitchen 0.2.40 (backends/eager/quantization.py), diffusers 0.42 quantizers/bfl.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute import backends
from bitroute.backends.base import TensorSpec
from bitroute.convert.decoded import derive, raise_all
from bitroute.convert.document import shown
from bitroute.convert.layout import StoredTensor, read_header
from bitroute.convert.reading import read_tensor
from bitroute.errors import Problem, SourceError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MARK = "scaled_fp8"  # a tensor without a weight, in older files
METADATA = "_quantization_metadata"
FORMAT_LIMIT_BYTES = 4096
SCALES = {"scale": (".weight_scale", ".scale_weight"), "tensor_scale": (".weight_scale_2",)}
UNREAD = (".comfy_quant", ".input_scale", ".scale_input")  # scales of activations
WEIGHT_WORDS = ("shift", "logit")  # in scales that belong to a model: scale_shift_table, CLIP's logit_scale
ROTATION = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))  # the Hadamard matrix that convrot grows from

Specs = Mapping[str, TensorSpec]
Decode = Callable[[Mapping[str, Tensor]], Tensor]
Format = Callable[[Specs, Mapping[str, Any]], tuple[tuple[int, ...], Decode]]  # raises ValueError for what does not fit


def decode_scaled(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """The tensors with floats of `dtype` in place of codes and their scales; what it does not know it leaves.

    Raises:
        SourceError: an unknown format, or scales that do not fit their codes.
    """
    said, unknown = _formats(stored), _unknown_scales(stored)
    found = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] != MARK}
    problems: list[Problem] = []
    for name in [name for name in found if name.endswith(".weight") and _is_code(found[name])]:
        layer = name.removesuffix(".weight")
        parts = {"codes": found[name], **_scales(layer, found)}
        options = said.get(layer, {})
        kind = options.get("format", _inferred(parts))
        if kind is None:
            continue
        for key in (*UNREAD, *sum(SCALES.values(), ())):
            found.pop(layer + key, None)
        if kind == "float8" and len(parts) == 1:
            continue  # a bare cast, unless there is a scale that nothing explains
        try:
            found[name] = _weight(name, kind, parts, options, dtype)
        except ValueError as error:
            problems.append(_bad_weight(parts["codes"], str(error)))
    for name in [name for name, tensor in found.items() if tensor.spec.dtype in FLOAT8]:
        if scale := unknown.get(name.rpartition(".")[0]):
            problems.append(_bad_weight(found[name], f"a scale {scale!r} whose meaning is not known"))
    raise_all(problems)
    return {name: _cast(tensor, dtype) if tensor.spec.dtype in FLOAT8 else tensor for name, tensor in found.items()}


def _is_code(tensor: StoredTensor) -> bool:
    return tensor.spec.dtype in (*FLOAT8, torch.int8, torch.uint8) and bool(tensor.spec.shape)


def _unknown_scales(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Layer → a scale beside its weight that no format here has, such as DeepSeek's of blocks: no bare FP8 cast."""
    known = (*UNREAD, *sum(SCALES.values(), ()))
    found: dict[str, str] = {}
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        is_scale = "scale" in leaf and f".{leaf}" not in known and not any(word in leaf for word in WEIGHT_WORDS)
        if is_scale and tensor.spec.dtype not in FLOAT8:
            found |= {layer: name, layer.removesuffix(".weight"): name}
    return found


def _cast(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    return derive(tensor.name, {"": tensor}, tensor.spec.shape, dtype, lambda given: given[""].float())


def _scales(layer: str, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    places = {part: next((layer + key for key in keys if layer + key in found), "") for part, keys in SCALES.items()}
    return {part: found[place] for part, place in places.items() if place}


def _inferred(parts: Mapping[str, StoredTensor]) -> str | None:
    """The format of a weight that names none."""
    if parts["codes"].spec.dtype in FLOAT8:
        return "float8"
    is_nvfp4 = parts["codes"].spec.dtype == torch.uint8 and "tensor_scale" in parts
    return "bfl-nvfp4" if is_nvfp4 else None


def _weight(
    name: str, kind: object, parts: Mapping[str, StoredTensor], options: Mapping[str, Any], dtype: torch.dtype
) -> StoredTensor:
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(f"format {shown(kind)}, expected one of {', '.join(FORMATS)}")
    shape, decode = FORMATS[kind]({part: tensor.spec for part, tensor in parts.items()}, options)
    return derive(name, parts, shape, dtype, decode)


def _formats(stored: Mapping[str, StoredTensor]) -> dict[str, Mapping[str, Any]]:
    """Layer → what its file says of its format."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted({tensor.file for tensor in stored.values() if tensor.file.suffix == ".safetensors"}):
        found |= _listed(file)
    for name in [name for name in stored if name.endswith(".comfy_quant")]:
        tensor = stored[name]
        fits = tensor.spec.dtype == torch.uint8 and tensor.spec.size_bytes <= FORMAT_LIMIT_BYTES
        text = bytes(read_tensor(tensor).reshape(-1).tolist()) if fits else b"{}"
        found[name.removesuffix(".comfy_quant")] = _mapping(text, tensor.file, name)
    return found


def _listed(file: Path) -> dict[str, Mapping[str, Any]]:
    text = read_header(file).metadata.get(METADATA, "{}")
    layers = _mapping(text.encode(), file, METADATA).get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise SourceError(Problem(f"{METADATA} does not map layers to formats", str(file), got=shown(layers)))
    return layers


def _mapping(text: bytes, file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(Problem(f"{name} is not JSON", str(file), got=str(error)[:200])) from error
    if not isinstance(content, dict):
        raise SourceError(Problem(f"{name} is not a JSON mapping", str(file), got=shown(content)))
    return content


def _simple(specs: Specs, options: Mapping[str, Any]) -> tuple[tuple[int, ...], Decode]:
    """A scale for the tensor or for each row; rotated back where the weight was rotated before."""
    shape = specs["codes"].shape
    scale = specs.get("scale", TensorSpec((), torch.float32))
    group = options.get("convrot_groupsize", 256) if options.get("convrot") else 0
    of_rows = scale.shape[:1] == shape[:1] and scale.numel == shape[0]
    if specs["codes"].dtype == torch.uint8 or "tensor_scale" in specs or not (scale.numel == 1 or of_rows):
        found = f"{scale.numel} scales {list(scale.shape)}"
        raise ValueError(f"{specs['codes'].dtype} codes of shape {list(shape)} with {found}")
    if not scale.dtype.is_floating_point:
        raise ValueError(f"scales of {scale.dtype}")
    if group and (group not in (4, 16, 64, 256, 1024) or len(shape) != 2 or shape[1] % group):
        raise ValueError(f"a rotation of {shown(group)} columns of {list(shape)}")

    def decode(given: Mapping[str, Tensor]) -> Tensor:
        weight = given["codes"].float()
        if "scale" in given:
            weight = weight.mul_(given["scale"].float().reshape(-1, *[1] * (len(shape) - 1)))
        return _rotated(weight, group) if group else weight

    return shape, decode


def _rotated(weight: Tensor, group: int) -> Tensor:
    """Groups of columns times a symmetric orthogonal matrix, which is its own inverse."""
    matrix = step = torch.tensor(ROTATION, dtype=torch.float32)
    while len(matrix) < group:
        matrix = torch.kron(matrix, step)
    rotated: Tensor = weight.reshape(-1, group) @ (matrix / math.sqrt(group))
    return rotated.reshape(weight.shape)


def _nvfp4(specs: Specs, options: Mapping[str, Any]) -> tuple[tuple[int, ...], Decode]:
    weight = _blocks(specs, 2, 16, (torch.float8_e4m3fn,), tiled=True)
    backend = backends.create("nvfp4")

    def decode(given: Mapping[str, Tensor]) -> Tensor:
        codes = given["codes"]
        return backend.decode(
            {
                "qdata": codes << 4 | codes >> 4,  # here the first of two codes is in the low half
                "scale": _untiled(given["scale"], weight.shape[0], weight.shape[1] // 16),
                "per_tensor_scale": given["tensor_scale"].float().reshape(()),
            },
            weight,
        )

    return weight.shape, decode


def _bfl_nvfp4(specs: Specs, options: Mapping[str, Any]) -> tuple[tuple[int, ...], Decode]:
    weight = _blocks(specs, 2, 16, (torch.float8_e4m3fn,), tiled=False)
    backend = backends.create("nvfp4")

    def decode(given: Mapping[str, Tensor]) -> Tensor:
        scale = given["tensor_scale"].float().reshape(())
        return backend.decode({"qdata": given["codes"], "scale": given["scale"], "per_tensor_scale": scale}, weight)

    return weight.shape, decode


def _mxfp8(specs: Specs, options: Mapping[str, Any]) -> tuple[tuple[int, ...], Decode]:
    weight = _blocks(specs, 1, 32, (torch.uint8, torch.float8_e8m0fnu), tiled=True)
    backend = backends.create("mxfp8")

    def decode(given: Mapping[str, Tensor]) -> Tensor:
        scale = _untiled(given["scale"], weight.shape[0], weight.shape[1] // 32)
        return backend.decode({"qdata": given["codes"], "scale": scale.view(torch.float8_e8m0fnu)}, weight)

    return weight.shape, decode


def _blocks(specs: Specs, codes: int, block: int, dtypes: tuple[torch.dtype, ...], tiled: bool) -> TensorSpec:
    """The weight [out, in] of `codes` to a byte; in tiles, block scales fill 128 rows and 4 columns at a time."""
    stored, expected = specs["codes"], torch.uint8 if codes == 2 else torch.float8_e4m3fn
    if len(stored.shape) != 2 or stored.dtype != expected or "scale" not in specs:
        raise ValueError(f"codes {stored} without scales, or not as this format packs them")
    rows, columns = stored.shape[0], codes * stored.shape[1]
    scales = -(-rows // 128) * 128 * -(-columns // block // 4) * 4 if tiled else rows * columns // block
    scale, whole = specs["scale"], specs.get("tensor_scale")
    if columns % block or scale.numel != scales or scale.dtype not in dtypes:
        raise ValueError(f"a weight of {rows}×{columns} with scales {scale}, expected {scales}")
    if (whole.numel if whole else 0) != codes - 1:
        raise ValueError(f"a scale of the tensor {whole}")
    return TensorSpec((rows, columns), torch.bfloat16)


def _untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [rows, columns] out of the layout of cuBLAS; as bytes, since few operations know FP8."""
    from torchao.prototype.mx_formats.utils import from_blocked

    plain: Tensor = from_blocked(scales.reshape(-1).view(torch.uint8), rows, columns)
    return plain.contiguous().view(scales.dtype)


FORMATS: Mapping[str, Format] = {
    "float8_e4m3fn": _simple, "float8_e5m2": _simple, "int8_tensorwise": _simple, "nvfp4": _nvfp4, "mxfp8": _mxfp8,
    "float8": _simple, "bfl-nvfp4": _bfl_nvfp4,
}  # fmt: skip


def _bad_weight(tensor: StoredTensor, got: str) -> Problem:
    return Problem(
        f"the weight {tensor.name!r} cannot be decoded", str(tensor.file), got,
        next_step="start from the original model, or from a file in one of these formats",
    )  # fmt: skip
