"""FLUX.1-dev's own size once, by the command itself: 24 GB of generated weights to float8."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from formats import BITROUTE, COPYING
from processes import anonymous_with_torch, checkpoint, measured, observed

BLOCKS = (19, 38)
DISK_BYTES = 40_000_000_000  # 24 GB, half of it again, and some room
RECIPE = "model: full/source\ncomponents: {transformer: {backend: float8}}\n"
FILE = "full.json"


def measure_full_size(work: Path, blocks: tuple[int, int] = BLOCKS, needed: int = DISK_BYTES) -> None:
    """Writes WORK/full.json; the weights are removed again. Nothing is done where that file is."""
    if (work / FILE).exists():
        return
    free = shutil.disk_usage(work).free
    if free < needed:
        sys.exit(f"{work}: {needed / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} GB are free")
    shutil.rmtree(work / "full", ignore_errors=True)
    try:
        source = checkpoint(work / "full" / "source", blocks)
        (work / "full.yaml").write_text(RECIPE, "utf-8")
        copying = measured(sys.executable, "convert", "float8", COPYING, source, work / "full" / "copy")
        shutil.rmtree(work / "full" / "copy", ignore_errors=True)
        found = {
            "read": sum(file.stat().st_size for file in source.iterdir()),
            "base": anonymous_with_torch(),
            "copying": copying,
            "conversion": observed(work, "--recipe", "full.yaml", "--out", "full/float8", "--no-verify"),
            "loading": measured(sys.executable, "load", BITROUTE, work / "full" / "float8"),
        }
        (work / FILE).write_text(json.dumps(found, indent=1), "utf-8")
    finally:
        shutil.rmtree(work / "full", ignore_errors=True)
        (work / "full.yaml").unlink(missing_ok=True)
