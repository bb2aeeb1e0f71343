"""The evaluation's commands: eval, compare, and what `--eval` does after a job."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitroute.convert.commands import CONTEXT, JSON, show
from bitroute.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitroute.convert.plan import Plan
    from bitroute.convert.schema import EvalRecipe
    from bitroute.eval.evaluate import Evaluation
    from bitroute.eval.gate import Limit
    from bitroute.eval.sampling import Sampling


Result = tuple[dict[str, Any], str, int]  # for machines, for people, the exit code

PROMPTS = click.option(
    "--prompts", help="A prompt set, or a text file, one a line  [default: the recipe's, else general-16]"
)
STEPS = click.option(
    "--steps", type=click.IntRange(1), help="Denoising steps  [default: the recipe's, else the pipeline's]"
)
SIZE = click.option("--size", help="WIDTHxHEIGHT in pixels  [default: the recipe's, else the pipeline's]")
CALL = click.option("--call", multiple=True, metavar="NAME=VALUE", help="Any other argument of the pipeline.")
INPUT = click.option(
    "--input", "inputs", multiple=True, metavar="NAME=FILE",
    help="A picture given to the pipeline; a folder has one for each prompt.",
)  # fmt: skip
PIPELINE = click.option(
    "--pipeline", help="Another class of diffusers for the same models, such as FluxImg2ImgPipeline."
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="Where the pipelines run: cpu, cuda, mps.")
THREADS = click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="torch threads; recorded."
)


@click.command("eval", context_settings=CONTEXT)
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True)
@PROMPTS
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--seeds", help="One picture of each prompt per seed: 0,1,2  [default: the recipe's, else 0]")
@STEPS
@SIZE
@CALL
@INPUT
@PIPELINE
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="NAME[=ARGUMENT]",
    help="Judge each picture alone with a plug-in, such as clip=FOLDER.",
)
@click.option(
    "--gate", help="Limits on the means: lpips<0.1,psnr>28; exit code 3 where one fails  [default: each recipe's own]"
)
@DEVICE
@THREADS
@click.option("--pictures-only", is_flag=True, help="Leave out the errors of weights, layers, steps and text encoders.")
@click.option(
    "--denoiser-prompts", default=16, show_default=True, type=click.IntRange(1),
    help="For how many of the prompts the denoiser's error is measured.",
)  # fmt: skip
@click.option("--own-text", is_flag=True, help="Candidates encode prompts with their own text encoders.")
@JSON
@click.pass_context
def evaluate_folders(
    ctx: click.Context, original: str, quantized: tuple[str, ...], prompts: str | None, out: Path, seeds: str | None,
    steps: int | None, size: str | None, call: tuple[str, ...], inputs: tuple[str, ...], pipeline: str | None,
    scores: tuple[str, ...], gate: str | None, device: str, threads: int, pictures_only: bool,
    denoiser_prompts: int, own_text: bool, as_json: bool,
) -> None:  # fmt: skip
    """Is it still good? QUANTIZED against ORIGINAL.

    Draws the same prompts and seeds with every pipeline, measures LPIPS, PSNR, SSIM, MS-SSIM and FLIP beside the noise
    floor, feeds the original's inputs to every denoiser (error per step and per layer), and writes report.html,
    report.json, and report.md and report.png for a model card. What is not said here is taken from the `eval` of the
    recipe that the first QUANTIZED was made with. Pictures are kept in ~/.cache/bitroute/eval (or XDG_CACHE_HOME).
    Exit codes: 0 good, 1 rejected, 3 the gate failed.
    """
    from bitroute.eval.evaluate import evaluate
    from bitroute.eval.gate import parse_gate
    from bitroute.eval.sampling import call_arguments, parse_seeds
    from bitroute.eval.standalone import parse_scores

    limits = None if gate is None else parse_gate(gate)
    sampling = _sampling(
        _recorded(quantized[0]), device, threads, prompts=prompts, inputs=inputs, pipeline=pipeline,
        seeds=None if seeds is None else parse_seeds(seeds), call=call_arguments(call, steps, size),
    )  # fmt: skip
    plug_ins = parse_scores(scores)
    compare = partial(
        evaluate, share_text=not own_text, denoiser=not pictures_only, denoiser_prompts=denoiser_prompts,
        scores=plug_ins,
    )  # fmt: skip
    content, text, code = _evaluate(original, quantized, sampling, limits, out, compare)
    show(content, as_json, text)
    ctx.exit(code)


@click.command("compare", context_settings=CONTEXT)
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="REPORT...")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the comparison.")
@JSON
def compare_folders(reports: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Which one is best? The candidates of every REPORT beside each other.

    REPORT is a folder that `quantize eval` wrote; all of them must have drawn the same prompts and seeds with the same
    original. Says which differences are significant (paired test), and writes compare.html, compare.json, and
    compare.md and compare.png for a model card.
    """
    from bitroute.eval.card import write_card
    from bitroute.eval.compare import compare_reports, comparison_text
    from bitroute.eval.compare_page import write_comparison_page

    content = compare_reports(reports, out)
    write_card(content, out, "compare")
    page = write_comparison_page(content, out)
    show(content, as_json, f"{comparison_text(content)}\n\ncomparison: {page}")


