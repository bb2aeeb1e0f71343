"""Four bits with a learned book: 16 numbers per tensor, an E4M3 scale with a sign per block, a float32 per tensor.

g = 2 · amax / 448, s = an E4M3 number, ŵ = book[code] · (g · s): 4.5 bits in blocks of 16, 4.25 of 32, 4.125 of 64.
The book is learned from a sample of the tensor's blocks, and need not be symmetric: the sign of the scale, which is
free, mirrors it. Of each block the scale is the one that loses least, weighted by the mean square of each input where
calibration measured it; the plain one, the positive E4M3 number next to amax / g, unless another is strictly better.
Blocks so far below the tensor's amax that E4M3 has no number for them decode to zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitroute.backends._codebook import Mirrored, as_table, learn, search
from bitroute.backends._elements import E4M3, block_amax, block_weights, in_blocks, looked_up
from bitroute.backends._rounded import Rounded, Scales
from bitroute.backends._table import Blocks, read_back
from bitroute.backends.base import NONE, Statistics, Survey, TensorSpec

SAMPLE = 2**17  # weights that the book is learned from
HEADROOM = 2.0  # a scale can be that many times the tensor's largest magnitude
SMALLEST_TENSOR_SCALE = 2.0**-126  # float32 has fewer digits below
LARGEST_TENSOR_SCALE = torch.finfo(torch.float32).max / E4M3.max


@dataclass(frozen=True)
class Codebook4(Rounded):
    name = "codebook4"
    family = "bitroute"
    lowest_sqnr_db = 10.0

    block: Literal[16, 32, 64] = 16

    def refuse(self, weight: TensorSpec) -> str | None:
        columns = weight.shape[1]
        if columns % self.block:
            return f"{columns} input features are not a multiple of {self.block}"
        return super().refuse(weight)

    def refuse_convolution(self) -> str | None:
        return None

    def outputs(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        return {
            "codes": TensorSpec((rows, columns // 2), torch.uint8),
            "scale": TensorSpec((rows, columns // self.block), E4M3.dtype),
            "book": TensorSpec((16,), torch.float32),
            "per_tensor_scale": TensorSpec((), torch.float32),
        }

    def survey(self, blocks: Iterable[Tensor], weight: TensorSpec, statistics: Statistics = NONE) -> Survey:
        places = _sampled(weight.numel // self.block, SAMPLE // self.block)
        sample, amax, passed = torch.empty(len(places), self.block), torch.zeros(()), 0
        for rows in blocks:
            found = in_blocks(rows, self.block).flatten(0, 1)
            amax = torch.maximum(amax.to(found.device), block_amax(found).amax())
            here = (places >= passed) & (places < passed + len(found))
            sample[here] = found[(places[here] - passed).to(found.device)].cpu()
            passed += len(found)
        unit = (amax * (HEADROOM / E4M3.max)).clamp(SMALLEST_TENSOR_SCALE, LARGEST_TENSOR_SCALE)
        moments = block_weights(statistics.second_moment, self.block, torch.device("cpu"))
        weights = None if moments is None else moments[places % len(moments)].unsqueeze(1)
        book = learn(sample.unsqueeze(1), unit.cpu(), weights)
        return Survey(outputs={"book": book.to(amax.device), "per_tensor_scale": unit})

    def scales(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> Scales:
        weights = block_weights(statistics.second_moment, self.block, rows.device)
        blocks = Mirrored(in_blocks(rows, self.block), survey.outputs["book"], weights)
        return (search(blocks, survey.outputs["per_tensor_scale"]),)

    def nearest(self, weights: Tensor, scales: Scales, survey: Survey) -> Tensor:
        return read_back(survey.outputs["book"], weights, scales[0])

    def store(self, rows: Tensor, scales: Scales, survey: Survey) -> dict[str, Tensor]:
        blocks = Blocks(in_blocks(rows, self.block), as_table(survey.outputs["book"]), None)
        codes = blocks.codes(scales[0]).reshape(rows.shape[0], rows.shape[1] // 2)
        return {"codes": codes, "scale": (scales[0] / survey.outputs["per_tensor_scale"]).to(E4M3.dtype)}

    def decode_rows(self, stored: Mapping[str, Tensor], weight: TensorSpec, start: int, stop: int) -> Tensor:
        numbers = looked_up(stored["codes"][start:stop], stored["book"], high_first=True)
        scales = E4M3.load(stored["scale"][start:stop]).mul_(stored["per_tensor_scale"])
        return in_blocks(numbers, self.block).mul_(scales.unsqueeze(-1)).flatten(1)


def _sampled(count: int, wanted: int) -> Tensor:
    """Places of `wanted` of `count` blocks, or of all of them: one at random in each of equal parts, ascending."""
    if count <= wanted:
        return torch.arange(count)
    bounds = torch.arange(wanted + 1) * count // wanted
    draws = torch.rand(wanted, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return bounds[:-1] + (draws * (bounds[1:] - bounds[:-1])).long()
