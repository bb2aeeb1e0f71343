"""The commands that read a model as something else than it is."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from bitroute.convert.commands import CONTEXT, JSON, NO_VERIFY, OVERWRITE, RESUME, check_one_way, run_verification, show

if TYPE_CHECKING:
    from bitroute.convert.plan import Plan
    from bitroute.convert.schema import Dequantize

DTYPES: dict[str | None, Dequantize] = {None: True, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@click.command("dequantize", context_settings=CONTEXT)
@click.argument("model")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Where to write  [default: ./NAME-dequantized]")
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Of all floats  [default: quantized weights become bf16, the rest stays as it is]",
)  # fmt: skip
@OVERWRITE
@RESUME
@NO_VERIFY
@JSON
@click.pass_context
def dequantize_model(
    ctx: click.Context, model: str, out: Path | None, dtype: str | None, overwrite: bool, resume: bool,
    no_verify: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a quantized MODEL with plain weights.

    MODEL is the folder of a pipeline whose components bitroute, torchao, bitsandbytes or optimum-quanto quantized (or
    its Hub id), or one file: *.safetensors with scaled FP8 and other ComfyUI formats, or *.gguf. The result loads
    without any quantization library; what quantizing lost stays lost.
    """
    check_one_way(overwrite, resume)
    from bitroute.convert.dequantize import default_folder, is_file, plan_dequantized

    if is_file(model):
        if resume:
            raise click.UsageError("--resume is for folders: an interrupted file is begun anew by the same command")
        _run_file(model, out, DTYPES[dtype], overwrite, as_json)
        return
    planned = plan_dequantized(model, DTYPES[dtype])
    folder = out.expanduser() if out else default_folder(planned.pipeline)
    ctx.meta["out"] = folder
    run_with_bar("dequantizing", planned, folder, overwrite, resume)
    ctx.meta["written"] = True
    ctx.exit(conclude(planned, folder, no_verify, as_json))


def _run_file(model: str, out: Path | None, dtype: Dequantize, overwrite: bool, as_json: bool) -> None:
    from bitroute.convert.dequantize import default_file, plan_file, write_file
    from bitroute.convert.layout import total_bytes
    from bitroute.convert.progress import Bar
    from bitroute.convert.table import size

    tensors, target = plan_file(model, dtype), out.expanduser() if out else default_file(model)
    size_bytes = total_bytes(tensor.spec for tensor in tensors.values())
    with Bar("dequantizing", size_bytes) as bar:
        write_file(tensors, target, overwrite=overwrite, progress=bar.advance)
    show({"out": str(target), "size_bytes": size_bytes}, as_json, f"wrote {target}: {size(size_bytes)}")


def run_with_bar(what: str, planned: Plan, out: Path, overwrite: bool, resume: bool) -> None:
    from bitroute.convert.job import run
    from bitroute.convert.progress import Bar

    with Bar(what, sum(component.source_bytes for component in planned.components)) as bar:
        run(planned, out, overwrite=overwrite, resume=resume, progress=bar.advance)


def conclude(planned: Plan, out: Path, no_verify: bool, as_json: bool, *, each_file: bool = False) -> int:
    """Prints what was written, how it loads (each file alone too), and whether it is as planned; the exit code."""
    from bitroute.convert.snippet import code_by_file
    from bitroute.convert.table import result_text, verification_json, verification_text

    found = None if no_verify else run_verification(out, planned.pipeline, load=True)
    content: dict[str, Any] = {"out": str(out), "size_bytes": planned.size_bytes}
    content["verification"] = verification_json(found) if found else None
    words = [*([verification_text(found)] if found else []), result_text(planned, out)]
    if each_file:
        content["load_files"] = code_by_file(planned, out)
        words += [f"to load {file} alone:\n{indent(code, '    ')}" for file, code in content["load_files"].items()]
    show(content, as_json, "\n".join(words))
    return 1 if found and found.problems else 0
