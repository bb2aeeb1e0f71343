"""Functions on state dicts, recorded on stand-ins: the same bits as on real tensors, and no look at a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitroute.convert.layout import DerivedTensor, StoredTensor, read_header
from bitroute.convert.reading import read_tensor
from bitroute.convert.tracing import LooksAtValues, trace

Function = Callable[[dict[str, Tensor]], Mapping[str, object]]
TENSORS = {
    "matrix": torch.arange(48.0).reshape(8, 6),
    "kernel": torch.arange(96.0).reshape(6, 4, 2, 2),
    "bias": torch.arange(6).to(torch.bfloat16),
}
PIECES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "the same": lambda t: t["matrix"],
    "a chunk": lambda t: t["matrix"].chunk(4, dim=0)[2],
    "a chunk that is concatenated alone": lambda t: torch.cat([t["matrix"].chunk(4)[1]]),
    "a split": lambda t: torch.split(t["kernel"], [2, 4])[1],
    "a slice that is cloned": lambda t: t["bias"][2:5].clone().detach(),
    "a view": lambda t: t["matrix"].view(4, 2, 6)[1],
    "a bias as a column": lambda t: t["bias"].reshape(6, -1),
    "a squeezed row": lambda t: t["kernel"][:1].squeeze(),
    "its data": lambda t: t["matrix"].data,
}
COMPUTED: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "halves that change places": lambda t: torch.cat(list(reversed(t["matrix"].chunk(2)))),
    "a transpose": lambda t: t["matrix"].T.contiguous(),
    "a permutation": lambda t: t["kernel"].permute(1, 0, 2, 3),
    "columns": lambda t: t["matrix"][:, 2:4],
    "a convolution as a matrix": lambda t: t["kernel"][:, :, 0, 0],
    "interleaved parts": lambda t: t["matrix"].view(4, 2, 6).unbind(1)[1].flatten(0, 1),
    "a sum of two": lambda t: t["matrix"][0] + t["bias"] * 2,
    "another dtype": lambda t: t["matrix"].to(torch.float16),
    "a piece of what was computed": lambda t: torch.cat([t["matrix"], t["matrix"] * 2])[7:9],
}
BY_VALUE: dict[str, Function] = {
    "a comparison": lambda t: t if torch.all(t["bias"] == 0) else {},
    "a number": lambda t: {"a": t["bias"] * t["matrix"].max().item()},
    "a choice of elements": lambda t: {"a": t["matrix"][t["matrix"] > 0]},
    "writing": lambda t: {"a": t["matrix"].add_(1)},
    "a tensor from elsewhere": lambda t: {"a": torch.eye(3)},
}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return read_header(tmp_path / "model.safetensors").tensors


def same(made: StoredTensor, expected: Tensor) -> bool:
    found = read_tensor(made)
    return found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_of_a_stored_tensor_is_those_bytes_of_the_file(name: str, stored: dict[str, StoredTensor]) -> None:
    made = trace(lambda tensors: {"made": PIECES[name](tensors)}, stored)["made"]
    assert type(made) is StoredTensor
    assert same(made, PIECES[name](TENSORS))


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_from_stored_tensors_has_the_same_bits(name: str, stored: dict[str, StoredTensor]) -> None:
    made = trace(lambda tensors: {"made": COMPUTED[name](tensors)}, stored)["made"]
    assert isinstance(made, DerivedTensor)
    assert same(made, COMPUTED[name](TENSORS))


@pytest.mark.parametrize("name", BY_VALUE)
def test_what_looks_at_values_or_changes_them_is_refused(name: str, stored: dict[str, StoredTensor]) -> None:
    with pytest.raises(LooksAtValues, match=r"aten|not made from the stored tensors"):
        trace(BY_VALUE[name], stored)


def test_a_tensor_of_what_was_derived_before_is_derived_again(stored: dict[str, StoredTensor]) -> None:
    doubled = trace(lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()}, stored)
    made = trace(lambda tensors: {"half": tensors["matrix"].chunk(2)[1]}, doubled)["half"]
    assert isinstance(made, DerivedTensor)
    assert same(made, (TENSORS["matrix"] * 2).chunk(2)[1])
