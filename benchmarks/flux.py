"""A synthetic checkpoint of FluxTransformer2DModel with the widths of FLUX.1-dev and fewer blocks, in bf16.

python benchmarks/flux.py FOLDER --double 2 --single 4    19 and 38 blocks are FLUX.1-dev itself, 24 GB in a minute
The values are stretches, from random starts, of one run of 2^23 Gaussian numbers times 0.02: as fast as the disk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from bitroute.backends.base import TensorSpec
from bitroute.convert.layout import build_header
from bitroute.convert.noise import quiet

WIDTHS = {
    "patch_size": 1, "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
STEM = "diffusion_pytorch_model"
SHARD_BYTES = 500_000_000
NUMBERS = 2**23
Specs = Mapping[str, TensorSpec]


def generate(folder: Path, double: int, single: int, widths: Mapping[str, Any] = WIDTHS) -> int:
    """The number of parameters; at most 32 MiB of them are in memory."""
    quiet()
    from diffusers import FluxTransformer2DModel

    config = {**widths, "num_layers": double, "num_single_layers": single}
    with torch.device("meta"):
        state = FluxTransformer2DModel(**config).state_dict()
    specs = {name: TensorSpec(tuple(tensor.shape), torch.bfloat16) for name, tensor in state.items()}
    shards = list(_shards(specs))
    names = [f"{STEM}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    run, random = _gaussian(), Random(0)
    folder.mkdir(parents=True)
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, run, random)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(spec.size_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config}), "utf-8")
    return sum(spec.numel for spec in specs.values())


def _shards(specs: Specs) -> Iterator[dict[str, TensorSpec]]:
    shard: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if shard and sum(one.size_bytes for one in shard.values()) + spec.size_bytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = spec
    yield shard


def _gaussian() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(NUMBERS, generator=generator)).bfloat16()


def _write(file: Path, specs: Specs, run: Tensor, random: Random) -> None:
    """The order of the payloads does not matter: they are all alike."""
    header, _ = build_header(specs, {"format": "pt"})
    data = memoryview(run.view(torch.uint8).numpy().data)
    left = sum(spec.size_bytes for spec in specs.values())
    with open(file, "xb", buffering=0) as stream:
        stream.write(header)
        while left:
            start = 2 * random.randrange(NUMBERS // 2)
            left -= stream.write(data[start : start + min(left, NUMBERS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    said = parser.parse_args()
    print(f"{generate(said.folder, said.double, said.single) / 1e9:.3f} billion parameters")


if __name__ == "__main__":
    main()
