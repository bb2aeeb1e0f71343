"""Drift of the latents: known numbers, the real drawing, and files that cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.drift import drift
from bitroute.eval.generate import draw
from bitroute.eval.sampling import Sample, Sampling

SAMPLES = [Sample(prompt, "", seed) for prompt in range(2) for seed in range(2)]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A folder of samples, whose latents after each step are ones times `scale(sample, step)`."""

    def write(name: str, scale: Callable[[Sample, int], float], steps: int = 3, width: int = 8) -> Path:
        (tmp_path / name).mkdir()
        for sample in SAMPLES:
            tensors = {f"latents/{step}": ones(width) * scale(sample, step) for step in range(steps)}
            save_file(tensors, tmp_path / name / f"{sample.stem}.safetensors")
        return tmp_path / name

    return write


def ones(width: int) -> Tensor:
    return torch.ones(1, 4, width, dtype=torch.bfloat16)


def test_the_drift_is_the_mean_over_samples_with_an_interval_over_prompts(write: Write) -> None:
    original = write("original", lambda sample, step: 2)
    candidate = write("candidate", lambda sample, step: 2 + step * (1 + sample.prompt_index))
    assert drift(original, candidate, SAMPLES) == [
        {"step": 0, "relative_error": 0.0, "low": 0.0, "high": 0.0},
        {"step": 1, "relative_error": 0.75, "low": 0.5, "high": 1.0},
        {"step": 2, "relative_error": 1.5, "low": 1.0, "high": 2.0},
    ]


def test_one_prompt_has_no_interval(write: Write) -> None:
    original, candidate = write("original", lambda sample, step: 2), write("candidate", lambda sample, step: 1)
    assert drift(original, candidate, SAMPLES[:2])[2] == {
        "step": 2, "relative_error": 0.5, "low": None, "high": None
    }  # fmt: skip


def test_the_steps_of_a_long_run_are_in_order(write: Write) -> None:
    original = write("original", lambda sample, step: 1, steps=12)
    candidate = write("candidate", lambda sample, step: 1 + step, steps=12)
    found = drift(original, candidate, SAMPLES)
    assert [step["step"] for step in found] == list(range(12))
    assert [step["relative_error"] for step in found] == pytest.approx(range(12))


def test_pipelines_that_do_not_show_their_steps_have_no_drift(write: Write, tmp_path: Path) -> None:
    whole, empty = write("whole", lambda sample, step: 1), write("empty", lambda sample, step: 1, steps=0)
    assert drift(whole, empty, SAMPLES) == drift(empty, whole, SAMPLES) == []
    assert drift(whole, tmp_path, SAMPLES) == drift(tmp_path, tmp_path, SAMPLES) == []


def test_other_steps_and_other_shapes_are_refused(write: Write) -> None:
    original = write("original", lambda sample, step: 1)
    shorter, narrower = write("short", lambda *_: 1, steps=2), write("narrow", lambda *_: 1, width=1)
    with pytest.raises(JobError, match=r"0000-0: the steps are not the original's\n.*2 steps\n.*3 steps"):
        drift(original, shorter, SAMPLES)
    with pytest.raises(JobError, match=r"0000-0, step 0: the output has another shape\n.*1, 4, 1\]\n.*1, 4, 8\]"):
        drift(original, narrower, SAMPLES)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_refused(write: Write, value: float) -> None:
    original, broken = write("original", lambda *_: 1), write("broken", lambda _, step: value if step == 2 else 1)
    with pytest.raises(JobError, match="latents of 0000-0, step 2: the output cannot be compared"):
        drift(original, broken, SAMPLES)


def test_a_file_that_was_cut_off_is_named(write: Write) -> None:
    original = write("original", lambda *_: 1)
    file = original / "0001-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        JobError, match=r"0001-1\.safetensors: a file of the cache is damaged\n(.*\n)*.*remove .*original"
    ):
        drift(original, original, SAMPLES)


def test_a_drawn_candidate_drifts_from_step_to_step(
    tiny: Path, convert: Callable[[str], Path], sampling: Sampling, tmp_path: Path
) -> None:
    candidate = convert("model: builtin:tiny-flux\ncomponents:\n  transformer: {backend: mxfp4}\n")
    samples = list(sampling.samples())
    for name, model in {"original": tiny, "candidate": candidate}.items():
        draw(model, sampling, tmp_path / name)
    found = drift(tmp_path / "original", tmp_path / "candidate", samples)
    errors = [step["relative_error"] for step in found]
    assert [step["step"] for step in found] == [0, 1, 2, 3]
    assert 0 < errors[0] < min(errors[1:]) < max(errors) < 0.5
    assert all(step["low"] < step["relative_error"] < step["high"] for step in found)
    assert [step["relative_error"] for step in drift(tmp_path / "original", tmp_path / "original", samples)] == [0] * 4
