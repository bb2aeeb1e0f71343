"""What is done to a weight before a format rounds it, with any format.

x Wᵀ = (x S⁻¹ R) (Q + U V)ᵀ with Q + U V = W S R: S scales channels (smoothing), R rotates blocks of them, U V is a
branch of low rank, and Q is stored in the format, rounded with error compensation if asked. The layer applies S⁻¹ and R
to its input. GPTQ alone changes nothing in what is stored: the result is the format's own, in its native container.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional

from bitroute.backends import Kind
from bitroute.backends._compensation import compensated, factor, order
from bitroute.backends._low_rank import DTYPE as LOW_RANK_DTYPE
from bitroute.backends._low_rank import split
from bitroute.backends._rotation import rotate, rotate_hessian, rotate_second_moment
from bitroute.backends._rounded import Rounded
from bitroute.backends._smoothing import divide_hessian, smoothing
from bitroute.backends.base import NONE, Backend, NativeRecord, Statistics, Survey, TensorSpec
from bitroute.errors import BackendError, Problem, did_you_mean

SMOOTH, UP, DOWN = "smooth", "low_rank_up", "low_rank_down"  # suffixes of what is stored beside the format's own
HESSIAN, ORDER, FACTORS, SECOND_MOMENT = "method.hessian", "method.order", "method.factors", "method.second_moment"
KINDS = ("absmax", "second_moment", "hessian", "inputs")
LOWEST_SQNR_DB = 3.0  # of a weight that is rounded for its inputs: where they are small, its errors are large
COMPENSATED_ELEMENTS = 4 * 2**20  # of a block of rows: channels are rounded one by one, for many rows at once


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Method:
    """rotate: channels in a block. smooth: how much of the input's range moves into the weight. low_rank: the rank."""

    rotate: Literal[16, 32, 64, 128] | None = None
    smooth: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    low_rank: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = None
    gptq: Annotated[bool, Field(strict=True)] = False

    @property
    def said(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @property
    def stores(self) -> bool:
        """Whether the layer must do more than the format's own."""
        return bool(self.rotate or self.smooth or self.low_rank)


def with_method(backend: Backend, method: object) -> Backend:
    """The backend with a method, as a recipe says it: {"rotate": 32, "gptq": True}; alone where that is empty.

    Raises:
        BackendError: an unknown method, a value it does not take, or GPTQ with a format that cannot.
    """
    try:
        found = TypeAdapter(Method).validate_python(method)
    except ValidationError as error:
        raise BackendError([_bad_method(dict(detail)) for detail in error.errors()]) from None
    if not found.said:
        return backend
    if backend.name == "keep":
        raise BackendError(Problem("backend 'keep' takes no method", "method", got=", ".join(found.said)))
    if found.gptq and not (isinstance(backend, Rounded) and backend.in_two_steps):
        raise BackendError(_no_gptq(backend))
    return Transformed(backend, found)


@dataclasses.dataclass(frozen=True)
class Transformed(Backend):
    """A format behind a method; `name`, `needs` and the like are the format's."""

    inner: Backend
    method: Method

    def __post_init__(self) -> None:
        for name in ("name", "family", "needs", "lowest_sqnr_db"):
            object.__setattr__(self, name, getattr(self.inner, name))
        if self.method.gptq or self.method.smooth:
            object.__setattr__(self, "lowest_sqnr_db", LOWEST_SQNR_DB)

    @property
    def options(self) -> dict[str, Any]:
        return {**self.inner.options, "method": self.method.said}

    @property
    def kind(self) -> Kind | None:
        return self.inner.kind

    @property
    def quantizes_activations(self) -> bool:
        return self.inner.quantizes_activations

    @property
    def measured(self) -> frozenset[str]:
        asked = {"absmax": self.method.smooth, "hessian": self.method.gptq}
        found = self.inner.measured | {kind for kind, wanted in asked.items() if wanted}
        rotated = self.method.rotate and "absmax" in self.inner.measured  # only samples tell how large those get
        return found | {"inputs"} if rotated else found

    def __str__(self) -> str:
        method = [name if value is True else f"{name} {value}" for name, value in self.method.said.items()]
        said = [f"{option} {value}" for option, value in self.inner.options.items()]
        return f"{self.name} ({', '.join([*said, *method])})"

    def working_bytes(self, weight: TensorSpec) -> int:
        """Low rank: the weight, the rest, what is read back of it, the next target and one more, in float32.

        Smoothing holds the weight as it is; GPTQ larger blocks, with what searching scales and rounding take of each.
        """
        whole = weight.size_bytes if self.method.smooth or self.method.low_rank else 0
        compensated = 48 * COMPENSATED_ELEMENTS if self.method.gptq else 0
        inside = 20 * weight.numel if self.method.low_rank else self.inner.working_bytes(_inside(weight))
        return whole + compensated + inside

    def refuse(self, weight: TensorSpec) -> str | None:
        rows, columns = weight.shape
        if self.method.rotate and columns % self.method.rotate:
            return f"{columns} input features are not a multiple of {self.method.rotate}, the block to rotate"
        if self.method.low_rank and self.method.low_rank > min(rows, columns):
            return f"its rank is at most {min(rows, columns)}, not {self.method.low_rank}"
        return super().refuse(weight) or self.inner.refuse(_inside(weight))

    def refuse_statistics(self, measured: Mapping[str, TensorSpec]) -> str | None:
        hessian, block = measured.get("hessian"), self.method.rotate
        if hessian and block and hessian.shape[1] % block:
            return f"its Hessian has blocks of {hessian.shape[1]}, no multiple of {block}, the block to rotate"
        return None

    def refuse_convolution(self) -> str | None:
        return self.inner.refuse_convolution()

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        (rows, columns), rank = weight.shape, self.method.low_rank
        found = self.inner.outputs(_inside(weight))
        if self.method.smooth:
            found[SMOOTH] = TensorSpec((columns,), torch.float32)
        if rank:
            found |= {UP: TensorSpec((rows, rank), LOW_RANK_DTYPE), DOWN: TensorSpec((rank, columns), LOW_RANK_DTYPE)}
        return found

    def rows_multiple(self, weight: TensorSpec) -> int:
        return self.inner.rows_multiple(_inside(weight))

    def block_bounds(self, weight: TensorSpec) -> Iterator[tuple[int, int]]:
        """Larger blocks for GPTQ, whose time goes by channels."""
        if not self.method.gptq:
            yield from super().block_bounds(weight)
            return
        rows, columns = weight.shape
        multiple = self.rows_multiple(weight)
        step = max(multiple, COMPENSATED_ELEMENTS // max(columns, 1) // multiple * multiple)
        yield from ((start, min(start + step, rows)) for start in range(0, max(rows, 1), step))

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        """A branch of low rank takes the whole weight in float32, several times; the others take blocks."""
        self._check(statistics)
        blocks = list(blocks) if self.method.smooth or self.method.low_rank else blocks
        mine = Survey()
        if self.method.smooth and statistics.absmax is not None:
            mine = Survey(outputs={SMOOTH: smoothing(blocks, statistics.absmax, self.method.smooth)})
        statistics = self._measured_inside(statistics, mine)
        rows: Iterable[Tensor] = (self._into(block, mine) for block in blocks)
        if self.method.low_rank:
            whole = torch.cat(list(rows))
            blocks = []
            up, down = split(whole, self.method.low_rank, statistics.second_moment, self._round_trip(statistics))
            mine = dataclasses.replace(mine, outputs={**mine.outputs, DOWN: down}, rowwise={UP: up})
            rows = torch.split(_fitting(whole - up.float() @ down.float()), _rows_of_block(whole))
        inner = self.inner.survey(rows, _inside(weight), statistics)
        return Survey(
            {**inner.outputs, **mine.outputs},
            {**inner.facts, **self._facts(statistics)},
            {**inner.rowwise, **mine.rowwise},
        )

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        rows = self._into(rows, survey)
        branch = {}
        if self.method.low_rank:
            branch = {UP: survey.rowwise[UP]}
            rows = _fitting(rows - branch[UP].float() @ survey.outputs[DOWN].float())
        inside = Statistics(second_moment=survey.facts.get(SECOND_MOMENT))
        if not self.method.gptq:
            return {**self.inner.encode(rows, survey, inside), **branch}
        return {**self._compensate(rows, survey, inside), **branch}

    @property
    def pending(self) -> frozenset[str]:
        return self.inner.pending

    def conclude(self, pending: Mapping[str, Tensor], weight: TensorSpec) -> dict[str, Tensor]:
        return self.inner.conclude(pending, _inside(weight))

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        decoded = self.inner.decode_rows(stored, _inside(weight), start, stop)
        if self.method.low_rank:
            decoded = decoded.addmm(stored[UP][start:stop].float(), stored[DOWN].float())
        if self.method.rotate:
            decoded = rotate(decoded, self.method.rotate)
        return decoded / stored[SMOOTH] if self.method.smooth else decoded

    def importance(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """Smoothed channels are rounded as W S, and their inputs divided by S."""
        return stored[SMOOTH] if self.method.smooth else self.inner.importance(stored)

    def record(self, weight: TensorSpec) -> NativeRecord | None:
        return None if self.method.stores else self.inner.record(weight)

    def gpu_to_compute(self) -> str:
        return self.inner.gpu_to_compute()

    def emulates(self, device: torch.device) -> bool:
        return self.inner.emulates(device)

    def linear(self, x: Tensor, stored: Mapping[str, Tensor], weight: TensorSpec, bias: Tensor | None) -> Tensor:
        """The branch of low rank reads the input before it is quantized."""
        if self.method.smooth:
            x = (x.float() / stored[SMOOTH]).to(x.dtype)
        if self.method.rotate:
            x = rotate(x, self.method.rotate).to(x.dtype)
        found = self.inner.linear(x, stored, _inside(weight), bias)
        if not self.method.low_rank:
            return found
        return found + functional.linear(functional.linear(x, stored[DOWN].to(x.dtype)), stored[UP].to(x.dtype))

    def _check(self, statistics: Statistics) -> None:
        missing = sorted(kind for kind in self.measured if getattr(statistics, kind) is None)
        if missing:
            raise BackendError(
                Problem(
                    f"{self.name} with {', '.join(self.method.said)} has no statistics to go by",
                    got=f"no {', '.join(missing)} for this layer",
                    next_step="`quantize calibrate MODEL --prompts SET --out FILE`, then `--statistics FILE`",
                )
            )

        found = {kind: getattr(statistics, kind) for kind in self.measured}
        forms = {kind: TensorSpec(tuple(tensor.shape), tensor.dtype) for kind, tensor in found.items()}
        if refusal := self.refuse_statistics(forms):
            raise BackendError(Problem(f"{self} cannot use these statistics", got=refusal))

    def _into(self, rows: Tensor, survey: Survey) -> Tensor:
        """Rows of W as rows of W S R, float32.

        Raises:
            BackendError: a product does not fit float32.
        """
        rows = rows.float()
        if self.method.smooth:
            rows = rows * survey.outputs[SMOOTH].to(rows.device)
        if self.method.rotate:
            rows = rotate(rows, self.method.rotate)
        return _fitting(rows) if self.method.smooth or self.method.rotate else rows

    def _measured_inside(self, statistics: Statistics, survey: Survey) -> Statistics:
        """Of x S⁻¹ R; how large a rotated input gets, only samples of it tell."""
        if self.method.smooth:
            statistics = _smoothed(statistics, survey.outputs[SMOOTH].cpu())
        if self.method.rotate:
            statistics = _rotated(statistics, self.method.rotate)
        if statistics.hessian is None:
            return statistics
        moment = statistics.hessian.diagonal(dim1=1, dim2=2).flatten().clamp(min=0)
        return dataclasses.replace(statistics, second_moment=moment)

    def _facts(self, inside: Statistics) -> dict[str, Tensor]:
        facts = {} if inside.second_moment is None else {SECOND_MOMENT: inside.second_moment}
        if self.method.gptq and inside.hessian is not None:
            channels = order(inside.hessian)
            facts |= {HESSIAN: inside.hessian, ORDER: channels, FACTORS: factor(inside.hessian, channels)}
        return facts

    def _round_trip(self, inside: Statistics) -> Any:
        def through(rest: Tensor) -> Tensor:
            return self.inner.decode(
                self.inner.quantize(_fitting(rest), inside), TensorSpec(tuple(rest.shape), rest.dtype)
            )

        return through

    def _compensate(self, rows: Tensor, survey: Survey, inside: Statistics) -> dict[str, Tensor]:
        format = self.inner
        assert isinstance(format, Rounded)
        scales = format.scales(rows, survey, inside)
        columns = rows.shape[1] // scales[0].shape[1]

        def nearest(weights: Tensor, channels: Tensor) -> Tensor:
            blocks = channels // columns
            return format.nearest(weights, tuple(scale[:, blocks] for scale in scales), survey)

        hessian, channels, factors = (survey.facts[name].to(rows.device) for name in (HESSIAN, ORDER, FACTORS))
        return format.store(compensated(rows, hessian, channels, factors, nearest), scales, survey)


def _fitting(rows: Tensor) -> Tensor:
    """Raises BackendError where a method has made more than float32 holds of them."""
    if not rows.sum().isfinite() and not rows.isfinite().all():
        raise BackendError(Problem("the weight does not fit float32 once its method has changed it",
                                   next_step="give the layer a rule without that method"))  # fmt: skip
    return rows


def _inside(weight: TensorSpec) -> TensorSpec:
    """What the format is given."""
    return TensorSpec(weight.shape, torch.float32)


def _rows_of_block(weight: Tensor) -> int:
    return max(1, COMPENSATED_ELEMENTS // weight.shape[1])


def _smoothed(statistics: Statistics, smooth: Tensor) -> Statistics:
    absmax, moment, hessian, inputs = (getattr(statistics, kind) for kind in KINDS)
    return Statistics(
        absmax=None if absmax is None else absmax / smooth,
        second_moment=None if moment is None else moment / smooth.square(),
        hessian=None if hessian is None else divide_hessian(hessian, smooth),
        inputs=None if inputs is None else inputs.float() / smooth,
    )


def _rotated(statistics: Statistics, block: int) -> Statistics:
    moment, hessian = statistics.second_moment, statistics.hessian
    inputs = None if statistics.inputs is None else rotate(statistics.inputs, block)
    return Statistics(
        absmax=None if inputs is None else inputs.abs().amax(0),
        second_moment=None if moment is None else rotate_second_moment(moment, block),
        hessian=None if hessian is None or hessian.shape[1] % block else rotate_hessian(hessian, block),
        inputs=inputs,
    )


def _bad_method(detail: Mapping[str, Any]) -> Problem:
    name, got = ".".join(map(str, detail["loc"])), repr(detail["input"])[:200]
    if detail["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(Method)]
        return Problem(f"no method {name[:40]!r}", "method", "", ", ".join(known), did_you_mean(name[:40], known))
    if not name:
        return Problem("'method' is not valid", "method", got, "a mapping such as {rotate: 32, gptq: true}")
    return Problem(f"method: {name!r} is not valid", "method", got, str(detail["msg"]).removeprefix("Input should be "))


def _no_gptq(backend: Backend) -> Problem:
    return Problem(
        f"{backend.name} cannot be rounded with error compensation (gptq)", "method",
        got="scales and codes that its library makes at once",
        expected="a format that rounds weight by weight: nvfp4, mxfp4, int4, codebook4, or nf4 with scale: mse",
        next_step="say `scale: mse`" if isinstance(backend, Rounded) else "leave gptq out, or take one of these",
    )  # fmt: skip
