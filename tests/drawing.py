"""One call of each of many pipelines, all in one fresh process, which imports bitroute only where that is needed."""

from __future__ import annotations

import gc
import json
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch

Facts = dict[str, Any]
LOADING = Path(__file__).parents[1] / "convert" / "loading.py"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 1}


def draw_all(plain: dict[str, Facts], with_bitroute: dict[str, Facts]) -> dict[str, Any]:
    """Folder → facts of its pipeline in; folder → shape and spread of its pixels, or what the libraries said, out."""
    words = [sys.executable, "-W", "ignore", __file__]
    asked = json.dumps([plain, with_bitroute])
    done = subprocess.run(words, input=asked, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _draw(folder: str, facts: Facts) -> dict[str, Any] | str:
    try:
        without = {name: None for name, wanted in facts["components"].items() if wanted is None}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **without)
        pipe.set_progress_bar_config(disable=True)
        for name, value in facts.get("attributes", {}).items():
            setattr(pipe, name, value)
        generator = torch.Generator().manual_seed(0)
        asked = {"prompt": "red apple, noto style", **SMALL, **facts["call"]}
        drawn = pipe(**asked, output_type="pt", generator=generator)[0][0]
    except Exception as error:  # whatever the libraries raise is the answer
        return f"{type(error).__name__}: {error}"
    return {"shape": list(drawn.shape), "spread": float(drawn.float().std())}


def main() -> None:
    gc.set_threshold(100_000)  # importing and building models makes few cycles that are garbage
    runpy.run_path(str(LOADING))["lift_gpu_check"]()
    plain, with_bitroute = json.load(sys.stdin)
    answers = {folder: _draw(folder, facts) for folder, facts in plain.items()}
    assert "bitroute" not in sys.modules
    if with_bitroute:
        import_module("bitroute")
    answers |= {folder: _draw(folder, facts) for folder, facts in with_bitroute.items()}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
