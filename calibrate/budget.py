"""How much of every layer's input can be measured in the memory that there is; known before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitroute.errors import Problem, RecipeError

BLOCKS = (4096, 2048, 1024, 512, 256, 128)  # of Hessians that are not full ones
SMALL_BLOCKS = (64, 32)  # of layers that none of those divides; what backends round together lies in one block
STRIP_ELEMENTS = 2**21  # of a Hessian, updated at a time
STRIPS = 8  # of a block; with more of them less lies left of the diagonal
LEAST_HEIGHT = 16  # of a strip: matrix products of less are slow


@dataclass(frozen=True)
class Layer:
    """A layer to measure. columns: of its input. item_bytes: of a number of it. block: of its Hessian, 0 for none."""

    component: str
    name: str
    columns: int
    item_bytes: int = 2
    convolution: bool = False
    block: int = 0

    @property
    def key(self) -> str:
        return f"{self.component}/{self.name}"


@dataclass(frozen=True)
class Measures:
    """What is measured. rows: of each layer's input that are kept. block: the largest of a Hessian's; None is full."""

    layers: tuple[Layer, ...]
    rows: int
    block: int | None = 0

    @property
    def memory_bytes(self) -> int:
        """At the end; the statistics file is smaller."""
        return sum(
            moments_bytes(found) + sample_bytes(found, self.rows) + hessian_bytes(found) for found in self.layers
        )

    @property
    def words(self) -> str:
        kinds = ["absmax", "second moments", *([f"{self.rows} rows"] if self.rows else [])]
        without = sum(not layer.block for layer in self.layers)
        hessian = "full Hessians" if self.block is None else f"Hessians in blocks of up to {self.block}"
        hessian += f" but of {without} layers" if without else ""
        return ", ".join([*kinds, hessian if without < len(self.layers) else "no Hessians"])


def measures(layers: Sequence[Layer], rows: int, hessian: bool, budget_bytes: int) -> Measures:
    """The most that fits: the rows first, then the largest Hessian blocks that fit for all layers.

    Raises:
        RecipeError: the budget is too small for the rows and the moments; says what would do.
    """
    least = Measures(tuple(layers), rows)
    if least.memory_bytes > budget_bytes:
        raise RecipeError(_too_small(least, budget_bytes))
    for largest in (None, *BLOCKS) if hessian else ():
        blocks = (replace(layer, block=hessian_block(layer.columns, largest)) for layer in layers)
        found = replace(least, layers=tuple(blocks), block=largest)
        if found.memory_bytes <= budget_bytes:
            return found
    return least


def hessian_block(columns: int, largest: int | None) -> int:
    """The largest block of at most `largest` channels that divides them; 0 where none does."""
    if largest is None or columns <= largest:
        return columns
    return next((block for block in (*BLOCKS, *SMALL_BLOCKS) if block <= largest and columns % block == 0), 0)


def strips(columns: int, block: int) -> list[tuple[int, int]]:
    """The rows of a Hessian's blocks that are kept and updated together."""
    height = max(LEAST_HEIGHT, min(-(-block // STRIPS), STRIP_ELEMENTS // columns))
    return [(start, min(start + height, block)) for start in range(0, block, height)]


def moments_bytes(layer: Layer) -> int:
    """absmax in float32, the sum of squares in float64, two counts."""
    return (4 + 8) * layer.columns + 16


def sample_bytes(layer: Layer, rows: int) -> int:
    """Rows in their dtype, each with a key."""
    return rows * (layer.columns * layer.item_bytes + 8)


def hessian_bytes(layer: Layer) -> int:
    """In float64, on and right of the diagonal."""
    if not layer.block:
        return 0
    kept = sum((stop - start) * (layer.block - start) for start, stop in strips(layer.columns, layer.block))
    return 8 * kept * (layer.columns // layer.block)


def _too_small(least: Measures, budget_bytes: int) -> Problem:
    bare = replace(least, rows=0).memory_bytes
    mend = f"--budget {_up(least.memory_bytes)}"
    if least.rows:
        mend += f"; or --rows 0 --budget {_up(bare)}" if bare > budget_bytes else "; or fewer --rows"
    return Problem(
        "the budget is too small for the statistics", "--budget", got=f"{budget_bytes / 1e6:,.1f} MB",
        expected=f"{least.memory_bytes / 1e6:,.1f} MB for absmax and second moments of {len(least.layers)} layers"
        + (f" and {least.rows} rows of each" if least.rows else ""),
        next_step=f"give {mend}; or choose fewer layers with --layers",
    )  # fmt: skip


def _up(size_bytes: int) -> str:
    """As the command takes it, a little more rather than less."""
    return f"{max(1, -(-size_bytes // 10**6))}MB"
