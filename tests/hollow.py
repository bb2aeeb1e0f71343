"""Full-size models that take no disk: configs, headers, and payloads that are holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_hollow(model: Any, folder: Path, shard_bytes: int = 10**10) -> None:
    """Writes a model's config and bf16 weights of any size whose payloads are holes: zeros that take no disk.

    The model may be on the meta device; it is a diffusers or a transformers one.
    """
    if hasattr(model, "save_config"):
        stem = "diffusion_pytorch_model"
        model.save_config(folder)
    else:
        stem = "model"
        model.config.save_pretrained(folder)
    shards = list(_hollow_shards(model, shard_bytes))
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.safetensors.index.json").write_text(index)
    for name, shard in zip(names, shards, strict=True):
        _write_hollow_file(folder / name, shard)


def _hollow_shards(model: Any, shard_bytes: int) -> Iterator[dict[str, Any]]:
    """Headers, each of as many tensors as fit."""
    header: dict[str, Any] = {}
    filled = 0
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in sorted(model.state_dict().items()):
        if name in tied:
            continue
        size_bytes = 2 * tensor.numel()
        if filled + size_bytes > shard_bytes:
            yield header
            header, filled = {}, 0
        offsets = [filled, filled + size_bytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        filled += size_bytes
    yield header


def _write_hollow_file(file: Path, entries: dict[str, Any]) -> None:
    header = json.dumps(entries).encode()
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
