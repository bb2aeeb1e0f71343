"""docs/loading.yaml says what happens when a loaded model is used in some way: here it happens."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from uses import USES, Stored, run

import bitroute
from bitroute.convert.loading import lift_gpu_check

DOCS = Path(__file__).parents[2] / "docs"
TABLE: dict[str, Any] = yaml.safe_load((DOCS / "loading.yaml").read_text("utf-8"))
repeated = runpy.run_path(str(DOCS / "loading.py"))["repeated"]
OWN = """
model: builtin:tiny-flux
components:
  transformer:
    backend: float8
    container: bitroute
    rules:
      - {role: feed-forward, backend: nvfp4, otherwise: keep}
      - {layers: "transformer_blocks.0.*", backend: int8}
  text_encoder_2: {backend: float8, container: bitroute}
"""
QUANTO = """
model: builtin:tiny-flux
components:
  transformer: {backend: quanto-int8, keep: none}
"""
MADE_BY = {
    "bitroute": (OWN, "transformer"), "encoder": (OWN, "text_encoder_2"), "torchao": ("tiny-flux-fp8", "transformer"),
    "bitsandbytes": ("tiny-flux-nf4", "transformer"), "quanto": (QUANTO, "transformer"),
}  # fmt: skip


CELLS = [
    pytest.param(row["test"], container, cell, id=f"{row['test']}-{container}")
    for row in TABLE["uses"]
    for container, cell in row["cells"].items()
    if repeated(container, cell)
]


@pytest.fixture(scope="module")
def stored_in(convert: Callable[[str], Path]) -> Callable[[str], Stored]:
    """Each container's model, with its output computed once."""
    lift_gpu_check()
    made: dict[str, Stored] = {}

    def stored_in(container: str) -> Stored:
        if container not in made:
            recipe, component = MADE_BY[container]
            made[container] = Stored(convert(recipe), component)
        return made[container]

    return stored_in


@pytest.mark.parametrize(("use", "container", "cell"), CELLS)
def test_the_table_tells_what_happens(
    use: str, container: str, cell: Any, stored_in: Callable[[str], Stored], tmp_path: Path
) -> None:
    stored = stored_in(container)
    expected = stored.output
    if cell == "works":
        assert torch.equal(USES[use](stored, tmp_path), expected)
    elif message := cell.get("refuses") or cell.get("fails"):
        with pytest.raises(Exception, match=re.escape(message)):
            USES[use](stored, tmp_path)
    else:
        with pytest.raises(AssertionError):
            assert torch.equal(USES[use](stored, tmp_path), expected), cell["wrong"]


def test_the_table_has_every_use_once() -> None:
    assert sorted(row["test"] for row in TABLE["uses"]) == sorted(USES)


def test_a_refused_fusion_leaves_the_adapter_working(stored_in: Callable[[str], Stored], tmp_path: Path) -> None:
    stored = stored_in("bitroute")
    model = stored.load()
    stored.lora(model)
    adapted = run(model)
    with pytest.raises(bitroute.BitrouteError, match="leave a LoRA unfused"):
        model.fuse_lora()
    assert torch.equal(run(model), adapted)
    assert not torch.equal(adapted, stored.output)


@pytest.mark.parametrize("container", ["bitroute", "encoder"])
def test_opening_a_checkpoint_copies_none_of_it(stored_in: Callable[[str], Stored], container: str) -> None:
    """The tensors lie as close to each other in memory as in the file."""
    stored = stored_in(container)
    size_bytes = next(stored.folder.glob("*.safetensors")).stat().st_size
    tensors = list(stored.load().parameters())
    first = min(tensor.data_ptr() for tensor in tensors)
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) <= last - first <= size_bytes
