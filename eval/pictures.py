"""The reports' pictures as data URIs, and where two pictures differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageChops

from bitroute.errors import JobError, Problem
from bitroute.eval.flip import flip
from bitroute.eval.metrics import pixels

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
class Maps:
    """Where two pictures differ. largest: the largest difference of a channel, of 255; mean_flip: of the FLIP map."""

    difference: Picture
    largest: int
    flip: Picture
    mean_flip: float


def open_picture(root: Path, name: str) -> Image.Image:
    """RGB; of a video the middle frame.

    Raises:
        JobError: it is missing or damaged, or the name leads out of `root`.
    """
    with _opened(root, name) as image:
        image.seek(_frames(image) // 2)
        return image.convert("RGB")


def count_frames(root: Path, name: str) -> int:
    """1 of a picture. Raises as open_picture."""
    with _opened(root, name) as image:
        return _frames(image)


@contextmanager
def _opened(root: Path, name: str) -> Iterator[Image.Image]:
    file = root / name
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            raise OSError("the name leads out of the report's folder")
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        problem = Problem(
            "a picture of the report cannot be read", str(file), got=str(error), next_step="evaluate again"
        )
        raise JobError(problem) from error


def _frames(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


def embed(image: Image.Image, largest_px: int | None = None) -> Picture:
    """PNG up to 256 px, WebP above; reduced first where a side is above largest_px."""
    if largest_px is not None and max(image.size) > largest_px:
        image = image.copy()
        image.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
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


def draw_maps(first: Image.Image, second: Image.Image, factor: int) -> Maps:
    """In magma's colours, black for no difference: the distances times `factor`, and FLIP's error as it is.

    Raises:
        JobError: the two are not pictures of one size.
    """
    seen = flip(pixels(first), pixels(second))
    found = distances(first, second)
    largest = max(level for level, pixels_of_it in enumerate(found.histogram()) if pixels_of_it)
    error = Image.fromarray((seen.error * 255).round().byte().numpy())
    return Maps(_colored(found, factor), largest, _colored(error, 1), seen.mean)


def _colored(map_: Image.Image, factor: int) -> Picture:
    shown = map_.point([min(255, factor * level) for level in range(256)])
    shown.putpalette(_palette())
    return embed(shown)


def _palette() -> list[int]:
    """256 RGB triples, linear between the anchors."""
    colors = []
    for level in range(256):
        place = level / 255 * (len(MAGMA) - 1)
        below = min(int(place), len(MAGMA) - 2)
        share = place - below
        colors += [round(a + share * (b - a)) for a, b in zip(MAGMA[below], MAGMA[below + 1], strict=True)]
    return colors
