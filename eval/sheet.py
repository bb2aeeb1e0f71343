"""A contact sheet: the original's pictures beside those of quantized checkpoints.

python -m bitroute.eval.sheet builtin:tiny-flux ./tiny-flux-fp8 --prompt "red apple, noto style" --out s.png
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.document import printable
from bitroute.convert.noise import quiet
from bitroute.convert.reading import read_json
from bitroute.convert.table import size
from bitroute.errors import BitrouteError
from bitroute.eval.generate import draw_apart
from bitroute.eval.metrics import format_db, pixels, psnr_db
from bitroute.eval.sampling import Sampling, call_arguments

CELL, GAP = 256, 12  # pixels
TITLE, SMALL = 22, 18  # pixels of type; a card shows seven columns at a third of their size
LONGEST_LINE = 300  # characters that are tried
SMALLEST = 14  # to which type shrinks before text is cut
BLACK, GREY, FRAME = "#000000", "#555555", "#dddddd"


@dataclass(frozen=True)
class Column:
    """One model's pictures, each with the words below it."""

    title: str
    caption: str
    pictures: Sequence[Image.Image]
    words: Sequence[str]


def draw(columns: Sequence[Column], headings: Sequence[str] = ()) -> Image.Image:
    """The pictures of equal rank in a row; headings: above each row, one for each or none at all."""
    shown = [[ImageOps.expand(fitted(picture), 1, FRAME) for picture in column.pictures] for column in columns]
    tallest = max(picture.height for pictures in shown for picture in pictures)
    above = SMALL + GAP if headings else 0
    head, row_height = TITLE + SMALL + 2 * GAP, above + tallest + SMALL + 2 * GAP
    tops = [head + row * row_height + above for row in range(len(shown[0]))]
    sheet = Image.new("RGB", (GAP + len(columns) * (CELL + GAP), head + len(tops) * row_height + GAP), "white")
    for top, heading in zip(tops, headings, strict=False):
        _write(sheet, (GAP, top - SMALL - GAP // 2), heading, SMALL, BLACK, sheet.width - 2 * GAP)
    for place, (column, pictures) in enumerate(zip(columns, shown, strict=True)):
        left = GAP + place * (CELL + GAP)
        _write(sheet, (left, GAP // 2), column.title, TITLE, BLACK, CELL)
        _write(sheet, (left, GAP + TITLE), column.caption, SMALL, GREY, CELL)
        for top, picture, words in zip(tops, pictures, column.words, strict=True):
            sheet.paste(picture, (left + (CELL - picture.width) // 2, top))
            _write(sheet, (left, top + tallest + 2), words, SMALL, GREY, CELL)
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """One below the other."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def fitted(picture: Image.Image) -> Image.Image:
    """As large as a cell takes: small pictures by whole factors with their pixels visible, large ones smoothly."""
    rgb, longest = picture.convert("RGB"), max(picture.size)
    if longest <= CELL:
        factor = CELL // longest
        return rgb.resize((factor * rgb.width, factor * rgb.height), Image.Resampling.NEAREST)
    size_px = [max(1, round(side * CELL / longest)) for side in rgb.size]
    return rgb.resize((size_px[0], size_px[1]), Image.Resampling.LANCZOS)


def _write(sheet: Image.Image, place: tuple[int, int], text: str, size_px: int, color: str, width: int) -> None:
    """Smaller where the text is wide, and cut where that is not enough."""
    pen, shown = ImageDraw.Draw(sheet), " ".join(printable(text[:LONGEST_LINE]).split())
    fonts = [ImageFont.load_default(size) for size in range(size_px, SMALLEST - 1, -2)]
    font = next((font for font in fonts if pen.textlength(shown, font=font) <= width), fonts[-1])
    while shown and pen.textlength(shown, font=font) > width:
        shown = f"{shown.rstrip('.')[:-1]}..."
    pen.text(place, shown, fill=color, font=font)


@click.command()
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True)
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be given several times.")
@click.option("--seed", default=0, show_default=True)
@click.option("--call", multiple=True, metavar="NAME=VALUE", help="An argument of the pipeline.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The PNG file to write.")
def main(
    original: str, quantized: tuple[str, ...], prompts: tuple[str, ...], seed: int, call: tuple[str, ...],
    device: str, out: Path,
) -> None:  # fmt: skip
    """Draw the pictures of ORIGINAL and of each QUANTIZED folder side by side."""
    quiet()
    sampling = Sampling(prompts, (seed,), call_arguments(call), device)
    try:
        pictures = {model: _draw(model, sampling) for model in (original, *quantized)}
        columns = [_column(model, made, pictures[original]) for model, made in pictures.items()]
    except BitrouteError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(columns).save(out)
    click.echo(out)


def _column(model: str, pictures: Sequence[Image.Image], originals: Sequence[Image.Image]) -> Column:
    """PSNR against the original under every other picture."""
    pairs = zip(originals, pictures, strict=True)
    words = ["original" if first is other else _closeness(first, other) for first, other in pairs]
    return Column(Path(model.removeprefix("builtin:")).name, _caption(model), pictures, words)


def _draw(model: str, sampling: Sampling) -> list[Image.Image]:
    with TemporaryDirectory() as folder:
        draw_apart(open_pipeline(model).folder, sampling, Path(folder))
        return [Image.open(Path(folder) / f"{sample.stem}.png").convert("RGB") for sample in sampling.samples()]


def _closeness(original: Image.Image, other: Image.Image) -> str:
    decibels = psnr_db(pixels(original), pixels(other))
    return format_db(decibels) if math.isinf(decibels) else f"PSNR {format_db(decibels)}"


def _caption(model: str) -> str:
    described = Path(model) / "bitroute.json"
    return size(read_json(described)["plan"]["size_bytes"]) if described.is_file() else "bf16"


if __name__ == "__main__":
    main()
