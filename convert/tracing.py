"""What a function does to a state dict, found out without a weight: it is run once on stand-ins that record.

A stand-in is a tensor without data (shape, dtype and strides on the meta device). What comes out as a contiguous piece
of a stored tensor is that piece of the file; everything else is computed by the recorded operations when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

from bitroute.backends.base import TensorSpec
from bitroute.convert.layout import DerivedTensor, StoredTensor

COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default)


class LooksAtValues(Exception):
    """The traced function does what stand-ins cannot: its result depends on the weights, or it changes them."""


@dataclass(frozen=True)
class _Step:
    """One operation and which of its outputs is meant."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    output: int


class StandIn(torch.Tensor):
    """shape: a meta tensor; its storage is that of `piece_of` if that is not None. made_by: None for a stored one."""

    shape_only: Tensor
    piece_of: StoredTensor | None
    made_by: _Step | None

    @staticmethod
    def __new__(
        cls: type[StandIn], shape_only: Tensor, piece_of: StoredTensor | None = None, made_by: _Step | None = None
    ) -> StandIn:
        made: StandIn = torch.Tensor._make_wrapper_subclass(
            cls, shape_only.shape, strides=shape_only.stride(), storage_offset=shape_only.storage_offset(),
            dtype=shape_only.dtype, device=shape_only.device,
        )  # fmt: skip
        made.shape_only, made.piece_of, made.made_by = shape_only, piece_of, made_by
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function._schema.is_mutable:
            raise LooksAtValues(f"{function} writes into a tensor")
        first = args[0] if args else None
        if function in COPIES and isinstance(first, StandIn) and first.shape_only.is_contiguous():
            return StandIn(first.shape_only, first.piece_of, first.made_by)
        if function is torch.ops.aten.cat.default and len(args[0]) == 1:
            return args[0][0].clone()
        try:
            made = function(*tree_map(_shape_only, args), **tree_map(_shape_only, options))
        except (RuntimeError, NotImplementedError) as error:  # of meta tensors, where values decide
            raise LooksAtValues(f"{function}: {error}") from error
        outputs, form = tree_flatten(made)
        if not all(isinstance(output, Tensor) for output in outputs):
            raise LooksAtValues(f"{function} asks for the values of a tensor")
        origin = first.piece_of if function.is_view and isinstance(first, StandIn) else None
        steps = (_Step(function, args, options, number) for number in range(len(outputs)))
        return form.unflatten(StandIn(out, origin, step) for out, step in zip(outputs, steps, strict=True))


def trace(
    function: Callable[[dict[str, Tensor]], Mapping[str, object]], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """What the function makes of stored tensors, by name.

    Raises:
        LooksAtValues: it reads or changes values, or returns what is no tensor of these. And whatever it raises.
    """
    found = {}
    for name, made in function({name: _stand_in(tensor) for name, tensor in stored.items()}).items():
        if not isinstance(made, StandIn):
            raise LooksAtValues(f"{name!r} is not made from the stored tensors")
        found[name] = _resolve(name, made)
    return found


def _stand_in(tensor: StoredTensor) -> StandIn:
    return StandIn(torch.empty(tensor.spec.shape, dtype=tensor.spec.dtype, device="meta"), tensor)


def _shape_only(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value.shape_only
    return value.to("meta") if isinstance(value, Tensor) else value


def _resolve(name: str, made: StandIn) -> StoredTensor:
    origin, shape = made.piece_of, made.shape_only
    spec = TensorSpec(tuple(shape.shape), shape.dtype)
    if made.made_by is None and origin is not None:
        return replace(origin, name=name)
    if origin is not None and not isinstance(origin, DerivedTensor) and _is_piece(shape, origin):
        return StoredTensor(name, spec, origin.file, origin.offset + int(shape.storage_offset()) * shape.dtype.itemsize)
    leaves = {id(leaf): leaf for leaf in _leaves(made)}
    parts = tuple(leaf.piece_of for leaf in leaves.values() if leaf.piece_of)
    return DerivedTensor(name, spec, parts[0].file, parts[0].offset, parts, partial(_compute, made, list(leaves)))


def _is_piece(shape: Tensor, origin: StoredTensor) -> bool:
    return shape.is_contiguous() and shape.dtype == origin.spec.dtype


def _leaves(made: StandIn) -> Iterator[StandIn]:
    if made.made_by is None:
        yield made
        return
    for value in tree_iter((made.made_by.arguments, made.made_by.options)):
        if isinstance(value, StandIn):
            yield from _leaves(value)


def _compute(made: StandIn, leaves: Sequence[int], *parts: Tensor) -> Tensor:
    """The recorded operations on real tensors; contiguous."""
    return _replay(made, dict(zip(leaves, parts, strict=True))).contiguous()


def _replay(made: StandIn, values: Mapping[int, Tensor]) -> Tensor:
    step = made.made_by
    if step is None:
        return values[id(made)]
    given = tree_map(lambda v: _replay(v, values) if isinstance(v, StandIn) else v, (step.arguments, step.options))
    outputs: list[Tensor] = tree_flatten(step.function(*given[0], **given[1]))[0]
    return outputs[step.output]
