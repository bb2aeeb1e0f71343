"""Pictures and weights that no score may be trusted on, and ones that only look like it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.sampling import Sample
from bitroute.eval.tripwires import bad_pictures, broken_text, unquantized, unrelated

SAMPLES = [Sample(0, "a fox", 0), Sample(1, "a cat", 0)]
NAME = "diffusion_pytorch_model.safetensors"


def noise(seed: int, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def colour(red: int, green: int, blue: int) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].expand(3, 32, 32).clone()


def icon(seed: int) -> Tensor:
    """A small drawing on pure white."""
    picture = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    picture[:, 12:20, 12:20] = noise(seed, 8)
    return picture


def found(folder: Path, *pictures: Tensor) -> str:
    return "; ".join(bad_pictures(SAMPLES[: len(pictures)], pictures, folder))


def test_pictures_of_noise_and_icons_on_white_pass(tmp_path: Path) -> None:
    assert found(tmp_path, noise(0), noise(1)) == ""
    assert found(tmp_path, icon(0), icon(1)) == ""


@pytest.mark.parametrize("flat", [colour(0, 0, 0), colour(255, 255, 255), colour(127, 127, 127), colour(200, 50, 30)])
def test_a_picture_of_one_colour_is_named(tmp_path: Path, flat: Tensor) -> None:
    assert "pictures of a single colour: 0001-0" in found(tmp_path, noise(0), flat)


def test_a_black_picture_with_a_little_noise_is_still_one_colour(tmp_path: Path) -> None:
    assert "single colour: 0000-0" in found(tmp_path, noise(0) // 128, noise(1))


def test_a_black_frame_among_good_ones_is_named(tmp_path: Path) -> None:
    video = torch.stack([noise(2), noise(3), noise(4), colour(0, 0, 0)])
    assert "single colour: frame 3 of 0001-0 (" in found(tmp_path, noise(0), video)


def test_a_video_that_is_black_throughout_is_named_once(tmp_path: Path) -> None:
    assert "single colour: 0001-0 (" in found(tmp_path, noise(0), colour(0, 0, 0).repeat(5, 1, 1, 1))


def test_the_same_video_for_two_prompts_is_named_with_both(tmp_path: Path) -> None:
    video = torch.stack([noise(0), noise(1)])
    assert "different prompts: 0000-0, 0001-0" in found(tmp_path, video, video.clone())
    assert found(tmp_path, video, video.flip(0)) == ""


def test_a_picture_of_nothing_but_extremes_is_saturated(tmp_path: Path) -> None:
    assert "saturated pictures: 0000-0" in found(tmp_path, (noise(0) // 128) * 255, noise(1))


def test_the_same_picture_for_two_prompts_is_named_with_both(tmp_path: Path) -> None:
    assert "identical pictures for different prompts: 0000-0, 0001-0" in found(tmp_path, noise(0), noise(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_in_the_latents_is_enough(tmp_path: Path, value: float) -> None:
    latents = torch.zeros(1, 4, 8, dtype=torch.bfloat16)
    latents[0, 3, 7] = value
    save_file({"latents/0": latents, "latents/1": torch.zeros(1, 4, 8)}, tmp_path / "0001-0.safetensors")
    save_file({"latents/0": torch.zeros(1, 4, 8)}, tmp_path / "0000-0.safetensors")
    assert found(tmp_path, noise(0), noise(1)) == "NaN or infinite latents in 0001-0 (prompt-seed)"


def test_many_bad_pictures_make_one_short_sentence(tmp_path: Path) -> None:
    samples = [Sample(index, f"prompt {index}", 0) for index in range(1000)]
    sentences = list(bad_pictures(samples, [colour(0, 0, 0)] * 1000, tmp_path))
    assert "and 997 more" in sentences[0]
    assert max(map(len, sentences)) < 150


def test_pictures_as_far_away_as_those_of_other_prompts_have_nothing_in_common() -> None:
    assert list(unrelated(0.3, 0.5)) == list(unrelated(0.3, None)) == []
    assert "nothing to do with the original's: LPIPS 0.61" in next(unrelated(0.61, 0.5))
    assert "nothing to do with the original's: LPIPS 0.65" in next(unrelated(0.65, None))


@pytest.mark.parametrize("share_text", [True, False])
def test_a_copy_of_the_original_is_unquantized(tiny: Path, twin: Path, share_text: bool) -> None:
    assert list(unquantized(tiny, twin, share_text)) == [
        "every component holds the original's weights: nothing is quantized"
    ]


def test_the_originals_weights_in_other_files_are_still_the_originals(tiny: Path, source: Path) -> None:
    folder = source / "transformer"
    tensors = sorted(load_file(folder / NAME).items())
    (folder / NAME).unlink()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = [dict(tensors[:30]), dict(tensors[30:])]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, {"format": "pt", "quantized": "certainly"})
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / f"{NAME}.index.json").write_text(f'{{"weight_map": {weight_map!r}}}'.replace("'", '"'))
    assert "nothing is quantized" in next(unquantized(tiny, source, True))


@pytest.mark.parametrize("recipe", ["tiny-flux-fp8", "tiny-flux-nf4"])
def test_a_quantized_checkpoint_is_not_called_unquantized(
    tiny: Path, convert: Callable[[str], Path], recipe: str
) -> None:
    assert list(unquantized(tiny, convert(recipe), True)) == []


def test_one_changed_bit_is_a_change(tiny: Path, damage: Callable[..., Path]) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.conv_out.bias"].view(torch.uint8)[0] ^= 1

    assert list(unquantized(tiny, damage(tiny, "vae", flip), True)) == []


def test_quantized_text_encoders_that_are_not_used_are_told_apart(tiny: Path, small_text: Path) -> None:
    assert "--own-text" in next(unquantized(tiny, small_text, True))
    assert list(unquantized(tiny, small_text, False)) == []


def test_weights_that_cannot_be_read_are_not_taken_for_the_originals(tiny: Path, source: Path) -> None:
    shutil.move(source / "vae" / NAME, source / "vae" / "diffusion_pytorch_model.bin")
    assert list(unquantized(tiny, source, True)) == []
    assert list(unquantized(source, source, True)) == []


def test_a_text_encoder_that_says_something_else_is_named() -> None:
    errors = {"text_encoder": {"relative_error": 1.0}, "text_encoder_2": {"relative_error": 0.06}}
    assert list(broken_text(errors)) == ["'text_encoder' encodes prompts unlike the original's: relative error 1.00"]


def test_damaged_latents_name_the_folder_to_remove(tmp_path: Path) -> None:
    sample = Sample(0, "fox", 0)
    (tmp_path / f"{sample.stem}.safetensors").write_bytes(b"damaged")
    picture = torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8)
    with pytest.raises(JobError, match="remove "):
        list(bad_pictures([sample], [picture], tmp_path))
