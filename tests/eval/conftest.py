"""One small sampling, one cache of its pictures, and checkpoints to damage."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute.eval.evaluate import Evaluation, evaluate
from bitroute.eval.gate import Limit, parse_gate
from bitroute.eval.sampling import Sampling
from bitroute.eval.scores import HIGHER_IS_BETTER, Scores, plain

Json = dict[str, Any]
CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 16}
PROMPTS = ("red apple, noto style", "fox, fluent style", "guitar, noto style")
FOXES = [f"fox number {index}" for index in range(8)]


@pytest.fixture(scope="session")
def sampling() -> Sampling:
    return Sampling(PROMPTS, (0,), CALL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of one session keep pictures; they only add to it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def judge(tiny: Path, sampling: Sampling, cache: Path, fill: Callable[..., None]) -> Callable[..., Evaluation]:
    """Evaluates candidates against the bundled pipeline."""

    def judge(
        *candidates: Path, limits: Sequence[Limit] = (), share_text: bool = True, drawable: bool = True
    ) -> Evaluation:
        if drawable:
            fill(cache, tiny, candidates, sampling, share_text)
        models = [str(candidate) for candidate in candidates]
        return evaluate(str(tiny), models, sampling, limits=limits, share_text=share_text, denoiser=False, cache=cache)

    return judge


@pytest.fixture(scope="session")
def measured(tiny: Path, convert: Callable[[str], Path], sampling: Sampling, cache: Path) -> Evaluation:
    """Everything that can be measured, of a checkpoint whose transformer is in fp8 and whose T5 is in mxfp4."""
    text = "  text_encoder_2: {backend: mxfp4}\n"
    out = convert(f"model: builtin:tiny-flux\ncomponents:\n  transformer: {{backend: float8}}\n{text}")
    return evaluate(str(tiny), [str(out)], sampling, limits=parse_gate("lpips<0.1"), cache=cache)


@pytest.fixture
def damage(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a pipeline, one of whose weight files went through `change`."""

    def damage(model: Path, component: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
        copy = Path(shutil.copytree(model, tmp_path / "damaged"))
        file = next((copy / component).glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return copy

    return damage


@pytest.fixture
def twin(tiny: Path, tmp_path: Path) -> Path:
    """The original under another name, its files a day older."""
    copy = Path(shutil.copytree(tiny, tmp_path / "twin"))
    for file in copy.rglob("*"):
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 86400))
    return copy


@pytest.fixture(scope="session")
def small_text(convert: Callable[[str], Path]) -> Path:
    """Only its T5 is quantized, and coarsely, activations included."""
    chosen = "{backend: mxfp4, options: {activations: mxfp8}, container: bitroute}"
    return convert(f"model: builtin:tiny-flux\ncomponents:\n  text_encoder_2: {chosen}\n")


def _scores_of(lpips: Sequence[float], psnr: Sequence[float] | None = None, seeds: int = 1) -> Scores:
    values = {metric: [0.9] * len(lpips) for metric in HIGHER_IS_BETTER}
    values |= {"lpips": list(lpips), "psnr": list(psnr or (40 - 100 * value for value in lpips))}
    return Scores(values, [index // seeds for index in range(len(lpips))], [])


@pytest.fixture
def candidate() -> Callable[..., Json]:
    """Makes a candidate as report.json has it, from its LPIPS: of each sample, or one number that varies a little."""
    return _candidate


@pytest.fixture
def report() -> Callable[..., Json]:
    """Makes the content of a report.json of such candidates."""
    return _report


def _candidate(name: str, lpips: float | Sequence[float], size_bytes: int = 100, **changed: Any) -> Json:
    values = [lpips + 0.001 * ((3 * n) % 8) for n in range(8)] if isinstance(lpips, int | float) else list(lpips)
    scores = _scores_of(values, changed.pop("psnr", None), len(values) // len(FOXES))
    errors = [{"prompt": index, "relative_error": value / 2} for index, value in enumerate(values[: len(FOXES)])]
    samples = [{metric: plain(values[n]) for metric, values in scores.values.items()} for n in range(len(values))]
    return {
        "name": name, "verdict": f"{name} differs measurably.", "passed": True, "closeness": "", "tripwires": [],
        "size_bytes": size_bytes, "bits_per_weight": {"transformer": 8.25}, "recipe": None, "measured": {},
        "pictures": f"pictures/candidate-{name}", "scores": scores.describe(),
        "gate": [{"limit": "lpips < 0.9", "mean": 0.1, "holds": True}],
        "trajectory": {"timesteps": [], "prompts": errors}, "samples": samples, **changed,
    }  # fmt: skip


def _report(*candidates: Json, seeds: Sequence[int] = (0,), **changed: Any) -> Json:
    drawn = [(prompt, seed) for prompt in enumerate(FOXES) for seed in seeds]
    for found in candidates:
        for ((index, prompt), seed), sample in zip(drawn, found["samples"], strict=False):
            sample |= {"prompt": prompt, "seed": seed, "picture": f"{index:04d}-{seed}.png"}
    sampling = {
        "prompts": FOXES, "seeds": list(seeds), "call": {"num_inference_steps": 4}, "device": "cpu", "threads": 1,
        "attention": "default", "pipeline": None, "inputs": {},
    }  # fmt: skip
    return {
        "schema": "bitroute-report/1", "verdict": "", "passed": True,
        "original": {"name": "tiny", "size_bytes": 900, "pictures": "pictures/original", "pictures_sha256": "a" * 64},
        "sampling": sampling, "floor": {"drawn again": _scores_of([0.0] * 8, [math.inf] * 8).describe()},
        "unrelated_lpips": 0.5, "notes": ["LPIPS on pictures enlarged to 64 px"], "candidates": list(candidates),
        **changed,
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a report with tiny pictures and returns its folder."""

    def write(content: Json, name: str = "report") -> Path:
        folder = tmp_path / name
        for number, entry in enumerate([content["original"], *content["candidates"]]):
            for index in range(len(FOXES)):
                for seed in content["sampling"]["seeds"]:
                    file = folder / entry["pictures"] / f"{index:04d}-{seed}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (4, 4), (number, index, seed)).save(file)
        (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write
