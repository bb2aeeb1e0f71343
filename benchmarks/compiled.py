"""What compiling does for encoders: python benchmarks/compiled.py

Each encoder run eagerly, with its rounding in C, and as a whole compiled ahead of time by inductor for any number of
rows and columns: one thread, one block of rows of bf16. Prints a Markdown table; needs a compiler.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package

from bitroute.backends import create
from bitroute.backends._compiled import use_compiled
from bitroute.backends.base import BLOCK_ELEMENTS, Backend, Survey, TensorSpec

ENCODERS: Sequence[tuple[str, dict[str, str]]] = (
    ("float8", {}), ("int8", {}), ("nvfp4", {}), ("mxfp4", {}), ("nf4", {}),
    ("nvfp4", {"scale": "mse"}), ("mxfp4", {"scale": "mse"}), ("nf4", {"scale": "mse"}), ("codebook4", {}),
)  # fmt: skip
COLUMNS = 3072
KINDS = ("outputs", "facts", "rowwise")  # of a survey


class Encoder(nn.Module):
    def __init__(self, backend: Backend, survey: Survey) -> None:
        super().__init__()
        self.backend = backend
        self.keys = [(kind, name) for kind in KINDS for name in getattr(survey, kind)]

    def tensors(self, survey: Survey) -> list[Tensor]:
        return [getattr(survey, kind)[name] for kind, name in self.keys]

    def forward(self, rows: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for (kind, name), tensor in zip(self.keys, tensors, strict=True):
            parts[kind][name] = tensor
        return [_bytes(part) for part in self.backend.encode(rows, Survey(**parts)).values()]


def main() -> None:
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(
        "| encoder | eager, ns a weight | rounding in C | by inductor | its seconds to compile | its bits |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    for name, options in ENCODERS:
        backend = create(name, **options)
        print(f"| {' | '.join([str(backend), *compared(backend)])} |", flush=True)


def compared(backend: Backend) -> list[str]:
    """ns a weight eagerly, with rounding in C and by inductor; the seconds that inductor takes, and of its bits."""
    rows = torch.randn(BLOCK_ELEMENTS // COLUMNS, COLUMNS).mul_(0.02).bfloat16()
    survey = backend.survey([rows], TensorSpec(tuple(rows.shape), rows.dtype))
    encoder = Encoder(backend, survey)
    inputs = (rows, encoder.tensors(survey))
    own = []
    for in_c in (False, True):
        use_compiled(in_c)
        own.append(f"{_least_ns(encoder, inputs):.2f}")
    use_compiled(False)  # inductor is to trace torch
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            fast = _compiled(encoder, inputs, Path(folder) / "encoder.pt2")
        except Exception as error:  # of many kinds: torch.export cannot trace all of torch
            print(f"{backend}: {error}", file=sys.stderr)
            return [*own, "cannot", "", ""]
        seconds = time.perf_counter() - start
        pairs = zip(encoder(*inputs), fast(*inputs), strict=True)
        same = all(torch.equal(_bytes(one), _bytes(other)) for one, other in pairs)
        return [*own, f"{_least_ns(fast, inputs):.2f}", f"{seconds:.0f}", "the same" if same else "other"]


def _compiled(encoder: Encoder, inputs: tuple[Tensor, list[Tensor]], file: Path) -> Callable[..., Any]:
    any_size = torch.export.Dim.DYNAMIC
    of_survey = [{0: any_size} if kind == "rowwise" else None for kind, _ in encoder.keys]
    exported = torch.export.export(encoder, inputs, dynamic_shapes=({0: any_size, 1: any_size}, of_survey))
    return aoti_load_package(aoti_compile_and_package(exported, package_path=str(file)))


def _least_ns(encoder: Callable[..., Any], inputs: tuple[Tensor, list[Tensor]]) -> float:
    """Of a weight."""
    encoder(*inputs)
    found = []
    for _ in range(30):
        start = time.thread_time()
        encoder(*inputs)
        found.append(time.thread_time() - start)
    return 1e9 * min(found) / inputs[0].numel()


def _bytes(tensor: Tensor) -> Tensor:
    """Inductor has no dtype for powers of two."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


if __name__ == "__main__":
    main()
