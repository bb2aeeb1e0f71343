"""One small sampling, one cache of its pictures, and checkpoints to damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute.eval.evaluate import Evaluation, evaluate
from bitroute.eval.gate import Limit
from bitroute.eval.sampling import Sampling

CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 16}
PROMPTS = ("red apple, noto style", "fox, fluent style", "guitar, noto style")


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
    """Only its T5 is quantized, and coarsely."""
    return convert("model: builtin:tiny-flux\ncomponents:\n  text_encoder_2: {backend: mxfp4}\n")
