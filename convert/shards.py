"""How the tensors of a component are spread over files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitroute.convert.entry import Entry

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SMALLEST_BYTES = 10**6  # less would make a file of every layer
SIZES = "a size such as 2GB or 500MB, at least 1MB"
VARIANT = re.compile(r"(?!safetensors|bin|json|index)[A-Za-z][A-Za-z0-9_]{0,39}")  # a word in the names of weights


def cut(entries: Sequence[Entry], limit_bytes: int) -> list[list[Entry]]:
    """Entries in order, so that no file passes the limit; a layer's tensors stay together."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for _, group in groupby(entries, key=lambda entry: entry.layer):
        layer = list(group)
        size_bytes = sum(entry.size_bytes for entry in layer)
        if shards[-1] and filled + size_bytes > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1] += layer
        filled += size_bytes
    return shards


def weight_name(stem: str, variant: str | None = None, suffix: str = "safetensors") -> str:
    return ".".join(part for part in (stem, variant, suffix) if part)


def index_name(stem: str, variant: str | None = None, suffix: str = "safetensors") -> str:
    """As `_add_variant` of diffusers 0.42 and transformers 5.23 names it: model.safetensors.index.fp16.json."""
    return weight_name(f"{stem}.{suffix}.index", variant, "json")


def shard_names(stem: str, count: int, variant: str | None = None) -> list[str]:
    if count == 1:
        return [weight_name(stem, variant)]
    base = f"{stem}.{variant}" if variant else stem
    return [f"{base}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def parse_size(text: str) -> int | None:
    """Bytes; None for what is not SIZES."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?I?B|)", text.strip().upper())
    if not found or found[2] not in UNITS:
        return None
    size_bytes = int(float(found[1]) * UNITS[found[2]])
    return size_bytes if size_bytes >= SMALLEST_BYTES else None
