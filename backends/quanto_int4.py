"""INT4, affine, groups of 128 where they fit the rows, by optimum-quanto's qint4.

s = (max - min) / 15, shift = -min, q = round((w + shift) / s), ŵ = q · s - shift; scale and shift in bf16.
A byte holds the codes of two groups that lie half the tensor apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from optimum.quanto import MaxOptimizer, qint4
from optimum.quanto.tensor.packed import pack_weights
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._quanto import COMPUTE_DTYPE, Quanto, divisor
from bitroute.backends.base import KEEP_IT, NONE, Statistics, Survey, TensorSpec, cast
from bitroute.errors import BackendError, Problem

GROUP = 128  # columns that share a scale, where they divide the row


@dataclass(frozen=True)
class QuantoInt4(Quanto):
    name = "quanto-int4"
    weights_dtype = "int4"
    names: ClassVar[Mapping[str, str]] = {
        "data": "weight._data._data",
        "scale": "weight._scale",
        "shift": "weight._shift",
    }
    lowest_sqnr_db = 8.0

    def refuse(self, weight: TensorSpec) -> str | None:
        """torch's int4 kernel, which quanto packs groups of 128 for, takes 16 rows at a time."""
        rows, columns = weight.shape
        if columns > GROUP and columns % GROUP == 0 and rows % 16:
            return f"optimum-quanto runs groups of {GROUP} in sixteens of rows, which {rows} is not"
        return super().refuse(weight)

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        size = group_size(weight.shape[1])
        groups = weight.numel // size
        return {
            "data": TensorSpec(((groups + 1) // 2, size), torch.uint8),
            "scale": TensorSpec((groups, 1), COMPUTE_DTYPE),
            "shift": TensorSpec((groups, 1), COMPUTE_DTYPE),
            **super().outputs(weight),
        }

    def working_bytes(self, weight: TensorSpec) -> int:
        """A byte for every code, what they are packed to, and as much while they are packed."""
        return 2 * weight.numel + super().working_bytes(weight)

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        size = group_size(weight.shape[1])
        groups = weight.numel // size
        codes = torch.empty(groups, size, dtype=torch.uint8)
        scale, shift = (torch.empty(groups, 1, dtype=COMPUTE_DTYPE) for _ in range(2))
        end = 0
        for rows in blocks:
            begin, end = end, end + rows.numel() // size
            found = _encode(cast(rows, COMPUTE_DTYPE).reshape(-1, size))
            for whole, part in zip((codes, scale, shift), found, strict=True):
                whole[begin:end] = part
        outputs = {"data": pack_weights(codes, bits=4), "scale": scale, "shift": shift}
        return Survey(outputs={**super().survey((), weight).outputs, **outputs})

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        return {}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        columns, data = weight.shape[1], stored["data"]
        groups = slice(start * columns // data.shape[1], stop * columns // data.shape[1])
        high = slice(max(0, groups.start - len(data)), max(0, groups.stop - len(data)))
        codes = torch.cat([data[groups] & 15, data[high] >> 4]).float()
        scale, shift = stored["scale"][groups].float(), stored["shift"][groups].float()
        return codes.mul_(scale).sub_(shift).reshape(stop - start, columns)


def group_size(columns: int) -> int:
    """128, 96, 64 or 32, the first that divides a row longer than 128, else the row (QModuleMixin)."""
    sizes = [size for size in (GROUP, 96, 64, 32) if columns > GROUP and columns % size == 0]
    return sizes[0] if sizes else columns


def _encode(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [groups, size] (not packed), scale and shift [groups, 1] of bf16 groups.

    Raises:
        BackendError: max - min of a group is beyond bf16.
    """
    scale, shift = MaxOptimizer().optimize(groups, qint4, axis=0)
    if (scale * 15).isinf().any():
        raise BackendError(Problem("values too large for quanto-int4: max - min overflows", next_step=KEEP_IT))
    codes = torch.ops.quanto.quantize_affine(groups, bits=4, axis=0, group_size=None, scale=divisor(scale), shift=shift)
    return codes, scale, shift
