"""The contract between a format and everything else.

A weight reaches a backend as rows: [out, in] for a linear layer, [out, in·kernel] for a convolution. The job
calls `survey` once over all blocks of rows for what needs the whole tensor, then `encode` for each block.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from bitroute.backends import Kind
from bitroute.errors import BackendError, Problem, did_you_mean

CODES = {  # as safetensors headers spell dtypes
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
ARITHMETIC_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what `encode` reads
BLOCK_ELEMENTS = 384 * 1024  # a block of rows and its temporaries stay in the cache
DECODED_ELEMENTS = 512 * 1024  # the same where rows are decoded
PART_ELEMENTS = 4 * 2**20  # and multiplied: enough for a fast product, and freed memory of this size is used again
DEVICE_ELEMENTS = 16 * 2**20  # both where the device is not the CPU, and every launch costs
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [..., in], weight [out, in], bias → [..., out]
REGISTRY: dict[str, type[Backend]] = {}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> TensorSpec:
        """The same weight as the backends see it: [out, everything else]."""
        return TensorSpec((self.shape[0] if self.shape else 1, math.prod(self.shape[1:])), self.dtype)


@dataclass(frozen=True)
class Statistics:
    """What calibration measured of a layer's input x [rows, in]; float32, None where it was not measured."""

    second_moment: Tensor | None = None  # E[x²] per channel, [in]
    absmax: Tensor | None = None  # max |x| per channel, [in]
    hessian: Tensor | None = None  # E[x xᵀ], [in / b, b, b]: blocks of channels on its diagonal
    inputs: Tensor | None = None  # some rows of x themselves, [sample, in], in the dtype that they had


NONE = Statistics()


@dataclass(frozen=True)
class Survey:
    """What only the whole tensor tells."""

    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # stored as they are, complete
    facts: Mapping[str, Tensor] = field(default_factory=dict)  # read by `encode`, stored nowhere
    rowwise: Mapping[str, Tensor] = field(default_factory=dict)  # the same, [out, …]: `encode` gets those of its rows

    def of_rows(self, start: int, stop: int) -> Survey:
        if not self.rowwise:
            return self
        return dataclasses.replace(self, rowwise={name: fact[start:stop] for name, fact in self.rowwise.items()})


