"""`quantize convert`: the same weights in another dtype or in other files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitroute.convert.commands import (
    CONTEXT,
    JSON,
    NO_VERIFY,
    OVERWRITE,
    RESUME,
    VARIANT,
    Bytes,
    check_one_way,
    print_plan,
)
from bitroute.convert.sources import DTYPES, conclude, run_with_bar

if TYPE_CHECKING:
    from bitroute.convert.conversion import Format


SHARD_SIZE = click.option("--shard-size", type=Bytes(), help="At most this in one weight file  [default: 5GB]")


@click.command("convert", context_settings=CONTEXT)
@click.argument("source")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option(
    "--dtype", type=click.Choice(["source", "bf16", "fp16", "fp32"]), default="source", show_default=True,
    help="Of all floats; weights that are quantized are decoded.",
)  # fmt: skip
@click.option(
    "--format", type=click.Choice(["folder", "single-file"]), default="folder", show_default=True,
    help="single-file: each component in one file, which from_single_file loads too.",
)  # fmt: skip
@SHARD_SIZE
@click.option("--config", help="The pipeline that a single file belongs to: for all that it lacks.")
@VARIANT
@click.option("--out-variant", metavar="NAME", help="Write files for from_pretrained(OUT, variant=NAME), such as fp16.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads no weights.")
@OVERWRITE
@RESUME
@NO_VERIFY
@JSON
@click.pass_context
def convert_model(
    ctx: click.Context, source: str, out: Path, dtype: str, format: Format, shard_size: int | None, config: str | None,
    variant: str | None, out_variant: str | None, dry_run: bool, overwrite: bool, resume: bool, no_verify: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the pipeline SOURCE in another layout; nothing is quantized.

    SOURCE is a folder, a Hub id, or one file of safetensors in its authors' names (flux1-dev.safetensors), with
    --config and the pipeline that it belongs to. The result is a diffusers folder.
    """
    check_one_way(overwrite, resume)
    from bitroute.convert.conversion import plan_conversion
    from bitroute.convert.journal import journal_of
    from bitroute.convert.output import check_output
    from bitroute.convert.plan import fetch

    read_as = False if dtype == "source" else DTYPES[dtype]
    planned = plan_conversion(source, read_as, format, shard_size, config, variant, out_variant)
    folder = out.expanduser()
    check_output(planned, folder, journal_of(planned, "cpu"), overwrite, resume)
    if dry_run:
        print_plan(planned, as_json)
        return
    planned = fetch(planned)
    ctx.meta["out"] = folder
    run_with_bar("converting", planned, folder, overwrite, resume)
    ctx.meta["written"] = True
    ctx.exit(conclude(planned, folder, no_verify, as_json, each_file=format == "single-file"))
