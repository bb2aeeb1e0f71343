"""The command line: `quantize --recipe R`, and the subcommands around it. Results on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bitroute.calibrate.commands import calibrate_model
from bitroute.calibrate.search_command import search_recipe
from bitroute.convert import commands as around_a_job
from bitroute.convert import sources
from bitroute.convert.commands import CONTEXT, JSON, VARIANT, run_verification
from bitroute.convert.conversion_command import SHARD_SIZE, convert_model
from bitroute.convert.garbage import collect_seldom
from bitroute.convert.noise import quiet
from bitroute.errors import BitrouteError, Problem
from bitroute.eval import commands as evaluation

if TYPE_CHECKING:
    from types import FrameType

    from bitroute.convert.plan import Plan
    from bitroute.convert.upload import Target
    from bitroute.convert.verify import Verification
    from bitroute.eval.sampling import Sampling

ALARM = [signal.SIGALRM] if hasattr(signal, "SIGALRM") else []  # not on Windows


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
        collect_seldom()
        if not verbose:
            quiet()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows `?`, it is no reason to fail
                stream.reconfigure(errors="replace")
        try:
            with _terminable() as received:
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            _interrupted(ctx, received)
        except BrokenPipeError:  # `quantize … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except Exception as error:
            if verbose > 1:
                traceback.print_exc()
            if received and not isinstance(error, BitrouteError):  # a library that is being imported turns it into this
                _interrupted(ctx, received)
            known = error if isinstance(error, BitrouteError) else BitrouteError(_internal(error))
            _print_problems(known)
            ctx.exit(known.exit_code)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """The signals to end that were received."""
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python sets no handlers
        yield received
        return
    hook = sys.unraisablehook

    def dropped(what: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in a __del__ or a callback: raised again outside."""
        if issubclass(what.exc_type, KeyboardInterrupt) and ALARM:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(what)

    numbers = [signal.SIGTERM, *ALARM, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else [])]
    before = {number: signal.signal(number, end) for number in numbers}
    sys.unraisablehook = dropped
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(ctx: click.Context, received: list[int]) -> NoReturn:
    _end_soon()
    click.echo("\ninterrupted; nothing unfinished carries a final name", err=True)
    click.echo(f"to go on: {_again(ctx)}", err=True)
    ctx.exit(143 if signal.SIGTERM in received else 130)


