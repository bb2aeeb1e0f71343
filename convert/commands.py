"""The commands around a job: recipes, backends, inspect, verify, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bitroute.convert.verify import Verification

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(context_settings=CONTEXT)
def recipes() -> None:
    """List, show, copy, check recipes."""


@recipes.command("list")
@JSON
def recipes_list(as_json: bool) -> None:
    """The built-in recipes."""
    from bitroute.convert.recipe import builtin_recipes, read_recipe

    found = {name: read_recipe(str(path)).recipe for name, path in builtin_recipes().items()}
    rows = {name: recipe.description for name, recipe in found.items() if recipe}
    show(rows, as_json, "\n".join(f"{name:<18} {description}" for name, description in rows.items()))


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


@click.command("backends", context_settings=CONTEXT)
@click.argument("name", required=False)
@JSON
def list_backends(name: str | None, as_json: bool) -> None:
    """The formats; with NAME, its options."""
    from bitroute.convert.doctor import describe_backend, list_formats

    if name:
        described = describe_backend(name)
        show(described, as_json, described["text"])
    else:
        formats = list_formats()
        show(formats, as_json, "\n".join(f"{key:<15} {words}" for key, words in formats.items()))


@click.command("inspect", context_settings=CONTEXT)
@click.argument("path")
@JSON
def inspect_path(path: str, as_json: bool) -> None:
    """What a file or folder of safetensors holds."""
    from bitroute.convert.inspection import inspect, inspection_text

    found = inspect(path)
    show(found, as_json, inspection_text(found))


@click.command("verify", context_settings=CONTEXT)
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

    found = run_verification(folder, model, load=not no_load)
    show(verification_json(found), as_json, verification_text(found))
    ctx.exit(1 if found.problems else 0)


@click.command("doctor", context_settings=CONTEXT)
@JSON
def show_doctor(as_json: bool) -> None:
    """This machine and what it can do."""
    from bitroute.convert.doctor import diagnose, diagnosis_text

    found = diagnose()
    show(found, as_json, diagnosis_text(found))


def run_verification(folder: Path, model: str | None, *, load: bool) -> Verification:
    from bitroute.convert.progress import Bar
    from bitroute.convert.record import read_record
    from bitroute.convert.verify import verify

    with Bar("verifying", read_record(folder.expanduser()).size_bytes) as bar:
        return verify(folder, model, load=load, progress=bar.advance)


def show(content: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(content, indent=1, default=str) if as_json else text)
