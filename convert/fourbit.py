"""Weights that bitsandbytes stored in 4 bits, decoded by torch alone: ŵ = table[code] · absmax of its block.

Blocks run over the whole weight, also across rows, where bitsandbytes' CPU kernel misreads rows of broken blocks.
Where rows are whole blocks the values are bitsandbytes' own, bit for bit. Source: bitsandbytes 0.50, functional.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.decoded import derive, raise_all, undecodable
from bitroute.convert.layout import MAX_DIMENSIONS, StoredTensor
from bitroute.convert.reading import read_tensor
from bitroute.errors import Problem

STATE = ".quant_state.bitsandbytes__"
STATE_LIMIT_BYTES = 4096
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
CHUNK = 2**20  # weights whose codes are unpacked at a time


@dataclass(frozen=True)
class State:
    """What the JSON beside a weight says. nested_block: absmax values that share a second scale; 0 without one."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    mean: float

    @classmethod
    def parse(cls, text: bytes) -> State:
        """Raises ValueError, KeyError or TypeError for anything but a state of 4-bit weights."""
        content: dict[str, Any] = json.loads(text)
        shape = tuple(int(n) for n in content["shape"])
        block, nested = int(content["blocksize"]), int(content.get("nested_blocksize", 0))
        if not (1 <= len(shape) <= MAX_DIMENSIONS and min(shape) > 0 and block > 0 and nested >= 0):
            raise ValueError(f"shape {shape} in blocks of {block} and {nested}")
        return cls(shape, block, nested, float(content.get("nested_offset", 0)))

    def bytes_of_parts(self) -> dict[str, int]:
        """Part → its size if it fits this state."""
        weights = math.prod(self.shape)
        blocks = -(-weights // self.block)
        sizes = {"codes": (weights + 1) // 2, "quant_map": 4 * 16}
        if not self.nested_block:
            return {**sizes, "absmax": 4 * blocks}
        nested = -(-blocks // self.nested_block)
        return {**sizes, "absmax": blocks, "nested_absmax": 4 * nested, "nested_quant_map": 4 * 256}


def decode_four_bit(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """The tensors, with one for each weight that has a quant_state in place of its parts.

    Raises:
        SourceError: a state that cannot be read, or parts of other sizes than it says.
    """
    found = dict(stored)
    problems: list[Problem] = []
    for state_name in [name for name in stored if STATE in name]:
        name = state_name.partition(STATE)[0]
        try:
            state = _state(found.pop(state_name))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            problems.append(undecodable(stored[state_name], name, f"a quant_state that says {error}"[:200]))
            continue
        named = {"codes": name, **{part: f"{name}.{part}" for part in PARTS}}
        parts = {part: found.pop(place) for part, place in named.items() if place in found}
        sizes = {part: tensor.spec.size_bytes for part, tensor in parts.items()}
        if sizes == state.bytes_of_parts():
            found[name] = derive(name, parts, state.shape, dtype, partial(_decode, state=state))
        else:
            problems.append(undecodable(stored[state_name], name, f"bytes {sizes}", str(state.bytes_of_parts())))
    raise_all(problems)
    return found


def _state(tensor: StoredTensor) -> State:
    if tensor.spec.dtype != torch.uint8 or tensor.spec.size_bytes > STATE_LIMIT_BYTES:
        raise ValueError(f"{tensor.spec.size_bytes} bytes of {tensor.spec.dtype}")
    text = bytes(read_tensor(tensor).reshape(-1).tolist())
    if not any(text):  # an outline of a model on the Hub is zeros
        raise ValueError("nothing; if the model is on the Hub, download it first: hf download REPOSITORY")
    return State.parse(text)


def _decode(given: Mapping[str, Tensor], state: State) -> Tensor:
    """float32, in the weight's shape."""
    codes = given["codes"].reshape(-1).view(torch.uint8)
    absmax = given["absmax"].reshape(-1)
    if state.nested_block:
        scales = given["nested_absmax"].repeat_interleave(state.nested_block)[: len(absmax)]
        absmax = given["nested_quant_map"][absmax.int()] * scales + state.mean
    decoded = torch.empty(2 * len(codes), dtype=torch.float32)
    for start in range(0, len(codes), CHUNK // 2):
        pairs = codes[start : start + CHUNK // 2]
        both = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)
        decoded[2 * start : 2 * start + len(both)] = given["quant_map"][both.int()]
    weights = decoded[: math.prod(state.shape)]
    whole = len(weights) // state.block * state.block
    weights[:whole].view(-1, state.block).mul_(absmax[: whole // state.block, None])
    weights[whole:].mul_(absmax[-1])
    return weights.reshape(state.shape)
