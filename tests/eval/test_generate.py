"""Drawing: the same noise and the same bytes for everyone, in whatever process, after whatever interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bitroute.errors import JobError
from bitroute.eval.generate import draw, draw_apart, load
from bitroute.eval.sampling import Sampling


def drawn(folder: Path) -> dict[str, bytes]:
    """Every picture and every file of latents."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".png", ".safetensors")}


@pytest.fixture(scope="module")
def reference(tiny: Path, sampling: Sampling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    draw(tiny, sampling, folder)
    return folder


def test_every_sample_has_a_picture_and_the_finite_latents_of_every_step(reference: Path, sampling: Sampling) -> None:
    stems = [sample.stem for sample in sampling.samples()]
    assert sorted(drawn(reference)) == sorted(f"{stem}.{end}" for stem in stems for end in ("png", "safetensors"))
    for stem in stems:
        latents = load_file(reference / f"{stem}.safetensors")
        assert sorted(latents) == [f"latents/{step}" for step in range(4)]
        assert all(found.isfinite().all() and found.dtype == torch.bfloat16 for found in latents.values())
    measured = json.loads((reference / "run.json").read_text())
    assert measured["pictures"] == 3
    assert measured["load_seconds"] > 0 and measured["seconds_per_step"] > 0 and measured["peak_bytes"] > 2**20


def test_another_seed_and_another_prompt_start_from_another_noise(
    tiny: Path, sampling: Sampling, tmp_path: Path
) -> None:
    draw(tiny, replace(sampling, prompts=("a fox", "a fox"), seeds=(0, 1)), tmp_path)
    pictures = [content for name, content in drawn(tmp_path).items() if name.endswith(".png")]
    assert len(set(pictures)) == len(pictures) == 4


def test_a_killed_run_is_taken_up_and_ends_with_the_same_bytes(tiny: Path, sampling: Sampling, tmp_path: Path) -> None:
    long = replace(sampling, prompts=sampling.prompts * 4, call={**sampling.call, "num_inference_steps": 20})
    folder = tmp_path / "killed"
    request = {"model": str(tiny), "folder": str(folder), "text_from": None, "sampling": long.request()}
    command = [sys.executable, "-P", "-m", "bitroute.eval.generate"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as process:
        assert process.stdin
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        while process.poll() is None and not list(folder.glob("*.png")):
            time.sleep(0.002)
        process.kill()
    finished = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert 0 < len(finished) < 12
    assert not (folder / "run.json").exists()
    draw(tiny, long, folder)
    draw(tiny, long, tmp_path / "whole")
    assert drawn(folder) == drawn(tmp_path / "whole")
    assert all((folder / name).stat().st_mtime_ns == changed for name, changed in finished.items())


def test_only_a_picture_that_was_removed_is_drawn_again(tiny: Path, sampling: Sampling, tmp_path: Path) -> None:
    draw(tiny, sampling, tmp_path)
    before = drawn(tmp_path)
    (tmp_path / "0001-0.png").unlink()
    draw(tiny, sampling, tmp_path)
    assert drawn(tmp_path) == before
    assert json.loads((tmp_path / "run.json").read_text())["pictures"] == 1


def test_of_two_that_draw_the_same_at_once_one_waits(
    tiny: Path, sampling: Sampling, reference: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(draw, tiny, sampling, tmp_path) for _ in range(2)]:
            done.result()
    assert drawn(tmp_path) == drawn(reference)
    assert json.loads((tmp_path / "run.json").read_text())["pictures"] == 3


def test_shared_text_encoders_are_the_originals_and_own_ones_are_not(
    tiny: Path, small_text: Path, sampling: Sampling, reference: Path, tmp_path: Path
) -> None:
    draw(small_text, sampling, tmp_path / "shared", tiny)
    draw(small_text, sampling, tmp_path / "own")
    assert drawn(tmp_path / "shared") == drawn(reference)
    assert all(content != drawn(reference)[name] for name, content in drawn(tmp_path / "own").items())


@pytest.mark.parametrize("backend", ["bnb-int8", "mxfp4"])  # the first computes in float16
def test_the_noise_does_not_depend_on_the_format_of_the_text_encoder(
    tiny: Path, convert: Callable[[str], Path], sampling: Sampling, backend: str
) -> None:
    recipe = f"model: builtin:tiny-flux\ncomponents:\n  text_encoder_2: {{backend: {backend}}}\n"
    noises = []

    def remember(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        noises.append(inputs["hidden_states"])

    for model in (tiny, convert(recipe)):
        pipe = load(model, "cpu")
        pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
        pipe("a fox", generator=torch.Generator().manual_seed(1), **{**sampling.call, "num_inference_steps": 1})
    assert noises[0].dtype == noises[1].dtype
    assert torch.equal(*noises)


def test_a_process_that_is_killed_from_outside_is_reported_as_that(
    tiny: Path, sampling: Sampling, tmp_path: Path
) -> None:
    others = set(psutil.Process().children())
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(draw_apart, tiny, sampling, tmp_path / "killed")
        while not (children := set(psutil.Process().children()) - others):
            time.sleep(0.01)
        children.pop().kill()
        with pytest.raises(JobError, match="ended by signal 9, which may mean that memory ran out"):
            done.result()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"load_seconds": "x"}', '{"load_seconds": Infinity}'])
def test_damaged_measurements_are_taken_again(tiny: Path, sampling: Sampling, tmp_path: Path, content: str) -> None:
    draw(tiny, sampling, tmp_path)
    (tmp_path / "run.json").write_text(content)
    draw(tiny, sampling, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["pictures"] == 0
