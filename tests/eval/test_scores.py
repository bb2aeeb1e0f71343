"""Scores of pictures and of videos, and what their notes say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bitroute.errors import JobError
from bitroute.eval.flip import flip
from bitroute.eval.generate import save_frames
from bitroute.eval.lpips import Lpips
from bitroute.eval.metrics import ms_ssim, mse, mse_to_db, ssim
from bitroute.eval.sampling import Sample
from bitroute.eval.scores import HIGHER_IS_BETTER, TITLES, Pictures, read_pictures, score, unrelated_lpips

ONE = [Sample(0, "a fox", 0)]


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape or (3, 64, 64), dtype=torch.uint8, generator=generator)


def moved(picture: Tensor, by: int) -> Tensor:
    return (picture.int() + by).clamp(0, 255).to(torch.uint8)


def test_every_metric_has_a_title_a_direction_and_a_value() -> None:
    found = score(ONE, [noise(0)], [noise(1)])
    assert found.values.keys() == TITLES.keys() == HIGHER_IS_BETTER.keys()


def test_identical_pictures_have_the_best_score_of_every_metric() -> None:
    found = score(ONE, [noise(0)], [noise(0)])
    best = {"lpips": 0.0, "psnr": math.inf, "ssim": 1.0, "ms_ssim": 1.0, "flip": 0.0}
    assert {metric: values[0] for metric, values in found.values.items()} == best


def test_identical_pictures_that_are_too_small_are_still_refused() -> None:
    with pytest.raises(JobError, match="too small"):
        score(ONE, [noise(0, 3, 16, 16)], [noise(0, 3, 16, 16)])


def test_a_video_scores_the_mean_of_its_frames_and_psnr_that_of_their_squares() -> None:
    first = noise(0, 3, 3, 64, 64)
    second = torch.stack([moved(frame, by) for frame, by in zip(first, (0, 3, 40), strict=True)])
    found = score(ONE, [first], [second])
    pairs = list(zip(first, second, strict=True))
    wanted = {
        "lpips": [Lpips().distance(*pair) for pair in pairs], "ssim": [ssim(*pair) for pair in pairs],
        "ms_ssim": [ms_ssim(*pair).value for pair in pairs], "flip": [flip(*pair).mean for pair in pairs],
    }  # fmt: skip
    for metric, values in wanted.items():
        assert found.values[metric][0] == pytest.approx(sum(values) / 3, abs=1e-9)
    assert found.values["psnr"][0] == pytest.approx(mse_to_db(sum(mse(*pair) for pair in pairs) / 3))
    assert "means over its frames" in found.notes[-1]


def test_one_frame_that_is_the_same_does_not_make_two_videos_identical() -> None:
    first = noise(0, 2, 3, 64, 64)
    second = torch.stack([first[0], moved(first[1], 1)])
    assert not score(ONE, [first], [second]).identical
    assert score(ONE, [first], [first]).identical


@pytest.mark.parametrize("other", [(4, 3, 64, 64), (3, 64, 64)])
def test_videos_of_two_lengths_are_refused(other: tuple[int, ...]) -> None:
    with pytest.raises(JobError, match=r"5 and \d frames"):
        score(ONE, [noise(0, 5, 3, 64, 64)], [noise(1, *other)])


def test_videos_and_pictures_of_other_prompts_are_far_away_and_other_sizes_are_not_compared() -> None:
    samples = [Sample(index, f"prompt {index}", 0) for index in range(3)]
    frames = torch.stack([noise(9), noise(1), noise(8)])
    wanted = [Lpips().distance(noise(0), noise(1)), Lpips().distance(noise(1), noise(2))]
    assert unrelated_lpips(samples[:2], [noise(0), frames]) == pytest.approx(wanted[0])
    mixed = [noise(0), noise(1), noise(2, 3, 64, 72)]
    assert unrelated_lpips(samples, mixed) == pytest.approx(wanted[0])
    assert unrelated_lpips(samples[:2], mixed[1:]) is None
    assert unrelated_lpips(samples[:1], mixed[:1]) is None


def test_pictures_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    samples = [Sample(index, "a fox", 0) for index in range(3)]
    found = read_pictures(tmp_path, samples)
    assert isinstance(found, Pictures)
    for sample in samples:
        Image.new("RGB", (5, 4), (sample.prompt_index, 0, 0)).save(tmp_path / f"{sample.stem}.png")
    assert [int(picture[0, 0, 0]) for picture in found] == [0, 1, 2]
    assert [int(picture[0, 0, 0]) for picture in found[1:]] == [1, 2]
    assert found[0].shape == (3, 4, 5)


def test_a_video_comes_back_frame_by_frame_and_bit_by_bit(tmp_path: Path) -> None:
    frames = torch.stack([noise(0), noise(0), noise(1), noise(0)])  # equal neighbours stay two
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    save_frames(images, tmp_path / "0000-0.png")
    assert torch.equal(read_pictures(tmp_path, ONE)[0], frames)
    save_frames(images[:1] * 3, tmp_path / "0000-0.png")
    assert torch.equal(read_pictures(tmp_path, ONE)[0], frames[:1].repeat(3, 1, 1, 1))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_damaged_video_is_named(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "0000-0.png"
    save_frames([Image.fromarray(noise(seed).permute(1, 2, 0).numpy()) for seed in range(3)], file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(JobError, match=r"0000-0\.png: a drawn picture cannot be read"):
        _ = read_pictures(tmp_path, ONE)[0]
