from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from bitroute.errors import JobError
from bitroute.eval.flip import flip
from bitroute.eval.metrics import pixels
from bitroute.eval.pictures import Picture, amplification, count_frames, draw_maps, embed, open_picture


def decoded(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))).convert("RGB")


def test_the_amplification_is_the_largest_power_of_two_that_the_differences_bear() -> None:
    def flat(level: int) -> Image.Image:
        return Image.new("L", (8, 8), level)

    assert [amplification([flat(level)]) for level in (0, 1, 2, 15, 16, 127, 128, 255)] == [
        1,
        128,
        64,
        16,
        8,
        2,
        1,
        1,
    ]
    assert amplification([flat(0), flat(10)]) == 16


def test_a_difference_map_is_black_where_nothing_differs_and_brightest_at_the_largest_channel() -> None:
    first = Image.new("RGB", (2, 1), (10, 20, 30))
    second = first.copy()
    second.putpixel((1, 0), (10, 25, 14))
    found = draw_maps(first, second, 8)
    assert found.largest == 16
    assert decoded(found.difference).getpixel((0, 0)) == (0, 0, 4)
    assert decoded(found.difference).getpixel((1, 0)) == (182, 54, 122)  # 128 of 255, just above the middle of magma


def test_a_flip_map_has_the_mean_of_flip_and_is_brighter_where_its_error_is_larger() -> None:
    first = Image.new("RGB", (24, 8), (90, 120, 90))
    second = first.copy()
    second.paste((90, 120, 200), (12, 0, 24, 8))
    found, error = draw_maps(first, second, 1), flip(pixels(first), pixels(second))
    shown = decoded(found.flip).convert("L")
    assert found.mean_flip == error.mean > 0
    assert shown.getpixel((20, 4)) > shown.getpixel((0, 4))


def test_the_flip_map_of_the_two_most_different_colours_ends_at_the_end_of_magma() -> None:
    green, blue = Image.new("RGB", (4, 4), (0, 255, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    assert decoded(draw_maps(green, blue, 1).flip).getpixel((1, 1)) == (252, 253, 191)


def test_pictures_of_two_sizes_have_no_maps() -> None:
    with pytest.raises(JobError, match="4x4 and 5x4"):
        draw_maps(Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4)), 1)


def test_of_a_video_the_middle_frame_is_opened(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (50 * index, 0, 0)) for index in range(5)]
    frames[0].save(tmp_path / "video.png", save_all=True, append_images=frames[1:])
    frames[3].save(tmp_path / "picture.png")
    assert [count_frames(tmp_path, name) for name in ("video.png", "picture.png")] == [5, 1]
    assert open_picture(tmp_path, "video.png").getpixel((0, 0)) == (100, 0, 0)
    assert open_picture(tmp_path, "picture.png").getpixel((0, 0)) == (150, 0, 0)


def test_a_damaged_picture_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for read in (open_picture, count_frames):
        with pytest.raises(JobError, match=r"broken\.png"):
            read(tmp_path, "broken.png")


def test_an_embedded_picture_is_reduced_in_proportion_and_its_source_is_not() -> None:
    image = Image.new("RGB", (1000, 500))
    assert (embed(image, 512).width, embed(image, 512).height, image.size) == (512, 256, (1000, 500))
    assert embed(image).width == 1000
    assert embed(Image.new("RGB", (64, 64)), 512).width == 64
