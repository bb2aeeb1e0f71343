"""What NF4 and FP4 share: 4-bit codes in blocks of 32, 64 or 128 along a row, by bitsandbytes.

ŵ = table[code] · absmax of its block; two codes share a byte, the first in the high half. Double quantization
stores absmax - mean(absmax) in 8 bits, 256 to a block: 4.127 instead of 4.5 bits per weight, and the error of
Gaussian NF4 weights grows from 10.484 to 10.505 %. That is why it is the default. The scale of a block:

    absmax  the largest magnitude, bit for bit bitsandbytes
    mse     whatever number loses least, near that and judged as it will be read back after double quantization,
            weighted by the input's second moment where statistics have it; absmax as stored unless another is
            strictly better. What is stored keeps its form, size and second level of scales, and any reader reads it

Source of the layout: bitsandbytes 0.50, functional.py (quantize_4bit, QuantState.as_dict and from_dict).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, Self

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    get_4bit_type,
    quantize_blockwise,
)
from bitsandbytes.utils import unpack_tensor_to_dict
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bitroute.backends._elements import block_amax, block_weights, in_blocks, looked_up
from bitroute.backends._rounded import Rounded, Scales
from bitroute.backends._table import SMALLEST_AMAX, Blocks, read_back, table
from bitroute.backends.base import NONE, NativeRecord, Statistics, Survey, TensorSpec

FLOAT32_MAX = torch.finfo(torch.float32).max
SMALLEST_NUMBER = 2.0**-149  # of float32
NESTED_BLOCK = 256  # absmax values that share a second-level absmax; bitsandbytes knows no other
QUANT_STATE_BYTES = 256  # the JSON is padded: its length depends on the digits of the mean, a plan has no data
_means: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # quant_state → (its version and place, mean absmax)


@dataclass(frozen=True)
class FourBit(Rounded):
    family = "bitsandbytes_4bit"
    needs = frozenset({"bitsandbytes"})
    quant_type: ClassVar[Literal["nf4", "fp4"]]

    double_quant: bool = True
    block: Literal[32, 64, 128] = 64
    scale: Literal["absmax", "mse"] = "absmax"

    def refuse(self, weight: TensorSpec) -> str | None:
        """bitsandbytes' CPU kernel decodes a row of broken blocks to garbage, without an error."""
        if weight.shape[1] % self.block == 0:
            return super().refuse(weight)
        return f"bitsandbytes misreads rows of {weight.shape[1]}, which are not whole blocks of {self.block}"

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        blocks = weight.numel // self.block
        specs = {
            "codes": TensorSpec((weight.numel // 2, 1), torch.uint8),
            "absmax": TensorSpec((blocks,), torch.uint8 if self.double_quant else torch.float32),
            "quant_map": TensorSpec((16,), torch.float32),
            "quant_state": TensorSpec((QUANT_STATE_BYTES,), torch.uint8),
        }
        if self.double_quant:
            specs["nested_absmax"] = TensorSpec((-(-blocks // NESTED_BLOCK),), torch.float32)
            specs["nested_quant_map"] = TensorSpec((256,), torch.float32)
        return specs

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        """The second level of scales, where they are chosen by it; without one, what describes the format."""
        if self.pending:
            return Survey()
        if not self.double_quant:
            packed = self._packed(torch.empty(0), weight, None, None)
            return Survey(outputs={name: packed[name] for name in packed if name != "absmax"})
        absmax = torch.cat([block_amax(rows.reshape(-1, self.block)).float() for rows in blocks])
        return _searched(*self._second_level(absmax, weight), weight)

    @property
    def pending(self) -> frozenset[str]:
        """The mean of all absmax is subtracted from each."""
        return frozenset({"absmax"} if self.double_quant and self.scale == "absmax" else ())

    def conclude(self, pending: Mapping[str, Tensor], weight: TensorSpec) -> dict[str, Tensor]:
        return self._second_level(pending["absmax"], weight)[0] if self.pending else {}

    def _second_level(self, absmax: Tensor, weight: TensorSpec) -> tuple[dict[str, Tensor], Tensor]:
        """All but the codes, as it is stored, and the mean."""
        mean = _mean(absmax)
        codes, nested = quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
        return self._packed(codes, weight, mean, nested), mean

    def _packed(
        self, absmax: Tensor, weight: TensorSpec, mean: Tensor | None, nested: QuantState | None
    ) -> dict[str, Tensor]:
        """By bitsandbytes' own names."""
        state = QuantState(
            absmax=absmax,
            shape=weight.shape,
            code=get_4bit_type(self.quant_type, device="cpu"),
            blocksize=self.block,
            quant_type=self.quant_type,
            dtype=torch.bfloat16,  # what loaders compute in
            offset=mean,
            state2=nested,
        )
        packed: dict[str, Tensor] = state.as_dict(packed=True)
        packed["quant_state"] = _padded(packed.pop(f"quant_state.bitsandbytes__{self.quant_type}"))
        return packed

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        if self.scale == "mse":
            return super().encode(rows, survey, statistics)
        blocks = in_blocks(rows, self.block)
        absmax = block_amax(blocks)
        shares = blocks * (1.0 / absmax.clamp(min=SMALLEST_AMAX)).unsqueeze(-1)
        return {"codes": table(self.quant_type, rows.device).pack(shares), "absmax": absmax.flatten()}

    @property
    def in_two_steps(self) -> bool:
        return self.scale == "mse"

    def scales(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> Scales:
        weights = block_weights(statistics.second_moment, self.block, rows.device)
        blocks = Blocks(in_blocks(rows, self.block), table(self.quant_type, rows.device), weights)
        if not self.double_quant:
            return (blocks.search(blocks.plain, lambda wanted: wanted.clamp(max=FLOAT32_MAX)),)
        levels = Levels.of(survey)
        return (blocks.search(levels.read(survey.rowwise["absmax"]), levels.nearest),)

    def nearest(self, weights: Tensor, scales: Scales, survey: Survey) -> Tensor:
        return read_back(table(self.quant_type, weights.device).numbers, weights, scales[0])

    def store(self, rows: Tensor, scales: Scales, survey: Survey) -> dict[str, Tensor]:
        blocks = Blocks(in_blocks(rows, self.block), table(self.quant_type, rows.device), None)
        absmax = Levels.of(survey).codes(scales[0]) if self.double_quant else scales[0]
        return {"codes": blocks.codes(scales[0]), "absmax": absmax.flatten()}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        """dequantize_4bit bit for bit."""
        columns = weight.shape[1]
        codes = stored["codes"].view(weight.shape[0], -1)[start:stop]
        absmax = self._absmax(stored, start * columns // self.block, stop * columns // self.block)
        numbers = looked_up(codes, stored["quant_map"], high_first=True)
        return in_blocks(numbers, self.block).mul_(absmax.view(stop - start, -1, 1)).flatten(1)

    def _absmax(self, stored: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        """Of blocks [start, stop), float32; 8 bits of the largest may round beyond it."""
        found = stored["absmax"][start:stop]
        if not self.double_quant:
            return found
        read_mean = _mean_in_graphs if torch.compiler.is_compiling() else _mean_absmax
        blocks = torch.arange(start, stop, dtype=torch.int32, device=found.device) // NESTED_BLOCK
        found = stored["nested_quant_map"].index_select(0, found.int())
        nested = stored["nested_absmax"].index_select(0, blocks)
        return found.mul_(nested).add_(read_mean(stored["quant_state"])).clamp_(max=FLOAT32_MAX)

    def record(self, weight: TensorSpec) -> NativeRecord:
        names = {suffix: f"weight.{suffix}" for suffix in self.outputs(weight)}
        names |= {"codes": "weight", "quant_state": f"weight.quant_state.bitsandbytes__{self.quant_type}"}
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
        return NativeRecord(names=names, config=config)

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        if not x.is_cuda:
            return super().linear(x, stored, weight, bias)
        bias = None if bias is None else bias.to(x.dtype)
        result: Tensor = bnb.matmul_4bit(x, stored["codes"], self.quant_state(stored, weight, x.dtype), bias=bias)
        return result

    def quant_state(self, stored: Mapping[str, Tensor], weight: TensorSpec, dtype: torch.dtype) -> QuantState:
        """bitsandbytes' view of the stored tensors, which decodes to `dtype`."""
        nested = None
        if self.double_quant:
            nested = QuantState(
                absmax=stored["nested_absmax"],
                code=stored["nested_quant_map"],
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        return QuantState(
            absmax=stored["absmax"],
            shape=torch.Size(weight.shape),
            code=stored["quant_map"],
            blocksize=self.block,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=_mean_absmax(stored["quant_state"]) if self.double_quant else None,
            state2=nested,
        )


@dataclasses.dataclass(frozen=True)
class Levels:
    """What the 8 bits of the second level can stand for: number · nested + mean, for each block [n, b]."""

    numbers: Tensor  # [256], ascending
    nested: Tensor  # largest |absmax - mean| of the 256 blocks around, [n, b]
    mean: Tensor

    @classmethod
    def of(cls, survey: Survey) -> Self:
        nested = survey.rowwise["nested"]
        return cls(survey.outputs["nested_quant_map"].to(nested.device), nested, survey.facts["mean"])

    def read(self, codes: Tensor) -> Tensor:
        scales = self.numbers.index_select(0, codes.flatten().int()).view_as(self.nested)
        return scales.mul_(self.nested).add_(self.mean).clamp_(max=FLOAT32_MAX)

    def codes(self, scales: Tensor) -> Tensor:
        bounds = (self.numbers[1:] + self.numbers[:-1]) / 2
        shares = (scales - self.mean) / self.nested.clamp(min=SMALLEST_NUMBER)
        return torch.bucketize(shares, bounds).to(torch.uint8)

    def nearest(self, scales: Tensor) -> Tensor:
        return self.read(self.codes(scales))


def _searched(packed: dict[str, Tensor], mean: Tensor, weight: TensorSpec) -> Survey:
    """The second level is that of the plain scales, so that each of them stays within reach of the search."""
    plain = packed.pop("absmax")
    nested = packed["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(plain)]
    rowwise = {"absmax": plain.reshape(weight.shape[0], -1), "nested": nested.reshape(weight.shape[0], -1)}
    return Survey(outputs=packed, facts={"mean": mean}, rowwise=rowwise)


def _padded(quant_state: Tensor) -> Tensor:
    """JSON readers skip the spaces that fill it up."""
    padded = torch.full((QUANT_STATE_BYTES,), ord(" "), dtype=torch.uint8)
    padded[: len(quant_state)] = quant_state
    return padded


def _mean(absmax: Tensor) -> Tensor:
    """The plain mean, and where its sum overflows that of the same numbers in larger units."""
    mean, unit = absmax.mean(), 2.0**32
    return torch.where(mean.isfinite(), mean, torch.minimum((absmax / unit).mean() * unit, absmax.amax()))


@torch.library.custom_op("bitroute::mean_absmax", mutates_args=())
def _mean_in_graphs(quant_state: Tensor) -> Tensor:
    """The same for graphs of torch.compile, which may overwrite what they are given."""
    return _mean_absmax(quant_state).clone()


@_mean_in_graphs.register_fake
def _(quant_state: Tensor) -> Tensor:
    return quant_state.new_empty((), dtype=torch.float32)


def _mean_absmax(quant_state: Tensor) -> Tensor:
    """The number that hides in the JSON; of a tensor on a GPU, for which every reading would wait, it is kept."""
    if quant_state.device.type == "cpu" or quant_state.is_inference():  # no version tells of all changes
        return _read_mean(quant_state)
    version = quant_state._version, quant_state.data_ptr()
    if quant_state not in _means or _means[quant_state][0] != version:
        _means[quant_state] = version, _read_mean(quant_state)
    found: Tensor = _means[quant_state][1]
    return found


def _read_mean(quant_state: Tensor) -> Tensor:
    mean = unpack_tensor_to_dict(quant_state)["nested_offset"]
    return torch.tensor(mean, dtype=torch.float32, device=quant_state.device)
