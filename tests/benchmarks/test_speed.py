"""The benchmark of speed: its page is made from the measurements, its model loads."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = "0.69"
TINY = {
    "patch_size": 1, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
    "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip


def row(format_name: str, candidate: str, seconds: float, *, fsync: bool = False, number: int = 0) -> dict[str, Any]:
    found = {"seconds": seconds, "cpu": 2 * seconds, "anon": 2**29, "rss": 2**30, "written": 500_000_000}
    run = {"size": SIZE, "format": format_name, "candidate": candidate, "fsync": fsync, "round": number}
    return {**run, **found, "load": {**found, "seconds": seconds / 10}}


def page_of(work: Path, rows: list[dict[str, Any]], *options: str) -> str:
    (work / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    command = [sys.executable, str(BENCHMARKS / "speed.py"), str(work), "--page", str(work / "page.md")]
    measuring = ["--sizes", SIZE, "--peer-size", SIZE, "--rounds", "2", "--formats", "float8", "--peers", "torchao"]
    done = subprocess.run([*command, *measuring, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (work / "page.md").read_text("utf-8")


def rounds() -> list[dict[str, Any]]:
    times = {("copying", True): 2.0, ("bitroute", True): 3.0, ("copying", False): 1.0, ("bitroute", False): 2.0}
    times["bitroute, no compiler", False] = 1.5
    found = [
        row("float8", one, seconds + n, fsync=fsync, number=n)
        for n in (0, 1)
        for (one, fsync), seconds in times.items()
    ]
    return [row("bf16", "bf16", 2.0, number=n) for n in (0, 1)] + found


def test_the_page_holds_medians_ratios_and_failures_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    slow = row("float8", "torchao", 100.0)
    failed = {key: slow[key] for key in ("size", "format", "fsync", "round")} | {
        "candidate": "sdnq",
        "error": "no | GPU",
    }
    page = page_of(tmp_path, [*rounds(), slow, failed])
    assert not (tmp_path / f"flux-{SIZE}").exists()
    assert "| float8 | 1.40 | torchao | 40.00 | 50.00 |" in page
    assert "| bitroute | 3.50 | 2.50 | 5.00 | 0.50 | 1.00 | 500 | 2 |" in page
    assert "| torchao |  | 100.00 | 200.00 | 0.50 | 1.00 | 500 | 1 |" in page
    assert "| sdnq | failed: no / GPU |" in page
    assert "| float8 | bitroute | 0.25 | 1.25 |" in page
    assert f"| float8 | bitroute | {SIZE} | 3.50 | 2.54 | 1.40 | 7.00 | 0.50 | 1.00 |" in page
    assert "own size" not in page


def test_the_page_holds_the_forward_and_the_log_of_the_full_size(tmp_path: Path) -> None:
    page_of(tmp_path, rounds(), "--peers")
    times = {"seconds": 40.0, "cpu": 70.0, "anon": 2**30, "rss": 2**31}
    run = {"command": "quantize --recipe x", **times, "log": "quantizing: 10 %"}
    found = {"read": 24e9, "base": 2**29, "copying": times, "conversion": run, "loading": times}
    (tmp_path / "full.json").write_text(json.dumps(found), "utf-8")
    (tmp_path / "forward.md").write_text("| format |\n|---|\n| int8 |\n", "utf-8")
    page = page_of(tmp_path, rounds(), "--page-only")
    assert "| int8 |\n\n## FLUX" in page
    assert "| `quantize --recipe x` | 40.0 | 70.0 | 0.50 | 2.00 |\n| loading | 40.0 | 70.0 | 1.00 | 2.00 |" in page
    assert "    $ quantize --recipe x\n    quantizing: 10 %\n" in page


def test_the_synthetic_model_loads_and_holds_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    flux = import_module("flux")
    monkeypatch.setattr(flux, "SHARD_BYTES", 10_000)
    count = flux.generate(tmp_path / "model", 1, 1, TINY)
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "model")
    assert count == sum(parameter.numel() for parameter in model.parameters())
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    weights = [tensor.double() for shard in shards for tensor in load_file(shard).values() if tensor.numel() > 1000]
    assert all(0.017 < float(weight.std()) < 0.023 for weight in weights)
