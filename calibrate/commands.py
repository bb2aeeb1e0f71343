"""`quantize calibrate`: what the layers of a model are really given, as a statistics file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitroute.convert.commands import CONTEXT, JSON, OVERWRITE, Bytes, check_one_way, say_on_stderr, show
from bitroute.eval.commands import CALL, DEVICE, INPUT, PIPELINE, THREADS

if TYPE_CHECKING:
    from bitroute.calibrate.calibration import Calibration, Offload, Planned
    from bitroute.eval.sampling import Sampling


@click.command("calibrate", context_settings=CONTEXT)
@click.argument("model")
@click.option("--prompts", required=True, help="A prompt set, or a text file, one a line.")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="The statistics file to write.")
@click.option("--seeds", default="0", show_default=True, help="One run of each prompt per seed: 0,1,2")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps  [default: the pipeline's]")
@click.option("--timesteps", type=click.IntRange(1), metavar="N", help="Measure N of them, others for each prompt.")
@click.option("--size", help="WIDTHxHEIGHT in pixels  [default: the pipeline's]")
@CALL
@INPUT
@PIPELINE
@click.option("--components", help="Whose layers: transformer,text_encoder_2  [default: the denoisers]")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Only these layers, named as rules of recipes do.")
@click.option("--budget", type=Bytes(), default="4GB", show_default=True, help="Of memory, for all statistics.")
@click.option("--rows", type=click.IntRange(0), default=256, show_default=True, help="Of each layer's inputs, kept.")
@click.option("--no-hessian", is_flag=True, help="Do not measure how channels go together.")
@DEVICE
@click.option(
    "--offload", type=click.Choice(["none", "model", "block"]), default="none", show_default=True,
    help="Keep what does not run in main memory: whole components, or blocks of them.",
)  # fmt: skip
@THREADS
@click.option("--dry-run", is_flag=True, help="Say what would be measured and stop; reads no weights.")
@OVERWRITE
@click.option("--resume", is_flag=True, help="Go on with an interrupted one; start it where there is nothing yet.")
@JSON
@click.pass_context
def calibrate_model(
    ctx: click.Context, model: str, prompts: str, out: Path, seeds: str, steps: int | None, timesteps: int | None,
    size: str | None, call: tuple[str, ...], inputs: tuple[str, ...], pipeline: str | None, components: str | None,
    layers: tuple[str, ...], budget: int, rows: int, no_hessian: bool, device: str, offload: Offload, threads: int,
    dry_run: bool, overwrite: bool, resume: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure what the layers of MODEL are given, for methods that round better when they know it.

    \b
    quantize calibrate builtin:tiny-flux --prompts emoji-calibration-32 --out stats.safetensors \\
        --steps 20 --timesteps 5 --size 64x64 --call guidance_scale=0.0 --call max_sequence_length=16

    Runs the pipeline and measures of every linear layer and convolution, over all rows of its inputs, the largest
    magnitude and the mean square of each channel, the mean of x·xᵀ (in blocks on its diagonal, as large as --budget
    allows), and keeps a uniform sample of the rows. Calibrate with other prompts than those that you evaluate with.
    """
    check_one_way(overwrite, resume)
    from bitroute.calibrate.calibration import check_output, plan_calibration

    sampling = _sampling(prompts, seeds, call, steps, size, inputs, device, threads, pipeline)
    named = [name.strip() for name in components.split(",")] if components else []
    planned = plan_calibration(
        model, out, sampling, components=named, layers=layers, timesteps=timesteps, rows=rows, hessian=not no_hessian,
        budget_bytes=budget, offload=offload,
    )  # fmt: skip
    check_output(planned, overwrite, resume)
    if dry_run:
        show(_content(planned), as_json, planned.words)
        return
    say_on_stderr(planned.words)
    found = _run(ctx, planned, overwrite, resume)
    show({**_content(planned), **vars(found), "notes": found.notes}, as_json, _text(found))


def _sampling(
    prompts: str, seeds: str, call: tuple[str, ...], steps: int | None, size: str | None, inputs: tuple[str, ...],
    device: str, threads: int, pipeline: str | None,
) -> Sampling:  # fmt: skip
    from bitroute.eval.inputs import parse_inputs
    from bitroute.eval.sampling import Sampling, call_arguments, parse_seeds, read_prompts

    texts = read_prompts(prompts)
    pictures = parse_inputs(inputs, len(texts))
    arguments = call_arguments(call, steps, size)
    return Sampling(texts, parse_seeds(seeds), arguments, device, threads, pipeline=pipeline, inputs=pictures)


def _run(ctx: click.Context, planned: Planned, overwrite: bool, resume: bool) -> Calibration:
    from bitroute.calibrate.calibration import run
    from bitroute.calibrate.unfinished import place_of
    from bitroute.convert.progress import Stages

    try:
        with Stages("calibrating") as stages:
            return run(planned, overwrite, resume, stages.say)
    except KeyboardInterrupt:
        if place_of(planned.out).is_file():  # then the command to go on ends with --resume
            ctx.meta.update(out=planned.out, written=True)
        raise


def _content(planned: Planned) -> dict[str, Any]:
    layers = {layer.key: {"columns": layer.columns, "hessian_block": layer.block} for layer in planned.measures.layers}
    return {"memory_bytes": planned.measures.memory_bytes, "rows_kept": planned.measures.rows, "planned": layers}


def _text(found: Calibration) -> str:
    size_bytes = found.file.stat().st_size
    return "\n".join([f"{found.file}: {found.layers} layers, {size_bytes / 1e6:,.1f} MB", *found.notes])