@dataclass(frozen=True)
class NativeRecord:
    """How the format's own library names and describes one weight in its checkpoint folder.

    names: output suffix → tensor name below the layer ("qdata" → "_weight_qdata").
    header: the record that the safetensors header carries for the weight, if the library wants one.
    config: what the folder's `quantization_config` says about such a weight.
    """

    names: Mapping[str, str]
    header: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class Backend(ABC):
    """One format with its options; subclasses are frozen pydantic dataclasses whose fields are the options."""

    name: str  # as recipes spell it; this and what follows belong to the class of a format
    family: str  # the native container: torchao, bitsandbytes_4bit, bitsandbytes_8bit, quanto, bitroute
    needs: frozenset[str] = frozenset()  # packages that encode and decode
    lowest_sqnr_db: float  # a healthy weight never decodes worse than this; verify fails below it
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # every concrete backend is a dataclass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            REGISTRY[cls.name] = cls

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Raises BackendError that lists every bad option at once."""
        known = [option.name for option in dataclasses.fields(cls)]
        problems = [
            Problem(
                f"backend {cls.name!r} has no option {option!r}",
                expected=f"one of {', '.join(known)}" if known else "no options",
                next_step=did_you_mean(option, known),
            )
            for option in options
            if option not in known
        ]
        try:
            backend = TypeAdapter(cls).validate_python({k: v for k, v in options.items() if k in known})
        except ValidationError as error:
            problems += [_bad_option(cls.name, dict(detail)) for detail in error.errors()]
        if problems:
            raise BackendError(problems)
        return backend

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        fields = dataclasses.fields(self)
        values = {option.name: getattr(self, option.name) for option in fields}
        return {option.name: values[option.name] for option in fields if values[option.name] != option.default}

    def __str__(self) -> str:
        """As a person writes it: `nvfp4 (scale mse)`."""
        said = ", ".join(f"{option} {value}" for option, value in self.options.items())
        return f"{self.name} ({said})" if said else self.name

    @property
    def kind(self) -> Kind | None:
        """What a profile's keep list must know of the format; None where it loses nothing."""
        if self.name == "keep":
            return None
        weight = TensorSpec((256, 256), torch.bfloat16)
        bits = 8 * sum(spec.size_bytes for spec in self.outputs(weight).values()) / weight.numel
        if bits < 7:
            return "4-bit"
        return "w8a8" if self.quantizes_activations else "8-bit"

    @property
    def quantizes_activations(self) -> bool:
        """Whether the layer rounds its input too, so that the decoded weight alone does not tell its error."""
        return getattr(self, "activations", "none") != "none"

    @property
    def measured(self) -> frozenset[str]:
        """The kinds of statistics that it cannot encode without."""
        return frozenset()

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why this format cannot hold such a weight ([out, in]), or None; what no format can hold is refused here."""
        if not weight.dtype.is_floating_point:
            return f"its weight is {weight.dtype}, not a float"
        return f"its weight is empty, {list(weight.shape)}" if weight.numel == 0 else None

    def refuse_statistics(self, measured: Mapping[str, TensorSpec]) -> str | None:
        """Why it cannot encode by what was measured, which fits the weight: kind → its form; None where it can."""
        return None

    def refuse_convolution(self) -> str | None:
        """Why this format cannot hold the weight of a convolution, or None where it decodes it as any other."""
        return f"{self.name} holds linear layers only"

    @abstractmethod
    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        """Suffix → what will be stored for a weight [out, in]; exact, so that a plan needs no data."""

    def on_meta(self, weight: TensorSpec) -> dict[str, Tensor]:
        """The outputs as tensors without data, for records and for layers that are still to be loaded."""
        return {
            suffix: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            for suffix, spec in self.outputs(weight).items()
        }

    def rows_multiple(self, weight: TensorSpec) -> int:
        """Every block but the last must be a multiple of so many rows."""
        return 1

    def arithmetic(self, rows: Tensor) -> Tensor:
        """A block of any float dtype as `survey` and `encode` read it: bf16, fp16 and fp32 as they are, others as fp32.

        Raises:
            BackendError: a finite float64 is too large for fp32.
        """
        return rows if rows.dtype in ARITHMETIC_DTYPES else cast(rows, torch.float32)

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        """Look at the whole tensor once. Formats whose blocks stand alone leave `blocks` unread."""
        return Survey()

    @abstractmethod
    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        """A block of rows [n, in] (bf16, fp16 or fp32, finite) → its part of each row-wise output.

        Parts of consecutive blocks, concatenated along dimension 0, are the stored tensor; outputs that
        `survey` already completed are not repeated.
        """

    @property
    def pending(self) -> frozenset[str]:
        """Row-wise outputs that `encode` gives in a form that only `conclude` makes what is stored."""
        return frozenset()

    def conclude(self, pending: Mapping[str, Tensor], weight: TensorSpec) -> dict[str, Tensor]:
        """Of all rows, what is pending → what is stored for it; it saves a second look at the weight."""
        return {}

    @abstractmethod
    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight [out, in] that the stored tensors stand for, float32, in one go."""

    def decode(
        self,
        stored: Mapping[str, Tensor],
        weight: TensorSpec,
        dtype: torch.dtype = torch.float32,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """What the stored tensors stand for, rounded once to `dtype`: the weight [out, in], or some rows of it.

        It goes by blocks that stay in the cache; a graph of torch.compile takes all at once, and fuses that.
        """
        first, last = rows or (0, weight.shape[0])
        if torch.compiler.is_compiling():
            return self.decode_rows(stored, weight, first, last).to(dtype)
        device = next(iter(stored.values())).device
        found = torch.empty((last - first, weight.shape[1]), dtype=dtype, device=device)
        for start, stop in _spans(first, last, _elements(DECODED_ELEMENTS, device) // weight.shape[1]):
            found[start - first : stop - first] = self.decode_rows(stored, weight, start, stop)
        return found

    def importance(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """What the errors of each input channel [in] are multiplied by before they are judged; None for all alike."""
        return None

    def record(self, weight: TensorSpec) -> NativeRecord | None:
        """How the native container stores it, or None where only the bitroute container can run it."""
        return None

    def working_bytes(self, weight: TensorSpec) -> int:
        """What `survey` and `encode` hold at most beside blocks: all but the codes, as floats, and once more."""
        outputs = [spec.size_bytes for spec in self.outputs(weight).values()]
        return 8 * (sum(outputs) - max(outputs, default=0))

    def gpu_to_compute(self) -> str:
        """The smallest GPU whose arithmetic units run this format; empty where any device does."""
        return ""

    def emulates(self, device: torch.device) -> bool:
        """Whether `linear` quantizes activations, but multiplies decoded numbers on such a device (_emulation.py)."""
        return False

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        """x [..., in] through the stored weight, in the dtype of x."""
        bias = None if bias is None else bias.to(x.dtype)
        return self.multiplied(x, stored, weight, bias, functional.linear, x.dtype)

    def multiplied(
        self,
        x: Tensor,
        stored: Mapping[str, Tensor],
        weight: TensorSpec,
        bias: Tensor | None,
        multiply: Multiply,
        dtype: torch.dtype,
    ) -> Tensor:
        """`multiply` with the weight in `dtype`, some rows after others: never more of it in memory than these."""
        rows, columns = weight.shape
        step = _elements(PART_ELEMENTS, x.device) // columns
        if rows <= step or torch.compiler.is_compiling():
            return multiply(x, self.decode(stored, weight, dtype), bias)
        parts = [
            multiply(x, self.decode(stored, weight, dtype, span), None if bias is None else bias[slice(*span)])
            for span in _spans(0, rows, step)
        ]
        return torch.cat(parts, dim=-1)

    def attach(self, layer: nn.Module, stored: Mapping[str, Tensor]) -> nn.Module:
        """The linear layer or convolution that runs from `stored` (meta tensors while a checkpoint is being loaded)."""
        from bitroute.backends.layers import QuantizedConvolution, QuantizedLinear

        if isinstance(layer, nn.Linear):
            return QuantizedLinear(self, layer, stored)
        return QuantizedConvolution(self, layer, stored)

    def quantize(self, weight: Tensor, statistics: Statistics = NONE) -> dict[str, Tensor]:
        """A whole weight [out, in] at once, by the same blocks that a job would use.

        Raises:
            BackendError: the format cannot hold a weight of that shape, or values as large as these.
        """
        spec = TensorSpec(tuple(weight.shape), weight.dtype)
        refusal = self.refuse(spec)
        if refusal:
            raise BackendError(Problem(f"backend {self.name!r} cannot hold the weight", got=refusal))
        survey = self.survey(self.blocks(weight), spec, statistics)
        bounds = self.block_bounds(spec)
        parts = [
            self.encode(rows, survey.of_rows(start, stop), statistics)
            for (start, stop), rows in zip(bounds, self.blocks(weight), strict=True)
        ]
        rowwise = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
        pending = {suffix: rowwise.pop(suffix) for suffix in self.pending}
        return {**survey.outputs, **rowwise, **self.conclude(pending, spec)}

    def blocks(self, weight: Tensor) -> Iterator[Tensor]:
        """The rows of a weight [out, in] as `encode` reads them: contiguous and without a gradient."""
        spec = TensorSpec(tuple(weight.shape), weight.dtype)
        for start, stop in self.block_bounds(spec):
            yield self.arithmetic(weight.detach()[start:stop].contiguous())

    def block_bounds(self, weight: TensorSpec) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the weight, each about BLOCK_ELEMENTS elements; without rows a single empty one."""
        rows, columns = weight.shape
        multiple = self.rows_multiple(weight)
        step = max(multiple, BLOCK_ELEMENTS // max(columns, 1) // multiple * multiple)
        for start in range(0, max(rows, 1), step):
            yield start, min(start + step, rows)


def _elements(count: int, device: torch.device) -> int:
    return count if device.type == "cpu" else DEVICE_ELEMENTS


def _spans(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, max(1, step)):
        yield start, min(start + max(1, step), last)


KEEP_IT = "keep the layer as it is in the source: backend keep, dtype source"


def cast(rows: Tensor, dtype: torch.dtype, next_step: str = KEEP_IT) -> Tensor:
    """The rows in another float dtype.

    Raises:
        BackendError: a finite value would become infinite.
    """
    found = rows.to(dtype)
    widens = found is rows or torch.finfo(dtype).max >= torch.finfo(rows.dtype).max
    if widens or not (infinite := found.isinf()).any():
        return found
    before = rows.cpu().double()  # the only dtype that holds all others and can tell what is finite
    lost = before[infinite.cpu() & before.isfinite()]
    if len(lost):
        raise BackendError(
            Problem(
                f"{lost[0].item():g} does not fit {str(dtype).removeprefix('torch.')}",
                expected=f"values up to {torch.finfo(dtype).max:g}",
                next_step=next_step,
            )
        )
    return found


def _bad_option(backend: str, detail: Mapping[str, Any]) -> Problem:
    option = ".".join(str(part) for part in detail["loc"]) or "options"
    return Problem(
        f"backend {backend!r}: option {option!r} is not valid",
        got=repr(detail["input"])[:100],
        expected=str(detail["msg"]),
    )
