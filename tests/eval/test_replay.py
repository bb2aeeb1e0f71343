"""Replaying: nothing lost is exactly 0, more bits are better at every step, and a sabotaged layer is named."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute.convert.record import read_record
from bitroute.errors import JobError
from bitroute.eval.generate import load
from bitroute.eval.recording import Recorder, record
from bitroute.eval.replay import Replay, keep, read_kept, relative_error, replay, replay_apart
from bitroute.eval.sampling import Sampling

TWO_COMPONENTS = """\
model: builtin:tiny-flux
components:
  transformer: {backend: mxfp4}
  text_encoder_2: {backend: float8}
"""
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


def test_the_original_has_no_error_at_all(play: Callable[[Path], Replay], tiny: Path) -> None:
    found = play(tiny)
    exact = {"relative_error": 0.0, "low": 0.0, "high": 0.0}
    assert found.trajectory["timesteps"] == [
        {"step": step, "timestep": timestep, **exact} for step, timestep in enumerate([1000, 750, 500, 250])
    ]
    assert found.trajectory["prompts"] == [{"prompt": prompt, "relative_error": 0.0} for prompt in range(2)]
    assert found.layers == []
    assert found.text == {}


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
    for found in layers:
        errors = [at["relative_error"] for at in found["steps"]]
        assert len(errors) == 3 and found["relative_error"] == pytest.approx(sum(errors) / 3)
    assert len({tuple(at["step"] for at in found["steps"]) for found in layers}) == 1


def test_prompts_and_steps_have_the_same_mean(play: Callable[[Path], Replay], quantized: Callable[[str], Path]) -> None:
    found = play(quantized("nf4"))
    prompts = [prompt["relative_error"] for prompt in found.trajectory["prompts"]]
    assert len(prompts) == 2 and prompts[0] != prompts[1]
    assert fmean(prompts) == pytest.approx(fmean(errors(found)), rel=1e-12)


def test_a_process_of_its_own_finds_the_same_and_only_once(
    play: Callable[[Path], Replay], convert: Callable[[str], Path], tiny: Path, recorded: Path, sampling: Sampling,
    tmp_path: Path,
) -> None:  # fmt: skip
    checkpoint = convert(TWO_COMPONENTS)
    (tmp_path / "replay.json").write_text("cut")
    found = replay_apart(checkpoint, tiny, recorded, sampling, tmp_path)
    assert found == play(checkpoint)
    assert replay_apart(checkpoint, tiny, tmp_path / "nothing", sampling, tmp_path) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-9],
        lambda text: text.replace("0.25", "0.75"),
        lambda text: text.replace("layers", "stairs"),
        lambda _: "[]",
    ],
)
def test_a_kept_result_that_was_changed_is_not_believed(tmp_path: Path, change: Callable[[str], str]) -> None:
    file = tmp_path / "replay.json"
    made = Replay({"prompts": [{"prompt": 0, "relative_error": 0.25}]}, [], {"text_encoder": {"low": None}})
    assert read_kept(file) is None
    keep(made, file)
    assert read_kept(file) == made
    file.write_text(change(file.read_text()))
    assert read_kept(file) is None


def test_a_recording_that_was_cut_off_is_a_job_error(
    tiny: Path, recorded: Path, sampling: Sampling, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(recorded, tmp_path / "recorded"))
    file = broken / "0000-0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(JobError, match=r"damaged\n(.*\n)*.*remove .*recorded and evaluate again"):
        replay(tiny, tiny, broken, sampling)


def test_the_attention_kernel_is_the_samplings(tiny: Path, recorded: Path, sampling: Sampling, tmp_path: Path) -> None:
    plain = replace(sampling, attention="math")
    record(tiny, plain, tmp_path, prompts=2)
    assert errors(replay(tiny, tiny, tmp_path, plain)) == [0, 0, 0, 0]
    assert min(errors(replay(tiny, tiny, tmp_path, sampling))) > 0


def given_to_flux(model: Path, sampling: Sampling) -> list[tuple[Tensor, Tensor]]:
    """Of each of two prompts what CLIP and T5 answer."""
    pipe = load(model, "cpu")
    with torch.inference_mode():
        made = [pipe.encode_prompt(prompt, max_sequence_length=16) for prompt in sampling.prompts[:2]]
    return [(of_clip, of_t5) for of_t5, of_clip, _ in made]


def louder(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith("fc1.weight"):
            tensors[name] = tensors[name] * 1.1


def test_the_error_of_a_text_encoder_is_that_of_what_the_denoiser_is_given(
    play: Callable[[Path], Replay], damage: Callable[..., Path], small_text: Path, tiny: Path, sampling: Sampling
) -> None:
    checkpoint = damage(small_text, "text_encoder", louder)
    found = play(checkpoint)
    assert list(found.text) == ["text_encoder", "text_encoder_2"]
    pairs = list(zip(given_to_flux(checkpoint, sampling), given_to_flux(tiny, sampling), strict=True))
    for place, text in enumerate(found.text.values()):
        wanted = [relative_error(own[place], original[place]) for own, original in pairs]
        assert text["relative_error"] == pytest.approx(fmean(wanted))
        assert (text["low"], text["high"]) == (pytest.approx(min(wanted)), pytest.approx(max(wanted)))
        assert text["prompts"] == 2 and 0.001 < min(wanted) < max(wanted) < 0.5


def test_a_text_encoder_that_answers_nan_is_a_job_error(
    play: Callable[[Path], Replay], damage: Callable[..., Path], tiny: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["shared.weight"].fill_(math.nan)

    with pytest.raises(JobError, match="text_encoder_2, prompt 0: the output cannot be compared"):
        play(damage(tiny, "text_encoder_2", spoil))


@pytest.mark.parametrize("backend", ["bnb-int8", "nf4", "float8", "quanto-int8", "mxfp4"])
def test_a_text_encoder_of_every_container_is_asked(
    convert: Callable[[str], Path], play: Callable[[Path], Replay], backend: str
) -> None:
    recipe = f"model: builtin:tiny-flux\ncomponents:\n  text_encoder_2: {{backend: {backend}}}\n"
    found = play(convert(recipe))
    assert list(found.text) == ["text_encoder_2"]
    assert 0 < found.text["text_encoder_2"]["relative_error"] < 0.5
    assert errors(found) == [0, 0, 0, 0]


def test_tokens_that_the_encoders_mask_hides_do_not_count(
    tiny: Path, small_text: Path, sampling: Sampling, tmp_path: Path
) -> None:
    mask = torch.tensor([[1] * 3 + [0] * 13])
    ids = []

    def give_mask(_: Any, args: Any, options: dict[str, Any]) -> Any:
        ids.append(args[0])
        return args, {**options, "attention_mask": mask}

    pipe = load(tiny, "cpu")
    pipe.text_encoder_2.register_forward_pre_hook(give_mask, with_kwargs=True)
    recorder = Recorder(pipe)
    recorder.record(sampling, next(sampling.samples()), layers=False).save(tmp_path / "0.safetensors")
    (tmp_path / "run.json").write_text('{"samples": ["0"], "denoisers": [], "text_encoders": ["text_encoder_2"]}')
    with torch.inference_mode():
        found, wanted = (
            load(model, "cpu").text_encoder_2(ids[0], attention_mask=mask)[0] for model in (small_text, tiny)
        )
    error = replay(small_text, tiny, tmp_path, sampling).text["text_encoder_2"]["relative_error"]
    assert error == pytest.approx(relative_error(found[:, :3], wanted[:, :3]))
    assert error != pytest.approx(relative_error(found, wanted))


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
        replay(broken, tiny, recorded, sampling)


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
