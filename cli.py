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

from bitroute.convert.noise import quiet
from bitroute.errors import BitrouteError

if TYPE_CHECKING:
    from bitroute.convert.plan import Plan
    from bitroute.convert.verify import Verification

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Command(click.Group):
    """Turns bitroute's errors into text and an exit code; a traceback only with -vv."""

    def invoke(self, ctx: click.Context) -> Any:
        if not ctx.params.get("verbose", 0):
            quiet()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows `?`, it is no reason to fail
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except BitrouteError as error:
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            click.echo("\n".join(str(problem) for problem in error.problems), err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("\ninterrupted; nothing unfinished carries a final name", err=True)
            click.echo(f"again: {_again()}", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # `quantize … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(cls=_Command, invoke_without_command=True, context_settings=CONTEXT)
@click.option("--recipe", "-r", help="A recipe file, or the name of a built-in one.")
@click.option(
    "--model", "-m", help="The pipeline folder, or builtin:tiny-flux; overrides the recipe's `model`."
)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), help="Output folder  [default: the recipe's name]"
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads no weights.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of bitroute in the output folder.")
@click.option("--device", default="cpu", show_default=True, help="Where the arithmetic runs: cpu, cuda, mps.")
@click.option("--no-verify", is_flag=True, help="Do not verify the result.")
@JSON
@click.option("-v", "--verbose", count=True, help="-v: the libraries' own messages; -vv: tracebacks too.")
@click.version_option(package_name="bitroute")
@click.pass_context
def main(
    ctx: click.Context, recipe: str | None, model: str | None, out: Path | None, dry_run: bool,
    overwrite: bool, device: str, no_verify: bool, as_json: bool, verbose: int,
) -> None:  # fmt: skip
    """Quantize a diffusers pipeline: a recipe in, a checkpoint that diffusers loads out.

    \b
    quantize --recipe tiny-flux-fp8                                the bundled model, to try it
    quantize --recipe flux-fp8 --model ./FLUX.1-dev --dry-run      the plan alone
    quantize --recipe flux-fp8 --model ./FLUX.1-dev --out ./flux-fp8

    Exit codes: 0 done, 1 the job failed, 2 usage or recipe refused, 130 interrupted.
    """
    if ctx.invoked_subcommand is not None:
        return
    if recipe is None:
        raise click.UsageError(
            "give --recipe, or a command; `quantize recipes list` shows the built-in recipes"
        )
    from bitroute.convert.plan import plan

    out = out or Path(Path(recipe).stem)
    planned = plan(recipe, model)
    if dry_run:
        _print_plan(planned, as_json)
        return
    _run(planned, out, device, overwrite, as_json)
    found = None if no_verify else _verify(out, planned.pipeline.name, load=True)
    _print_result(planned, out, found, as_json)
    ctx.exit(1 if found and found.problems else 0)


@main.group(context_settings=CONTEXT)
def recipes() -> None:
    """List, show, copy and check recipes."""


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
    """The formats a layer can have; with NAME, its options and arithmetic."""
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
    """What a .safetensors file or a checkpoint folder holds, from its headers."""
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
    """Prove a finished checkpoint: its tensors, its weights against the source, and that it loads."""
    from bitroute.convert.table import verification_json, verification_text

    found = _verify(folder, model, load=not no_load)
    _print(verification_json(found), as_json, verification_text(found))
    ctx.exit(1 if found.problems else 0)


@main.command("doctor", context_settings=CONTEXT)
@JSON
def show_doctor(as_json: bool) -> None:
    """This machine: devices, library versions, and which formats it can store and compute."""
    from bitroute.convert.doctor import diagnose, diagnosis_text

    found = diagnose()
    _print(found, as_json, diagnosis_text(found))


def _run(planned: Plan, out: Path, device: str, overwrite: bool, as_json: bool) -> None:
    from bitroute.convert.job import run
    from bitroute.convert.table import plan_table

    if not as_json:
        _console().print(plan_table(planned))
    total = sum(component.source_bytes for component in planned.components)
    with _Bar("quantizing", total) as bar:
        run(planned, out, device=device, overwrite=overwrite, progress=bar.advance)


def _verify(folder: Path, model: str | None, *, load: bool) -> Verification:
    from bitroute.convert.verify import verify

    with _Bar("verifying", None) as bar:
        return verify(folder, model, load=load, progress=lambda what: bar.advance(0, what))


def _print_plan(planned: Plan, as_json: bool) -> None:
    from bitroute.convert.describe import describe
    from bitroute.convert.table import plan_table

    if as_json:
        click.echo(json.dumps(describe(planned), indent=1))
    else:
        _console().print(plan_table(planned))


def _print_result(planned: Plan, out: Path, found: Verification | None, as_json: bool) -> None:
    from bitroute.convert.table import result_text, verification_json, verification_text

    verification = verification_json(found) if found else None
    content = {"out": str(out), "size_bytes": planned.size_bytes, "verification": verification}
    text = "\n".join([*([verification_text(found)] if found else []), result_text(planned, out)])
    _print(content, as_json, text)


def _print(content: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(content, indent=1, default=str) if as_json else text)


def _console() -> Any:
    """Stdout; a pipe or a file gets lines wide enough not to be folded."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def _again() -> str:
    program = Path(sys.argv[0]).name
    words = [*(["python", "-m", "bitroute"] if program == "__main__.py" else [program]), *sys.argv[1:]]
    is_job = any(word.startswith(("--recipe", "-r")) for word in words)
    return shlex.join([*words, *(["--overwrite"] if is_job and "--overwrite" not in words else [])])


class _Bar:
    """A bar with rate and time left on a terminal; a line every tenth of the way elsewhere."""

    def __init__(self, title: str, total_bytes: int | None) -> None:
        self.title, self.total_bytes, self.done_bytes, self.tenth = title, total_bytes, 0, 0
        self.live: Any = None

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            self.live = _rich_progress()
            self.live.start()
            self.task = self.live.add_task(self.title, total=self.total_bytes, what="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def advance(self, done_bytes: int, what: str) -> None:
        self.done_bytes += done_bytes
        if self.live:
            self.live.update(self.task, advance=done_bytes, what=what)
        elif self.total_bytes and self.done_bytes * 10 // self.total_bytes > self.tenth:
            self.tenth = self.done_bytes * 10 // self.total_bytes
            click.echo(f"{self.title}: {self.tenth * 10} % of {self.total_bytes / 1e6:,.1f} MB", err=True)


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    main()
