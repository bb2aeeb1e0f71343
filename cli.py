"""The command line: `quantize --recipe R`, and the subcommands around it. Results on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitroute.convert.noise import quiet
from bitroute.errors import BitrouteError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitroute.convert.plan import Plan
    from bitroute.convert.verify import Verification
    from bitroute.eval.evaluate import Evaluation
    from bitroute.eval.gate import Limit
    from bitroute.eval.sampling import Sampling

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Command(click.Group):
    """Turns errors into text and an exit code; a traceback only with -vv."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from bitroute.convert.recipe import builtin_recipes

        if args and args[0].removesuffix(".yaml") in builtin_recipes():
            raise click.UsageError(f"{args[0]!r} is a recipe: quantize --recipe {args[0]}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        verbose = ctx.params.get("verbose", 0)
        if not verbose:
            quiet()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows `?`, it is no reason to fail
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            click.echo("\ninterrupted; nothing unfinished carries a final name", err=True)
            click.echo(f"again: {_again(ctx)}", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # `quantize … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except Exception as error:
            if verbose > 1:
                traceback.print_exc()
            known = error if isinstance(error, BitrouteError) else BitrouteError(_internal(error))
            _print_problems(known)
            ctx.exit(known.exit_code)


def _internal(error: Exception) -> Problem:
    return Problem(
        "bitroute did not expect this", got=f"{type(error).__name__}: {error}"[:500],
        next_step="run it again with -vv and report what it prints",
    )  # fmt: skip


def _print_problems(error: BitrouteError) -> None:
    """On stderr; with --json also on stdout, for the program that reads it."""
    click.echo("\n".join(str(problem) for problem in error.problems), err=True)
    if "--json" in sys.argv:
        click.echo(json.dumps({"problems": [vars(problem) for problem in error.problems]}, indent=1))


@click.group(cls=_Command, invoke_without_command=True, context_settings=CONTEXT)
@click.option("--recipe", "-r", help="A recipe file, or the name of a built-in one.")
@click.option("--model", "-m", help="The pipeline folder, or builtin:tiny-flux; overrides the recipe's `model`.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Output folder  [default: the recipe's name]")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads no weights.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of bitroute in the output folder.")
@click.option("--device", default="cpu", show_default=True, help="Where the arithmetic runs: cpu, cuda, mps.")
@click.option("--no-verify", is_flag=True, help="Do not verify the result.")
@click.option("--eval", "evaluated", is_flag=True, help="Compare with the original as the recipe's `eval` says.")
@JSON
@click.option("-v", "--verbose", count=True, help="-v: the libraries' own messages; -vv: tracebacks too.")
@click.version_option(package_name="bitroute")
@click.pass_context
def main(
    ctx: click.Context, recipe: str | None, model: str | None, out: Path | None, dry_run: bool,
    overwrite: bool, device: str, no_verify: bool, evaluated: bool, as_json: bool, verbose: int,
) -> None:  # fmt: skip
    """Quantize a diffusers pipeline: a recipe in, a checkpoint that diffusers loads out.

    \b
    quantize --recipe tiny-flux-fp8                                the bundled model, to try it
    quantize --recipe flux-fp8 --model ./FLUX.1-dev --dry-run      the plan alone
    quantize --recipe flux-fp8 --model ./FLUX.1-dev --out ./flux-fp8

    Exit codes: 0 done, 1 failed, 2 usage or recipe refused, 3 the quality gate failed, 130 interrupted.
    """
    if ctx.invoked_subcommand is not None:
        return
    if recipe is None:
        raise click.UsageError("give --recipe, or a command; `quantize recipes list` shows the built-in recipes")
    from bitroute.convert.describe import written_files
    from bitroute.convert.job import check_device
    from bitroute.convert.output import check_output
    from bitroute.convert.plan import plan

    check_device(device)
    planned = plan(recipe, model)
    sampling = _sampling_of(planned, device) if evaluated else None
    folder = out.expanduser() if out else Path(Path(recipe).stem)
    if out or not dry_run:
        check_output(planned, folder, written_files(planned), overwrite)
    if dry_run:
        _print_plan(planned, as_json)
        return
    _run(planned, folder, device, overwrite, as_json)
    ctx.meta["written"] = folder
    found = None if no_verify else _verify(folder, planned.pipeline.name, load=True)
    _print_result(planned, folder, found, as_json)
    if (found and found.problems) or sampling is None:
        ctx.exit(1 if found and found.problems else 0)
    ctx.exit(_evaluate_result(planned, folder, sampling))


@main.group(context_settings=CONTEXT)
def recipes() -> None:
    """List, show, copy, check recipes."""


@recipes.command("list")
@JSON
def recipes_list(as_json: bool) -> None:
    """The built-in recipes."""
    from bitroute.convert.recipe import builtin_recipes, read_recipe

    found = {name: read_recipe(str(path)).recipe for name, path in builtin_recipes().items()}
    rows = {name: recipe.description for name, recipe in found.items() if recipe}
    _print(rows, as_json, "\n".join(f"{name:<18} {description}" for name, description in rows.items()))


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print the recipe NAME (built-in, or a file)."""
    from bitroute.convert.recipe import read_recipe

    click.echo(read_recipe(name).text, nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path), required=False)
def recipes_copy(name: str, target: Path | None) -> None:
    """Copy the recipe NAME to TARGET (default: ./NAME.yaml), to edit it."""
    from bitroute.convert.recipe import copy_recipe

    click.echo(copy_recipe(name, target))


@recipes.command("check")
@click.argument("name")
@click.option("--model", "-m", help="Check against this pipeline instead of the recipe's own.")
def recipes_check(name: str, model: str | None) -> None:
    """Check the recipe NAME against its model: every problem, with its line."""
    from bitroute.convert.plan import plan

    planned = plan(name, model)
    click.echo(f"{planned.recipe.name}: fits {planned.pipeline.name}, nothing to report")


@main.command("backends", context_settings=CONTEXT)
@click.argument("name", required=False)
@JSON
def list_backends(name: str | None, as_json: bool) -> None:
    """The formats; with NAME, its options."""
    from bitroute.convert.doctor import describe_backend, list_formats

    if name:
        described = describe_backend(name)
        _print(described, as_json, described["text"])
    else:
        formats = list_formats()
        _print(formats, as_json, "\n".join(f"{key:<15} {words}" for key, words in formats.items()))


@main.command("inspect", context_settings=CONTEXT)
@click.argument("path")
@JSON
def inspect_path(path: str, as_json: bool) -> None:
    """What a file or folder of safetensors holds."""
    from bitroute.convert.inspection import inspect, inspection_text

    found = inspect(path)
    _print(found, as_json, inspection_text(found))


@main.command("verify", context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", "-m", help="The source to compare with  [default: the one the checkpoint names]")
@click.option("--no-load", is_flag=True, help="Do not load the components in a fresh process.")
@JSON
@click.pass_context
def verify_folder(ctx: click.Context, folder: Path, model: str | None, no_load: bool, as_json: bool) -> None:
    """Prove a finished checkpoint.

    Every file is what the job wrote, every layer decodes to its source, every component loads in a fresh process.
    """
    from bitroute.convert.table import verification_json, verification_text

    found = _verify(folder, model, load=not no_load)
    _print(verification_json(found), as_json, verification_text(found))
    ctx.exit(1 if found.problems else 0)


@main.command("doctor", context_settings=CONTEXT)
@JSON
def show_doctor(as_json: bool) -> None:
    """This machine and what it can do."""
    from bitroute.convert.doctor import diagnose, diagnosis_text

    found = diagnose()
    _print(found, as_json, diagnosis_text(found))


@main.command("eval", context_settings=CONTEXT)
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True)
@click.option("--prompts", default="emoji-16", show_default=True, help="A prompt set, or a text file, one a line.")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--seeds", default="0", show_default=True, help="One picture of each prompt per seed: 0,1,2.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps  [default: the pipeline's]")
@click.option("--size", help="WIDTHxHEIGHT in pixels  [default: the pipeline's]")
@click.option("--call", multiple=True, metavar="NAME=VALUE", help="Any other argument of the pipeline.")
@click.option("--gate", help="Limits on the means: lpips<0.1,psnr>28; exit code 3 where one fails.")
@click.option("--device", default="cpu", show_default=True, help="Where the pipelines run: cpu, cuda, mps.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="torch threads; recorded.")
@click.option("--pictures-only", is_flag=True, help="Leave out the denoiser's error per step and per layer.")
@click.option("--own-text", is_flag=True, help="Candidates encode prompts with their own text encoders.")
@JSON
@click.pass_context
def evaluate_folders(
    ctx: click.Context, original: str, quantized: tuple[str, ...], prompts: str, out: Path, seeds: str,
    steps: int | None, size: str | None, call: tuple[str, ...], gate: str | None, device: str, threads: int,
    pictures_only: bool, own_text: bool, as_json: bool,
) -> None:  # fmt: skip
    """Is it still good? QUANTIZED against ORIGINAL.

    Draws the same prompts and seeds with every pipeline, measures LPIPS, PSNR, SSIM and MS-SSIM beside the noise
    floor, feeds the original's inputs to every denoiser (error per step and per layer), and writes report.html and
    report.json. Exit codes: 0 good, 1 rejected, 3 the gate failed.
    """
    from bitroute.eval.evaluate import evaluate
    from bitroute.eval.gate import parse_gate
    from bitroute.eval.sampling import Sampling, call_arguments, parse_seeds, read_prompts

    limits = parse_gate(gate)
    arguments = call_arguments(call, steps, size)
    sampling = Sampling(read_prompts(prompts), parse_seeds(seeds), arguments, device, threads)
    compare = partial(evaluate, share_text=not own_text, denoiser=not pictures_only)
    ctx.exit(_evaluate(original, quantized, sampling, limits, out, compare, as_json))


def _sampling_of(planned: Plan, device: str) -> Sampling:
    """What the recipe's `eval` draws; refused before the job if it cannot be."""
    from bitroute.errors import RecipeError
    from bitroute.eval.sampling import Sampling, read_prompts

    recipe = planned.recipe.recipe
    if recipe is None or recipe.eval is None:
        mend = "add `eval: {prompts: general-16}` to the recipe, or run `quantize eval` afterwards"
        raise RecipeError(Problem("the recipe does not say how to evaluate", planned.recipe.name, next_step=mend))
    chosen = recipe.eval
    call = {**chosen.call, **({"num_inference_steps": chosen.steps} if chosen.steps else {})}
    return Sampling(read_prompts(chosen.prompts), tuple(chosen.seeds), call, device)


def _evaluate_result(planned: Plan, folder: Path, sampling: Sampling) -> int:
    """The report of a finished job goes beside its folder."""
    from bitroute.eval.evaluate import evaluate
    from bitroute.eval.gate import parse_gate

    recipe = planned.recipe.recipe
    gate = recipe.eval.gate if recipe and recipe.eval else {}
    limits = parse_gate({str(metric): limit for metric, limit in gate.items()})
    report = folder.with_name(f"{folder.name}-report")
    return _evaluate(planned.pipeline.name, [str(folder)], sampling, limits, report, evaluate, False)


def _evaluate(
    original: str, quantized: Sequence[str], sampling: Sampling, limits: Sequence[Limit], out: Path,
    compare: Callable[..., Evaluation], as_json: bool,
) -> int:  # fmt: skip
    """Writes the report; the exit code."""
    from bitroute.eval.page import write_page
    from bitroute.eval.report import table, write_report

    def report(what: str) -> None:
        click.echo(f"drawing: {what}", err=True)

    found = compare(original, quantized, sampling, limits=limits, progress=report)
    content = write_report(found, out)
    page = write_page(content, out)
    verdicts = "\n".join(candidate["verdict"] for candidate in content["candidates"])
    _print(content, as_json, f"{table(found)}\n\n{verdicts}\nreport: {page}")
    rejected = any(candidate.tripwires for candidate in found.candidates)
    return 1 if rejected else 0 if found.passed else 3


def _run(planned: Plan, out: Path, device: str, overwrite: bool, as_json: bool) -> None:
    from bitroute.convert.job import run
    from bitroute.convert.progress import Bar

    if not as_json:
        _print_table(planned)
    total = sum(component.source_bytes for component in planned.components)
    with Bar("quantizing", total) as bar:
        run(planned, out, device=device, overwrite=overwrite, progress=bar.advance)


def _verify(folder: Path, model: str | None, *, load: bool) -> Verification:
    from bitroute.convert.progress import Bar
    from bitroute.convert.record import read_record
    from bitroute.convert.verify import verify

    with Bar("verifying", read_record(folder.expanduser()).size_bytes) as bar:
        return verify(folder, model, load=load, progress=bar.advance)


def _print_plan(planned: Plan, as_json: bool) -> None:
    from bitroute.convert.describe import describe

    if as_json:
        click.echo(json.dumps(describe(planned), indent=1))
    else:
        _print_table(planned)


def _print_result(planned: Plan, out: Path, found: Verification | None, as_json: bool) -> None:
    from bitroute.convert.table import result_text, verification_json, verification_text

    verification = verification_json(found) if found else None
    content = {"out": str(out), "size_bytes": planned.size_bytes, "verification": verification}
    text = "\n".join([*([verification_text(found)] if found else []), result_text(planned, out)])
    _print(content, as_json, text)


def _print(content: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(content, indent=1, default=str) if as_json else text)


def _print_table(planned: Plan) -> None:
    """A pipe or a file gets lines wide enough not to be folded."""
    from rich.console import Console

    from bitroute.convert.table import plan_table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    console.print(plan_table(planned, console.width))


def _again(ctx: click.Context) -> str:
    """The command that takes up what was interrupted."""
    program = Path(sys.argv[0]).name
    program_words = ["python", "-m", "bitroute"] if program == "__main__.py" else [program]
    if "written" in ctx.meta:
        return shlex.join([*program_words, "verify", str(ctx.meta["written"])])
    is_job = ctx.invoked_subcommand is None and "--overwrite" not in sys.argv
    return shlex.join([*program_words, *sys.argv[1:], *(["--overwrite"] if is_job else [])])


if __name__ == "__main__":
    main()
