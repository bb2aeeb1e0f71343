"""The time of a forward from bitroute's own container beside bf16: python benchmarks/forward.py CHECKPOINT

CHECKPOINT: the folder of a Flux transformer. Every linear layer is converted to each format, in a temporary folder,
and a fresh process runs it in turn with bf16. Prints a Markdown table. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memory import Watcher, memory

FORMATS = ("float8", "int8", "mxfp8", "int6", "nvfp4", "mxfp4", "nf4", "int4", "codebook4")
SIZES = ("1024+512", "256+512", "64+16")  # tokens of the picture, of 16 × 16 pixels each, and of the prompt
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="by torch.compile, on both sides")
    parser.add_argument("--converted", type=Path, help="only measure this folder, and print JSON")
    said = parser.parse_args()
    if said.converted:
        print(json.dumps(list(_compared(said))))
        return
    for line in _table(said):
        print(line, flush=True)


def _table(said: argparse.Namespace) -> Iterator[str]:
    titles = [f"{size} tokens | CPU" for size in said.sizes]
    yield f"| format | {' | '.join(titles)} | memory, MiB | of bf16 |"
    yield f"|---|{'---|' * (2 * len(titles) + 2)}"
    for name in said.formats:
        with TemporaryDirectory() as folder:
            _convert(name, said.checkpoint, Path(folder) / "out")
            found = _measured(said, Path(folder) / "out")
        ratios = [f"{size['wall']:.2f} | {size['cpu']:.2f}" for size in found]
        yield f"| {name} | {' | '.join(ratios)} | {found[0]['anon']:.0f} | {found[0]['plain_anon']:.0f} |"


def _convert(name: str, checkpoint: Path, out: Path) -> None:
    recipe = out.with_suffix(".yaml")
    transformer = {"backend": name, "keep": "none", "container": "bitroute"}
    recipe.write_text(json.dumps({"model": str(checkpoint), "components": {"transformer": transformer}}), "utf-8")
    command = [sys.executable, "-m", "bitroute", "--recipe", str(recipe), "--out", str(out), "--no-verify"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _measured(said: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    flags = ["--converted", str(folder), "--rounds", str(said.rounds), "--sizes", *said.sizes]
    command = [sys.executable, __file__, str(said.checkpoint), *flags, *(["--compile"] if said.compile else [])]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: list[dict[str, float]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _compared(said: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Ratios of the least wall and CPU times of each size, and the peaks of anonymous memory over what was before."""
    watchers = [(Watcher(os.getpid()), Watcher(os.getpid())) for _ in said.sizes]
    import torch

    import bitroute  # noqa: F401 - teaches diffusers its container

    torch.set_grad_enabled(False)
    models = [_load(said.checkpoint, said.compile), _load(said.converted, said.compile)]
    for size, pair in zip(said.sizes, watchers, strict=True):
        inputs = _inputs(*map(int, size.split("+")))
        peaks = [_peak(watcher, model, inputs) for watcher, model in zip(pair, models, strict=True)]
        runs = [[_timed(model, inputs) for model in models] for _ in range(said.rounds)]
        wall, cpu = ([min(run[which][clock] for run in runs) for which in (0, 1)] for clock in (0, 1))
        print(
            f"{said.converted}: {size}, {wall[0]:.2f} and {wall[1]:.2f} s, CPU {cpu[0]:.2f} and {cpu[1]:.2f} s",
            file=sys.stderr,
        )
        yield {"wall": wall[1] / wall[0], "cpu": cpu[1] / cpu[0], "plain_anon": peaks[0] / MIB, "anon": peaks[1] / MIB}


def _load(folder: Path, compiled: bool) -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return torch.compile(model) if compiled else model


def _inputs(image: int, text: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (1, image, 64), "encoder_hidden_states": (1, text, 4096), "pooled_projections": (1, 768)}
    found = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    positions = {"img_ids": torch.zeros(image, 3), "txt_ids": torch.zeros(text, 3)}
    return {**found, **positions, "timestep": torch.tensor([0.5]).bfloat16(), "guidance": torch.tensor([3.5])}


def _peak(watcher: Watcher, model: Any, inputs: dict[str, Any]) -> int:
    """Of the second run; the first one also reads the files, and compiles."""
    model(**inputs)
    CDLL("libc.so.6").malloc_trim(0)  # what was freed counts as used until the system has it back
    before = memory(os.getpid(), "RssAnon")
    watcher.start()
    model(**inputs)
    return watcher.stop() - before


def _timed(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    model(**inputs)
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    main()
