"""Running statistics of the rows that a layer is given, in memory that does not depend on how many rows come.

Sums over the rows of a chunk are taken in float32, sums over chunks in float64: on the same machine the same rows
in the same order give the same bits, also where the state was written to a file and read back in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bitroute.backends.base import TensorSpec
from bitroute.calibrate.budget import Layer, strips
from bitroute.errors import JobError, Problem

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}  # of rows in float32: 8 MB stay near the cache, 64 MB fill a GPU
KEY_LIMIT = 2**62


class Accumulator:
    """All that is measured of one layer's input x [rows, in]."""

    def __init__(self, layer: Layer, sample_rows: int) -> None:
        self.layer = layer
        self.rows = torch.zeros(2, dtype=torch.int64)  # seen, all-zero ones
        self.absmax = torch.zeros(layer.columns)
        self.squares = torch.zeros(layer.columns, dtype=torch.float64)
        self.hessian = Hessian(layer.columns, layer.block) if layer.block else None
        self.sample = Sample(sample_rows, layer.columns)

    @property
    def seen(self) -> int:
        return int(self.rows[0])

    def add(self, x: Tensor) -> None:
        """x: [..., in], of any float dtype, on any device.

        Raises:
            JobError: it holds NaN or infinities, or its squares do not fit float32.
        """
        rows = x.detach().reshape(-1, self.layer.columns)
        if rows.device.type == "mps":  # it has no float64
            rows = rows.cpu()
        self.sample.add(rows, f"{self.layer.key} {self.seen}")
        size = max(1, CHUNK_ELEMENTS.get(rows.device.type, CHUNK_ELEMENTS["cpu"]) // self.layer.columns)
        for start in range(0, len(rows), size):
            self._add(rows[start : start + size].float())

    def _add(self, chunk: Tensor) -> None:
        squares, magnitudes = chunk.square().sum(0).cpu(), chunk.abs()
        if not squares.isfinite().all():
            raise JobError(Problem("the input of a layer holds NaN, infinities or numbers above 1e18", self.layer.key))
        self.squares += squares
        torch.maximum(self.absmax, magnitudes.amax(0).cpu(), out=self.absmax)
        self.rows += torch.tensor([len(chunk), int((magnitudes.amax(1) == 0).sum())])
        if self.hessian:
            self.hessian.add(chunk)

    def state(self) -> dict[str, Tensor]:
        """Everything, to go on with later; names below the layer's."""
        kept = {"rows": self.rows, "absmax": self.absmax, "squares": self.squares, **self.sample.state()}
        return kept | (self.hessian.state() if self.hessian else {})

    def fits(self, state: Mapping[str, TensorSpec]) -> bool:
        """Whether it can be the state of an accumulator of the same layer."""
        sample = self.sample.state()
        mine = {name: TensorSpec(tuple(part.shape), part.dtype) for name, part in self.state().items()}
        same = all(state.get(name) == spec for name, spec in mine.items() if name not in sample)
        keys, rows = (state.get(name) for name in sample)
        if not (same and keys and rows):
            return False
        count = keys.shape[0] if keys.shape else -1
        known = keys == TensorSpec((count,), torch.int64) and rows.shape == (count, self.layer.columns)
        return known and count <= self.sample.size and rows.dtype.is_floating_point

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `fits`, which is taken over, not copied."""
        self.rows, self.absmax, self.squares = state["rows"], state["absmax"], state["squares"]
        self.sample.restore(state)
        if self.hessian:
            self.hessian.restore(state)

    def specs(self) -> dict[str, TensorSpec]:
        """What a statistics file will hold of the layer, by kind."""
        columns, block = self.layer.columns, self.layer.block
        found = {kind: TensorSpec((columns,), torch.float32) for kind in ("absmax", "second_moment")}
        if block:
            found["hessian"] = TensorSpec((columns // block, block, block), torch.float32)
        if self.sample.size:
            found["inputs"] = TensorSpec(tuple(self.sample.rows.shape), self.sample.rows.dtype)
        return found | {"rows": TensorSpec((2,), torch.int64)}

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `specs` with their kinds, a Hessian in many parts; there must have been a row."""
        yield "absmax", self.absmax
        yield "second_moment", (self.squares / self.seen).float()
        if self.hessian:
            yield from (("hessian", part) for part in self.hessian.means(self.seen))
        if self.sample.size:
            yield "inputs", self.sample.rows
        yield "rows", self.rows


class Hessian:
    """Σ x xᵀ of blocks of channels, in float64: of the symmetric blocks only what is on and right of the diagonal.

    strips: of each block some rows, from their diagonal on: [blocks, height, block - start].
    """

    def __init__(self, columns: int, block: int) -> None:
        self.block, self.blocks, self.bounds = block, columns // block, strips(columns, block)
        self.strips = [
            torch.zeros(self.blocks, stop - start, block - start, dtype=torch.float64) for start, stop in self.bounds
        ]

    def add(self, chunk: Tensor) -> None:
        """chunk: [rows, in] float32."""
        blocks = chunk.reshape(-1, self.blocks, self.block).movedim(1, 0)
        for (start, stop), strip in zip(self.bounds, self.strips, strict=True):
            strip += torch.bmm(blocks[:, :, start:stop].mT, blocks[:, :, start:]).cpu()

    def means(self, rows: int) -> Iterator[Tensor]:
        """E[x xᵀ] from its sum over so many rows: some rows of a block at a time, [height, block] float32."""
        for block in range(self.blocks):
            for index, (start, stop) in enumerate(self.bounds):
                above = zip(self.bounds[:index], self.strips[:index], strict=True)
                left = [strip[block, :, start - first : stop - first].mT for (first, _), strip in above]
                own = self.strips[index][block]
                corner = own[:, : stop - start].triu()
                corner = corner + corner.triu(1).mT  # a product is symmetric only up to rounding
                yield (torch.cat([*left, corner, own[:, stop - start :]], 1) / rows).float()

    def state(self) -> dict[str, Tensor]:
        return {f"hessian.{index}": strip for index, strip in enumerate(self.strips)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.strips = [state[f"hessian.{index}"] for index in range(len(self.strips))]


class Sample:
    """A uniform sample of all rows, without replacement: each row draws a random key, the smallest keys stay.

    The draws follow from a name, so they need no state. rows: in the dtype that they had, in the order of their keys.
    """

    def __init__(self, size: int, columns: int) -> None:
        self.size = size
        self.keys = torch.empty(0, dtype=torch.int64)
        self.rows = torch.empty(0, columns, dtype=torch.bfloat16)  # joined with others it takes their dtype

    def add(self, rows: Tensor, name: str) -> None:
        if not self.size:
            return
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        keys = torch.randint(KEY_LIMIT, (len(rows),), generator=torch.Generator().manual_seed(seed))
        full = len(self.keys) == self.size
        chosen = (keys < self.keys[-1]).nonzero()[:, 0] if full else torch.arange(len(rows))
        chosen = chosen[keys[chosen].argsort(stable=True)[: self.size]]
        if not len(chosen):
            return
        found = rows[chosen.to(rows.device)].cpu()
        joined = torch.cat([self.keys, keys[chosen]])
        order = joined.argsort(stable=True)[: self.size]
        kept = torch.cat([self.rows, found]) if len(self.keys) else found
        self.keys, self.rows = joined[order], kept[order]

    def state(self) -> dict[str, Tensor]:
        return {"sample.keys": self.keys, "sample.rows": self.rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.keys, self.rows = state["sample.keys"], state["sample.rows"]
