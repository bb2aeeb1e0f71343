"""A quantized component read as a plain one: every quantized weight is decoded each time it is read.

What a weight was made of says the record of our own checkpoints (`bitroute.json` beside the component), and for
others their config and headers (foreign). Only names, shapes and a few bytes are read before the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bitroute.backends.base import TensorSpec, cast
from bitroute.convert.checkpoint import Component
from bitroute.convert.layout import DerivedTensor, StoredTensor
from bitroute.convert.reading import read_json
from bitroute.convert.record import RecordedComponent, RecordedEntry, read_record
from bitroute.convert.schema import Dequantize
from bitroute.errors import BitrouteError, Problem, SourceError

DTYPES = {True: torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers 5 and 4
RECORD = "bitroute.json"
LARGER = "decode to a dtype that holds it: --dtype fp32"
SHOWN = 20  # problems of one component that an error lists
Decode = Callable[[Mapping[str, Tensor]], Tensor]  # part → its tensor, to the weight in its own shape


@dataclass(frozen=True)
class DecodedComponent(Component):
    """Its tensors are floats: `dequantize` True decodes to bf16 and leaves the others, a dtype is that of all."""

    dequantize: Dequantize = True

    @cached_property
    def config(self) -> dict[str, Any]:
        config = read_json(self.folder / "config.json")
        config.pop("quantization_config", None)
        if self.library == "transformers" and isinstance(self.dequantize, str) and self._holds_only(self.dequantize):
            return {"dtype": self.dequantize, **_with_dtype(config, self.dequantize)}
        return config

    def _holds_only(self, dtype: Dequantize) -> bool:
        found = {tensor.spec.dtype for tensor in self.tensors.values()}
        return {kind for kind in found if kind.is_floating_point} == {DTYPES[dtype]}


def decoded(component: Component, dequantize: Dequantize) -> Component:
    """The component as its weights decode; one that is not quantized stays as it is."""

    def view(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        if not is_quantized(component):
            return stored
        found = _decode(component, stored, DTYPES[dequantize])
        return found if dequantize is True else as_floats(found, DTYPES[dequantize])

    same = {field.name: getattr(component, field.name) for field in fields(component)}
    return DecodedComponent(**{**same, "views": (*component.views, view)}, dequantize=dequantize)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Also of the configs in it, such as `text_config`."""
    return {
        key: dtype if key in DTYPE_KEYS else _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def is_quantized(component: Component) -> bool:
    """By its own config, or by stored tensors of one byte that are no truth values."""
    if read_json(component.folder / "config.json").get("quantization_config"):
        return True
    tensors = [tensor for header in component.headers.values() for tensor in header.tensors.values()]
    return any(tensor.spec.dtype.itemsize == 1 and tensor.spec.dtype != torch.bool for tensor in tensors)


def derive(
    name: str, parts: Mapping[str, StoredTensor], shape: Sequence[int], dtype: torch.dtype, decode: Decode
) -> DerivedTensor:
    """A weight of `shape` that `decode` makes of its parts, cast to `dtype`.

    Reading it raises BackendError where a value does not fit the dtype, SourceError where the parts decode to nothing.
    """
    keys, stored = tuple(parts), tuple(parts.values())

    def compute(*tensors: Tensor) -> Tensor:
        try:
            return cast(decode(dict(zip(keys, tensors, strict=True))), dtype, next_step=LARGER)
        except BitrouteError:
            raise
        except Exception as error:  # libraries raise whatever they like on bytes that are not theirs
            raise SourceError(undecodable(stored[0], name, f"{type(error).__name__}: {error}"[:200])) from error

    return DerivedTensor(name, TensorSpec(tuple(shape), dtype), stored[0].file, stored[0].offset, stored, compute)


def as_floats(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """All floats in one dtype; integers and truth values are no weights and stay."""
    return {
        name: derive(name, {"": tensor}, tensor.spec.shape, dtype, lambda parts: parts[""])
        if tensor.spec.dtype.is_floating_point and tensor.spec.dtype != dtype
        else tensor
        for name, tensor in stored.items()
    }


def undecodable(tensor: StoredTensor, name: str, got: str, expected: str = "") -> Problem:
    return Problem(
        f"the weight {name!r} cannot be decoded", str(tensor.file), got, expected,
        next_step="the file is damaged or was edited: download or write it again",
    )  # fmt: skip


def raise_all(problems: Sequence[Problem]) -> None:
    if problems:
        raise SourceError(problems[:SHOWN])


def _decode(component: Component, stored: dict[str, StoredTensor], dtype: torch.dtype) -> dict[str, StoredTensor]:
    folder = component.root
    if (folder / RECORD).is_file():
        for recorded in read_record(folder).components:
            if recorded.name == component.name:
                return _by_record(recorded, stored, dtype)
    from bitroute.convert.foreign import decode_foreign

    return decode_foreign(component, stored, dtype)


def _by_record(
    recorded: RecordedComponent, stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """Raises SourceError where the files hold other tensors than the record's backends store."""
    raise_all([problem for entry in recorded.entries for problem in _differences(recorded, entry, stored)])
    found = {entry.name: _entry(entry, stored, dtype) for entry in recorded.entries}
    taken = {name for entry in recorded.entries for name, _ in entry.tensors.values()}
    return {**found, **{name: tensor for name, tensor in stored.items() if name not in taken}}


def _differences(
    recorded: RecordedComponent, entry: RecordedEntry, stored: Mapping[str, StoredTensor]
) -> Iterator[Problem]:
    for suffix, spec in entry.backend.outputs(entry.weight).items():
        name = entry.tensors[suffix][0]
        got = str(stored[name].spec) if name in stored else "no such tensor"
        if got != str(spec):
            what = f"tensor {name!r} is not as the record of this checkpoint says"
            yield Problem(what, str(recorded.component.folder), got, str(spec), "convert again, or copy it again")


def _entry(entry: RecordedEntry, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> StoredTensor:
    parts = {suffix: stored[name] for suffix, (name, _) in entry.tensors.items()}
    if not entry.quantized:
        return replace(parts["weight"], name=entry.name)
    return derive(
        entry.name, parts, entry.source_shape, dtype,
        lambda found: entry.backend.decode(found, entry.weight).reshape(entry.source_shape),
    )  # fmt: skip
