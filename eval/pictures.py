"""The report's pictures as data URIs, and where two pictures differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageChops

from bitroute.errors import JobError, Problem

LOSSLESS_PX = 256  # larger pictures become WebP: a PNG of 1024 px takes about 1.5 MB
WEBP_QUALITY = 92
BRIGHT = 0.99  # of the differences stay below the end of the colour scale
MAGMA = (
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
    (254, 194, 135), (252, 253, 191),
)  # nine even steps of matplotlib's magma: lightness grows evenly, so that it reads in grey too  # fmt: skip


@dataclass(frozen=True)
class Picture:
    uri: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        """Small pictures are enlarged with their pixels visible: smoothing would hide what differs."""
        return max(self.width, self.height) <= LOSSLESS_PX


@dataclass(frozen=True)
class Difference:
    """A map of one pair: largest is the largest difference of a channel, of 255."""

    picture: Picture
    largest: int


def open_picture(root: Path, name: str) -> Image.Image:
    """RGB.

    Raises:
        JobError: it is missing or damaged, or the name leads out of `root`.
    """
    file = root / name
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            raise OSError("the name leads out of the report's folder")
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        problem = Problem(
            "a picture of the report cannot be read", str(file), got=str(error), next_step="evaluate again"
        )
        raise JobError(problem) from error


def embed(image: Image.Image) -> Picture:
    """PNG up to 256 px, WebP above."""
    stream = io.BytesIO()
    kind = "png" if max(image.size) <= LOSSLESS_PX else "webp"
    if kind == "png":
        image.save(stream, format="PNG", optimize=True)
    else:
        image.convert("RGB").save(stream, format="WEBP", quality=WEBP_QUALITY)
    coded = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{coded}", *image.size)


def distances(first: Image.Image, second: Image.Image) -> Image.Image:
    """The largest channel's absolute difference of each pixel, as a grey picture."""
    red, green, blue = ImageChops.difference(first, second).split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue)


def amplification(maps: Sequence[Image.Image]) -> int:
    """The largest power of two, at most 128, that keeps nearly all differences of these maps below 255; 1 for none."""
    counts = [sum(column) for column in zip(*(image.histogram() for image in maps), strict=True)]
    if not any(counts[1:]):
        return 1
    below = list(accumulate(counts))
    level = next(level for level, seen in enumerate(below) if seen >= BRIGHT * below[-1])
    return min(128, 1 << ((255 // max(level, 1)).bit_length() - 1))


def difference_map(map_: Image.Image, factor: int) -> Difference:
    """The amplified differences in magma's colours, black for none."""
    shown = map_.point([min(255, factor * level) for level in range(256)])
    shown.putpalette(_palette())
    largest = map_.getextrema()[1]
    return Difference(embed(shown), int(largest) if isinstance(largest, int | float) else 0)


def _palette() -> list[int]:
    """256 RGB triples, linear between the anchors."""
    colors = []
    for level in range(256):
        place = level / 255 * (len(MAGMA) - 1)
        below = min(int(place), len(MAGMA) - 2)
        share = place - below
        colors += [round(a + share * (b - a)) for a, b in zip(MAGMA[below], MAGMA[below + 1], strict=True)]
    return colors
