from __future__ import annotations

import base64
import io

from PIL import Image

from bitroute.eval.pictures import amplification, difference_map, distances


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
    found = difference_map(distances(first, second), 8)
    shown = Image.open(io.BytesIO(base64.b64decode(found.picture.uri.split(",")[1]))).convert("RGB")
    assert found.largest == 16
    assert shown.getpixel((0, 0)) == (0, 0, 4)
    assert shown.getpixel((1, 0)) == (182, 54, 122)  # 128 of 255, just above the middle of magma
