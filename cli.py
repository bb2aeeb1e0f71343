"""The command line: `quantize --recipe R`, and the subcommands around it. Results on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitroute.convert import commands as around_a_job
from bitroute.convert.commands import CONTEXT, JSON, run_verification, show
from bitroute.convert.noise import quiet
from bitroute.errors import BitrouteError, Problem
from bitroute.eval import commands as evaluation

if TYPE_CHECKING:

    from bitroute.convert.plan import Plan
    from bitroute.convert.verify import Verification


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
    sampling = evaluation.sampling_of(planned, device) if evaluated else None
    folder = out.expanduser() if out else Path(Path(recipe).stem)
    if out or not dry_run:
        check_output(planned, folder, written_files(planned), overwrite)
    if dry_run:
        _print_plan(planned, as_json)
        return
    _run(planned, folder, device, overwrite, as_json)
    ctx.meta["written"] = folder
    found = None if no_verify else run_verification(folder, planned.pipeline.name, load=True)
    _print_result(planned, folder, found, as_json)
    if (found and found.problems) or sampling is None:
        ctx.exit(1 if found and found.problems else 0)
    ctx.exit(evaluation.evaluate_result(planned, folder, sampling))


def _run(planned: Plan, out: Path, device: str, overwrite: bool, as_json: bool) -> None:
    from bitroute.convert.job import run
    from bitroute.convert.progress import Bar

    if not as_json:
        _print_table(planned)
    total = sum(component.source_bytes for component in planned.components)
    with Bar("quantizing", total) as bar:
        run(planned, out, device=device, overwrite=overwrite, progress=bar.advance)


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
    show(content, as_json, text)


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


COMMANDS = (
    around_a_job.recipes, around_a_job.list_backends, around_a_job.inspect_path, around_a_job.verify_folder,
    around_a_job.show_doctor, evaluation.evaluate_folders,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
