"""A contact sheet: the original's pictures beside those of quantized checkpoints.

python -m bitroute.eval.sheet builtin:tiny-flux ./tiny-flux-fp8 --prompt "red apple, noto style" --out s.png
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from PIL import Image, ImageDraw, ImageFont

from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.noise import quiet
from bitroute.convert.reading import read_json
from bitroute.convert.table import size
from bitroute.errors import BitrouteError
from bitroute.eval.generate import draw_apart
from bitroute.eval.metrics import format_db, pixels, psnr_db
from bitroute.eval.sampling import Sampling, call_arguments

CELL, GAP, HEAD = 160, 8, 44  # pixels


def draw(pictures: Mapping[str, Sequence[Image.Image]], captions: Mapping[str, str]) -> Image.Image:
    """A column per model, the first being the original; PSNR against it under every other picture."""
    rows = len(next(iter(pictures.values())))
    width, height = GAP + len(pictures) * (CELL + GAP), HEAD + rows * (CELL + HEAD // 2)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(15), ImageFont.load_default(12)
    original = next(iter(pictures.values()))
    for column, (name, made) in enumerate(pictures.items()):
        left = GAP + column * (CELL + GAP)
        pen.text((left, 4), name, fill="black", font=bold)
        pen.text((left, 24), captions[name], fill="#555555", font=small)
        for row, picture in enumerate(made):
            top = HEAD + row * (CELL + HEAD // 2)
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            words = "original" if column == 0 else _closeness(original[row], picture)
            pen.text((left, top + CELL + 3), words, fill="#555555", font=small)
    return sheet


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
    pictures, captions = {}, {}
    try:
        for model in (original, *quantized):
            name = Path(model.removeprefix("builtin:")).name
            pictures[name] = _draw(model, sampling)
            captions[name] = _caption(model)
    except BitrouteError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, captions).save(out)
    click.echo(out)


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
