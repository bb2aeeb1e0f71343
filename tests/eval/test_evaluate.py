"""Candidates against their original: the order of the formats, the cache, and what must not pass."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bitroute.errors import JobError, RecipeError, SourceError
from bitroute.eval.evaluate import Evaluation, evaluate
from bitroute.eval.gate import parse_gate
from bitroute.eval.judge import closeness
from bitroute.eval.metrics import mse_to_db
from bitroute.eval.page import write_page
from bitroute.eval.report import candidate_verdict, write_report
from bitroute.eval.sampling import Sampling, read_prompts
from bitroute.eval.scores import Scores, score

Judge = Callable[..., Evaluation]
Damage = Callable[..., Path]
Convert = Callable[[str], Path]
Tensors = dict[str, Tensor]
NAME = "diffusion_pytorch_model.safetensors"


def scores_of(*decibels: float) -> Scores:
    flat = [0.0] * len(decibels)
    values = {"lpips": flat, "psnr": list(decibels), "ssim": flat, "ms_ssim": flat}
    return Scores(values, list(range(len(decibels))), [])


def snapshot(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def zero_a_layer(tensors: Tensors) -> None:
    tensors["single_transformer_blocks.0.proj_out.weight"].zero_()


def swap_the_nibbles(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("qdata") and tensors[name].dtype == torch.uint8:
            tensors[name] = (tensors[name] >> 4) | (tensors[name] << 4)


def decode_to_black(tensors: Tensors) -> None:
    tensors["decoder.conv_out.weight"].zero_()
    tensors["decoder.conv_out.bias"].fill_(-1)


def put_a_nan(tensors: Tensors) -> None:
    tensors["norm_out.linear.bias"][0] = math.nan


def test_eight_bits_beat_four_and_the_noise_floor_beats_them_all(
    tiny: Path, convert: Convert, fill: Callable[..., None], sampling: Sampling, tmp_path: Path
) -> None:
    call = {**sampling.call, "num_inference_steps": 20}
    long = replace(sampling, prompts=read_prompts("emoji-16")[:6], call=call)
    formats = ("int8", "fp8", "nf4", "mxfp4")
    models = [convert(f"tiny-flux-{name}") for name in formats]
    fill(tmp_path, tiny, models, long)
    found = evaluate(str(tiny), [str(model) for model in models], long, denoiser=False, cache=tmp_path)
    scored = [candidate.scores for candidate in found.candidates if candidate.scores]
    assert found.passed and len(scored) == 4
    int8, fp8, nf4, mxfp4 = ((found.mean("psnr"), -found.mean("lpips")) for found in scored)
    floors = [(floor.mean("psnr"), -floor.mean("lpips")) for floor in found.floor.values()]
    eight, four = (int8, fp8), (nf4, mxfp4)
    for axis in (0, 1):
        assert min(floor[axis] for floor in floors) > max(one[axis] for one in eight)
        assert min(one[axis] for one in eight) > max(one[axis] for one in four)
    assert found.floor["drawn again"].identical
    assert min(one[0] for one in eight) > 45 and min(one[0] for one in four) > 33
    assert found.unrelated_lpips and found.unrelated_lpips > 0.3


def test_a_second_candidate_redraws_nothing_of_the_original(
    tiny: Path, convert: Convert, fill: Callable[..., None], sampling: Sampling, tmp_path: Path
) -> None:
    first, second = (str(convert(name)) for name in ("tiny-flux-fp8", "tiny-flux-nf4"))
    fill(tmp_path, tiny, [Path(first)], sampling)
    before = snapshot(tmp_path)
    assert evaluate(str(tiny), [first], sampling, denoiser=False, cache=tmp_path).passed
    assert snapshot(tmp_path) == before
    fill(tmp_path, tiny, [Path(second)], sampling)
    assert evaluate(str(tiny), [first, second], sampling, denoiser=False, cache=tmp_path).passed
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before if not name.endswith("/lock")} == {
        name: changed for name, changed in before.items() if not name.endswith("/lock")
    }
    assert len({Path(name).parent for name in after}) == 5


def test_the_original_under_another_name_is_identical_and_rejected(twin: Path, judge: Judge) -> None:
    found = judge(twin)
    (candidate,) = found.candidates
    assert candidate.closeness == "identical" and not candidate.passed
    assert candidate.tripwires == ["every component holds the original's weights: nothing is quantized"]
    assert "Its pictures are identical" in candidate_verdict(candidate, found)


def test_a_candidate_of_which_only_text_encoders_are_quantized_needs_its_own(small_text: Path, judge: Judge) -> None:
    assert "--own-text" in judge(small_text).candidates[0].tripwires[0]
    own = judge(small_text, share_text=False).candidates[0]
    assert own.passed and own.closeness == ""
    assert own.scores and own.scores.mean("psnr") < 60


def test_a_layer_of_zeros_fails_the_gate_and_the_sentence_says_by_how_much(
    tiny: Path, judge: Judge, damage: Damage
) -> None:
    found = judge(damage(tiny, "transformer", zero_a_layer), limits=parse_gate("psnr>35"))
    (candidate,) = found.candidates
    assert not candidate.tripwires and not candidate.passed
    assert "differs measurably" in candidate_verdict(candidate, found)
    assert candidate.scores and candidate.scores.mean("psnr") < 30
    words = f"It fails the gate: psnr > 35 (is {candidate.scores.mean('psnr'):.1f})."
    assert words in candidate_verdict(candidate, found)


@pytest.mark.parametrize(
    ("recipe", "component", "change", "reason"),
    [
        ("tiny-flux-mxfp4", "transformer", swap_the_nibbles, "nothing to do with the original's"),
        ("tiny-flux-nf4", "vae", decode_to_black, "pictures of a single colour"),
        ("tiny-flux-nf4", "transformer", put_a_nan, "NaN or infinite latents"),
    ],
)
def test_sabotage_is_rejected_with_the_reason(
    convert: Convert, judge: Judge, damage: Damage, recipe: str, component: str,
    change: Callable[[Tensors], None], reason: str,
) -> None:  # fmt: skip
    found = judge(damage(convert(recipe), component, change), limits=parse_gate("psnr>0"))
    (candidate,) = found.candidates
    assert not found.passed
    assert reason in candidate_verdict(candidate, found)


def test_an_original_that_draws_black_is_refused(
    tiny: Path, damage: Damage, fill: Callable[..., None], sampling: Sampling, tmp_path: Path
) -> None:
    black = damage(tiny, "vae", decode_to_black)
    fill(tmp_path / "cache", black, [], sampling)
    with pytest.raises(JobError, match="the original itself draws broken pictures") as error:
        evaluate(str(black), [str(tiny)], sampling, denoiser=False, cache=tmp_path / "cache")
    assert "single colour" in str(error.value)


def test_a_candidate_that_does_not_load_is_rejected_and_the_others_are_judged(
    convert: Convert, judge: Judge, output: Path, cache: Path
) -> None:
    weights = output / "transformer" / NAME
    os.truncate(weights, weights.stat().st_size // 2)
    good = convert("tiny-flux-nf4")
    judge(good)
    found = judge(output, good, drawable=False)
    bad, fine = found.candidates
    assert fine.passed and not found.passed and not bad.passed
    assert bad.run is None and bad.scores is None and bad.closeness == ""
    (reason,) = bad.tripwires
    assert reason.startswith("the pipeline does not draw: ") and "\n" not in reason
    assert str(output) not in reason and str(cache) not in reason and str(Path.home()) not in reason


def test_pictures_of_another_size_are_rejected_with_both_sizes(
    tiny: Path, twin: Path, judge: Judge, cache: Path, sampling: Sampling, tmp_path: Path
) -> None:
    judge(twin)
    folder = cache / sampling.key(twin, tiny)
    for file in folder.glob("*.png"):
        Image.open(file).resize((32, 48)).save(file)
    found = judge(twin, drawable=False)
    (candidate,) = found.candidates
    assert candidate.scores is None
    assert "64" in candidate.tripwires[-1] and "48" in candidate.tripwires[-1]
    content = write_report(found, tmp_path / "report")
    assert "48" in content["verdict"] and write_page(content, tmp_path / "report").is_file()


def test_a_damaged_picture_in_the_cache_names_the_folder_to_remove(
    tiny: Path, fill: Callable[..., None], sampling: Sampling, tmp_path: Path
) -> None:
    fill(tmp_path, tiny, [], sampling)
    folder = tmp_path / sampling.key(tiny)
    os.truncate(folder / "0001-0.png", 100)
    with pytest.raises(JobError, match="a drawn picture cannot be read") as error:
        evaluate(str(tiny), [str(tiny)], sampling, denoiser=False, cache=tmp_path)
    assert f"remove {folder}" in str(error.value)


def test_candidates_of_one_name_are_told_apart_and_the_same_twice_counts_once(
    tiny: Path, judge: Judge, tmp_path: Path
) -> None:
    folders = [tmp_path / part / "here" / "out" for part in ("one", "two")]
    for folder in folders:
        shutil.copytree(tiny, folder)
    found = judge(*folders, folders[0], tiny)
    assert [candidate.name for candidate in found.candidates] == ["one/here/out", "two/here/out", "tiny-flux"]


def test_a_model_that_is_not_there_is_refused_before_anything_is_drawn(
    tiny: Path, sampling: Sampling, tmp_path: Path
) -> None:
    with pytest.raises(SourceError):
        evaluate(str(tiny), [str(tmp_path / "nothing")], sampling, denoiser=False, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_candidate_with_a_fused_lora_is_not_held_against_the_original_without_it(
    source: Path, tiny: Path, sampling: Sampling
) -> None:
    lora = {"path": "style.safetensors", "sha256": "0" * 64, "scale": 1.0, "into": None}
    (source / "bitroute.json").write_text(json.dumps({"source": {"model": str(tiny), "loras": [lora]}}))
    with pytest.raises(RecipeError, match="has LoRAs in its weights that the original has not"):
        evaluate(str(tiny), [str(source)], sampling)


def test_within_one_decibel_of_the_floor_is_indistinguishable() -> None:
    floor = {"drawn again": scores_of(math.inf, math.inf), "another attention kernel": scores_of(56.0, 56.0)}
    found = [closeness(scores_of(value, value), floor) for value in (60.0, 55.1, 54.9, math.inf)]
    assert found == ["indistinguishable", "indistinguishable", "", "identical"]
    assert closeness(None, floor) == ""


def test_one_bad_sample_does_not_hide_behind_good_ones() -> None:
    floor = {"another attention kernel": scores_of(*[56.0] * 8)}
    assert scores_of(*[62.0] * 7, 25.0).mean("psnr") > 56
    assert closeness(scores_of(*[62.0] * 7, 25.0), floor) == ""
    assert closeness(scores_of(*[math.inf] * 7, 25.0), floor) == ""


def test_nothing_but_identical_is_within_a_floor_without_noise() -> None:
    floor = {"drawn again": scores_of(math.inf), "another attention kernel": scores_of(math.inf)}
    assert closeness(scores_of(90.0), floor) == ""
    assert closeness(scores_of(math.inf), floor) == "identical"


def test_a_picture_one_level_off_scores_as_the_formula_says(sampling: Sampling) -> None:
    samples = list(sampling.samples())
    first = [torch.full((3, 64, 64), 100 + index, dtype=torch.uint8) for index in range(3)]
    found = score(samples, first, [picture + 1 for picture in first])
    assert found.values["psnr"] == pytest.approx([mse_to_db(1.0)] * 3)
    assert not found.identical and score(samples, first, first).identical