def _end_soon() -> None:
    """What still has to be said is said, without another interrupt."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, *ALARM):
            signal.signal(number, signal.SIG_IGN)


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
@click.option(
    "--model",
    "-m",
    help="Folder of a pipeline or component, Hub id or builtin:tiny-flux, instead of the recipe's `model`.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Output folder  [default: the recipe's name]")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads no weights.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of bitroute in the output folder.")
@click.option("--resume", is_flag=True, help="Finish an interrupted job; start it where there is nothing yet.")
@click.option("--allow-pickle", is_flag=True, help="Also read weights from *.bin files, tensors alone.")
@click.option("--config", help="The pipeline that a single file belongs to: for all that it lacks.")
@VARIANT
@SHARD_SIZE
@click.option("--statistics", help="What `quantize calibrate` measured of this model, instead of the recipe's file.")
@click.option("--dequantize", is_flag=True, help="Read what is already quantized as bf16: the errors of both add up.")
@click.option("--device", default="cpu", show_default=True, help="Where the arithmetic runs: cpu, cuda, mps.")
@click.option("--no-verify", is_flag=True, help="Do not verify the result.")
@click.option("--eval", "evaluated", is_flag=True, help="Compare with the original as the recipe's `eval` says.")
@click.option(
    "--push", "pushed", is_flag=False, flag_value="", metavar="[OWNER/NAME]",
    help="Then evaluate and publish on the Hub, where this or the recipe's `push` says.",
)  # fmt: skip
@click.option("--accept-license", is_flag=True, help="Publish although the base model is gated: its licence lets you.")
@JSON
@click.option("-v", "--verbose", count=True, help="-v: the libraries' own messages; -vv: tracebacks too.")
@click.version_option(package_name="bitroute")
@click.pass_context
def main(
    ctx: click.Context, recipe: str | None, model: str | None, out: Path | None, dry_run: bool,
    overwrite: bool, resume: bool, allow_pickle: bool, config: str | None, variant: str | None,
    shard_size: int | None, statistics: str | None, dequantize: bool, device: str, no_verify: bool, evaluated: bool,
    pushed: str | None, accept_license: bool, as_json: bool, verbose: int,
) -> None:  # fmt: skip
    """Quantize a diffusers pipeline: a recipe in, a checkpoint that diffusers loads out.

    \b
    quantize --recipe tiny-flux-fp8                                the bundled model, to try it
    quantize --recipe flux-fp8 --model ./FLUX.1-dev --dry-run      the plan alone
    quantize --recipe flux-fp8 --model ./FLUX.1-dev --out ./flux-fp8
    quantize --recipe flux-fp8 --model black-forest-labs/FLUX.1-dev --push me/FLUX.1-dev-fp8

    Exit codes: 0 done, 1 failed, 2 usage or recipe refused, 3 the quality gate failed, 130 interrupted.
    """
    if ctx.invoked_subcommand is not None:
        return
    if recipe is None:
        raise click.UsageError("give --recipe, or a command; `quantize recipes list` shows the built-in recipes")
    around_a_job.check_one_way(overwrite, resume)
    from bitroute.convert.job import check_device
    from bitroute.convert.journal import journal_of
    from bitroute.convert.output import check_output
    from bitroute.convert.plan import fetch, plan

    check_device(device)
    planned = plan(
        recipe, model, allow_pickle=allow_pickle, dequantize=dequantize, config=config, shard_bytes=shard_size,
        variant=variant, statistics=statistics,
    )  # fmt: skip
    target = None if pushed is None else around_a_job.push_target(planned, pushed, accept_license)
    wanted = evaluated or (target and planned.recipe.recipe and planned.recipe.recipe.eval)
    sampling = evaluation.sampling_of(planned, device) if wanted else None
    folder = out.expanduser() if out else Path(Path(recipe).stem)
    if out or not dry_run:
        check_output(planned, folder, journal_of(planned, device), overwrite, resume)
    if dry_run:
        around_a_job.print_plan(planned, as_json)
        return
    planned = fetch(planned)
    ctx.meta["out"] = folder
    _run(planned, folder, device, overwrite, resume, as_json)
    ctx.meta["written"] = True
    found = None if no_verify else run_verification(folder, planned.pipeline, load=True)
    ctx.exit(_conclude(planned, folder, found, sampling, target, as_json))


def _conclude(
    planned: Plan, folder: Path, found: Verification | None, sampling: Sampling | None, target: Target | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Prints what was written, evaluates and publishes it as far as all goes well; the exit code."""
    content, text = _result(planned, folder, found)
    code = 1 if found and found.problems else 0
    say = (lambda what: None) if as_json else click.echo
    say(text)
    if sampling and not code:
        content["evaluation"], words, code = evaluation.evaluate_result(planned, folder, sampling)
        say(words)
    if target and not code:
        content["url"] = around_a_job.publish(folder, target, found, as_json)
        say(content["url"])
    if as_json:
        click.echo(json.dumps(content, indent=1, default=str))
    return code


def _run(planned: Plan, out: Path, device: str, overwrite: bool, resume: bool, as_json: bool) -> None:
    from bitroute.convert.job import run
    from bitroute.convert.progress import Bar

    if not as_json:
        around_a_job.print_plan(planned, as_json)
    total = sum(component.source_bytes for component in planned.components)
    with Bar("quantizing", total) as bar:
        converted = run(planned, out, device=device, overwrite=overwrite, resume=resume, progress=bar.advance)
    if not converted:
        click.echo(f"{out} is finished: there is nothing to convert", err=True)


def _result(planned: Plan, out: Path, found: Verification | None) -> tuple[dict[str, Any], str]:
    """For machines, and for people."""
    from bitroute.convert.table import result_text, verification_json, verification_text

    verification = verification_json(found) if found else None
    content = {"out": str(out), "size_bytes": planned.size_bytes, "verification": verification}
    return content, "\n".join([*([verification_text(found)] if found else []), result_text(planned, out)])


def _again(ctx: click.Context) -> str:
    """The command that takes up what was interrupted: the same one, with --resume if its job has left something."""
    program = Path(sys.argv[0]).name
    program_words = ["python", "-m", "bitroute"] if program == "__main__.py" else [program]
    words = sys.argv[1:]
    if "out" in ctx.meta and ("written" in ctx.meta or _is_begun(ctx.meta["out"])):
        words = [*(word for word in words if word not in ("--overwrite", "--resume")), "--resume"]
    return shlex.join([*program_words, *words])


def _is_begun(out: Path) -> bool:
    from bitroute.convert.journal import UNFINISHED

    return (out / UNFINISHED).is_file()


COMMANDS = (
    around_a_job.recipes, around_a_job.recommend_recipe, around_a_job.list_backends, around_a_job.inspect_path,
    around_a_job.verify_folder, around_a_job.push_folder, around_a_job.show_profile, around_a_job.show_doctor,
    sources.dequantize_model, convert_model,
    evaluation.evaluate_folders, evaluation.compare_folders,
    calibrate_model, search_recipe,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
