"""Replaying: nothing lost is exactly 0, more bits are better at every step, and a sabotaged layer is named."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute.convert.record import read_record
from bitroute.errors import JobError
from bitroute.eval.recording import record
from bitroute.eval.replay import Replay, relative_error, replay, replay_apart
from bitroute.eval.sampling import Sampling

LAYER = "transformer_blocks.1.attn.to_k"
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def recorded(tiny: Path, sampling: Sampling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    record(tiny, sampling, folder, prompts=2)
    return folder


@pytest.fixture(scope="module")
def play(tiny: Path, sampling: Sampling, recorded: Path) -> Callable[[Path], Replay]:
    made: dict[Path, Replay] = {}

    def play(candidate: Path) -> Replay:
        if candidate not in made:
            made[candidate] = replay(candidate, tiny, recorded, sampling)
        return made[candidate]

    return play


@pytest.fixture
def quantized(convert: Callable[[str], Path]) -> Callable[[str], Path]:
    """The bundled pipeline with its whole transformer in one format."""
    return lambda backend: convert(f"model: builtin:tiny-flux\ncomponents:\n  transformer: {{backend: {backend}}}\n")


def errors(found: Replay) -> list[float]:
    return [step["relative_error"] for step in found.trajectory["timesteps"]]


def test_the_original_has_no_error_at_all(tiny: Path, sampling: Sampling, recorded: Path) -> None:
    found = replay_apart(tiny, tiny, recorded, sampling)
    exact = {"relative_error": 0.0, "low": 0.0, "high": 0.0}
    assert found.trajectory["timesteps"] == [
        {"step": step, "timestep": timestep, **exact} for step, timestep in enumerate([1000, 750, 500, 250])
    ]
    assert found.layers == []


def test_eight_bits_are_better_than_four_at_every_step(
    play: Callable[[Path], Replay], quantized: Callable[[str], Path]
) -> None:
    fine = [errors(play(quantized(backend))) for backend in ("int8", "float8")]
    coarse = [errors(play(quantized(backend))) for backend in ("nf4", "mxfp4")]
    for step in range(4):
        assert 0 < max(found[step] for found in fine) < 0.5 * min(found[step] for found in coarse)


def test_each_quantized_layer_is_there_worst_first_with_its_backend(
    play: Callable[[Path], Replay], convert: Callable[[str], Path]
) -> None:
    checkpoint = convert("tiny-flux-mixed")
    transformer = next(found for found in read_record(checkpoint).components if found.name == "transformer")
    layers = play(checkpoint).layers
    assert {(found["layer"], found["backend"]) for found in layers} == {
        (entry.layer, entry.backend.name) for entry in transformer.entries if entry.quantized
    }
    ordered = [found["relative_error"] for found in layers]
    assert ordered == sorted(ordered, reverse=True)
    assert 0 < ordered[-1] < ordered[0] < 0.2


def test_a_process_of_its_own_finds_the_same(
    play: Callable[[Path], Replay], quantized: Callable[[str], Path], tiny: Path, recorded: Path, sampling: Sampling
) -> None:
    checkpoint = quantized("mxfp4")
    assert replay_apart(checkpoint, tiny, recorded, sampling) == play(checkpoint)


@pytest.fixture
def sabotage(tmp_path: Path) -> Callable[[Path, str, Change], Path]:
    """A copy in which one stored tensor of LAYER is another one; the file's metadata stays, torchao needs it."""

    def sabotage(checkpoint: Path, suffix: str, change: Change) -> Path:
        copy = Path(shutil.copytree(checkpoint, tmp_path / "sabotaged"))
        entries = read_record(checkpoint).components[0].entries
        name = next(entry.tensors[suffix][0] for entry in entries if entry.layer == LAYER and entry.quantized)
        file = next((copy / "transformer").glob("*.safetensors"))
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        changed = change(tensors[name]).contiguous()
        assert changed.view(torch.uint8).ne(tensors[name].view(torch.uint8)).any()
        save_file({**tensors, name: changed}, file, metadata)
        return copy

    return sabotage


def swap_nibbles(codes: Tensor) -> Tensor:
    return codes << 4 | codes >> 4


def flip_rows(scales: Tensor) -> Tensor:
    return scales.flip(0)


def transpose(scales: Tensor) -> Tensor:
    """In the same shape: what a writer does that takes columns for rows."""
    return scales.T.contiguous().reshape(scales.shape)


@pytest.mark.parametrize(
    ("backend", "suffix", "change", "lowest"),
    [
        ("mxfp4", "qdata", torch.zeros_like, 0.99),
        ("int8", "qdata", torch.zeros_like, 0.99),
        ("mxfp4", "qdata", swap_nibbles, 0.5),
        ("nf4", "codes", swap_nibbles, 0.5),
        ("nvfp4", "qdata", swap_nibbles, 0.5),
        ("mxfp4", "scale", transpose, 0.2),
        ("nvfp4", "scale", transpose, 0.2),
        ("int8", "scale", flip_rows, 0.2),
    ],
)
def test_a_sabotaged_layer_comes_first_and_the_others_are_as_before(
    play: Callable[[Path], Replay], quantized: Callable[[str], Path], sabotage: Callable[..., Path], backend: str,
    suffix: str, change: Change, lowest: float,
) -> None:  # fmt: skip
    healthy = quantized(backend)
    before, after = play(healthy), play(sabotage(healthy, suffix, change))
    first, *others = after.layers
    assert first["layer"] == LAYER
    assert first["relative_error"] > max(lowest, 2 * others[0]["relative_error"])
    assert others == [found for found in before.layers if found["layer"] != LAYER]
    assert sum(errors(after)) > sum(errors(before))


def test_a_layer_that_decodes_to_nan_is_a_job_error(
    quantized: Callable[[str], Path], sabotage: Callable[..., Path], tiny: Path, recorded: Path, sampling: Sampling
) -> None:
    broken = sabotage(quantized("int8"), "scale", lambda scales: torch.full_like(scales, math.nan))
    with pytest.raises(JobError, match=r"transformer, step 0: the output cannot be compared"):
        replay_apart(broken, tiny, recorded, sampling)


def test_weights_that_the_loader_would_make_up_are_a_job_error(
    quantized: Callable[[str], Path], damage: Callable[..., Path], play: Callable[[Path], Replay]
) -> None:
    without_metadata = damage(quantized("int8"), "transformer", lambda tensors: None)
    with pytest.raises(JobError, match="52 tensors of 'transformer' are not in the checkpoint"):
        play(without_metadata)


def test_a_relative_error_is_defined_for_zeros() -> None:
    zeros, ones = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, ones) == 1
    assert relative_error(1.5 * ones, ones) == 0.5
    assert relative_error(ones, zeros) == math.inf