def sampling_of(planned: Plan, device: str) -> Sampling:
    """What the recipe's `eval` draws; refused before the job if it cannot be."""
    from bitroute.convert.bare import check_draws
    from bitroute.errors import RecipeError
    from bitroute.eval.calling import check_call

    check_draws(planned.pipeline)
    recipe = planned.recipe.recipe
    if recipe is None or recipe.eval is None:
        mend = "add `eval: {prompts: general-16}` to the recipe, or run `quantize eval` afterwards"
        raise RecipeError(Problem("the recipe does not say how to evaluate", planned.recipe.name, next_step=mend))
    if planned.pipeline.config is not None or planned.pipeline.loras:
        first = "quantize convert FILE --config DIR --out FOLDER"
        if planned.pipeline.loras:
            first = "write the fused model by a recipe with `fuse_loras` and `backend: keep`"
        raise RecipeError(
            Problem("an evaluation draws with the original, as a folder", planned.pipeline.name,
                    next_step=f"{first}, then quantize that folder")
        )  # fmt: skip
    sampling = _sampling(recipe.eval, device)
    check_call(planned.pipeline.folder, sampling)
    return sampling


def _recorded(quantized: str) -> EvalRecipe:
    """The `eval` of the recipe that a checkpoint was made with."""
    from pydantic import ValidationError

    from bitroute.convert.checkpoint import open_pipeline
    from bitroute.convert.schema import EvalRecipe
    from bitroute.eval.evaluate import provenance_of

    record = provenance_of(open_pipeline(quantized).folder) or {}
    try:
        return EvalRecipe.model_validate(record.get("eval"))
    except ValidationError:  # none, that of another version, or a damaged record, which is a tripwire
        return EvalRecipe.model_validate({"prompts": "general-16"})


def _sampling(
    recipe: EvalRecipe, device: str, threads: int = 1, *, prompts: str | None = None, pipeline: str | None = None,
    seeds: Sequence[int] | None = None, call: Mapping[str, Any] | None = None, inputs: Sequence[str] = (),
) -> Sampling:  # fmt: skip
    """What the recipe says, and what was said instead."""
    from bitroute.eval.inputs import parse_inputs
    from bitroute.eval.sampling import Sampling, read_prompts

    texts = read_prompts(prompts or recipe.prompts)
    pictures = parse_inputs(inputs or [f"{name}={file}" for name, file in recipe.inputs.items()], len(texts))
    arguments = {**({"num_inference_steps": recipe.steps} if recipe.steps else {}), **recipe.call, **(call or {})}
    return Sampling(
        texts, tuple(seeds or recipe.seeds), arguments, device, threads, pipeline=pipeline or recipe.pipeline,
        inputs=pictures,
    )  # fmt: skip


def _check_place(out: Path, models: Sequence[str]) -> None:
    """A report inside a model would be taken for a part of it."""
    from bitroute.errors import RecipeError

    for folder in (Path(model).expanduser() for model in models):
        if folder.is_dir() and folder.resolve() in (out.resolve(), *out.resolve().parents):
            mend = "give another --out"
            raise RecipeError(Problem("the report would lie in a model", str(out), got=str(folder), next_step=mend))


def evaluate_result(planned: Plan, folder: Path, sampling: Sampling) -> Result:
    """The report of a finished job goes beside its folder."""
    from bitroute.eval.evaluate import evaluate

    report = folder.with_name(f"{folder.name}-report")
    opened = planned.pipeline
    original = str(opened.folder) if opened.hub or opened.variant else opened.name  # pinned, no request
    return _evaluate(original, [str(folder)], sampling, None, report, evaluate)


def _evaluate(
    original: str, quantized: Sequence[str], sampling: Sampling, limits: Sequence[Limit] | None, out: Path,
    compare: Callable[..., Evaluation],
) -> Result:  # fmt: skip
    """Writes the report: its content, its words, and the exit code."""
    from bitroute.convert.progress import Stages
    from bitroute.eval.card import write_report_card
    from bitroute.eval.page import write_page
    from bitroute.eval.report import table, write_report

    _check_place(out, [original, *quantized])
    with Stages("drawing") as stages:
        found = compare(original, quantized, sampling, limits=limits, progress=stages.say)
    content = write_report(found, out)
    write_report_card(out)
    page = write_page(content, out)
    verdicts = "\n".join(candidate["verdict"] for candidate in content["candidates"])
    rejected = any(candidate.tripwires for candidate in found.candidates)
    code = 1 if rejected else 0 if found.passed else 3
    return content, f"{table(found)}\n\n{verdicts}\nreport: {page}", code
