"""The commands around a job: recipes, recommend, backends, profile, inspect, verify, push, doctor."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitroute.errors import Problem, RecipeError, did_you_mean

if TYPE_CHECKING:
    from bitroute.convert.checkpoint import Pipeline
    from bitroute.convert.plan import Plan
    from bitroute.convert.schema import Recipe
    from bitroute.convert.upload import Target
    from bitroute.convert.verify import Verification

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
VARIANT = click.option("--variant", help="Read weights of this variant, such as fp16; else plain ones.")

OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
RESUME = click.option("--resume", is_flag=True, help="Finish an interrupted job; start it where there is nothing yet.")
NO_VERIFY = click.option("--no-verify", is_flag=True, help="Do not verify the result.")


class Bytes(click.ParamType[int]):
    """`2GB` to bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from bitroute.convert.shards import SIZES, parse_size

        found = parse_size(str(value))
        return self.fail(f"{value!r} is not {SIZES}", param, ctx) if found is None else found


def check_one_way(overwrite: bool, resume: bool) -> None:
    if resume and overwrite:
        raise click.UsageError("--resume goes on with what is there, --overwrite begins anew: give one of them")


@click.group(context_settings=CONTEXT)
def recipes() -> None:
    """List, show, copy, check recipes."""


@recipes.command("list")
@click.argument("family", required=False)
@JSON
def recipes_list(family: str | None, as_json: bool) -> None:
    """The built-in recipes by family; with FAMILY, those of one (flux, wan22, …)."""
    from bitroute.convert.recipe import builtin_recipes, family_of, read_recipe

    names = builtin_recipes()
    if family is not None and family not in {family_of(name) for name in names}:
        near = did_you_mean(family, sorted({family_of(name) for name in names}))
        raise RecipeError(Problem(f"no family {family!r} of built-in recipes", next_step=near or "leave it out"))
    wanted = {name: path for name, path in names.items() if family in (None, family_of(name))}
    found = {name: read_recipe(str(path)).recipe for name, path in wanted.items()}
    rows = {name: recipe.description for name, recipe in found.items() if recipe}
    show(rows, as_json, _grouped({name: recipe for name, recipe in found.items() if recipe}))


def _grouped(found: Mapping[str, Recipe]) -> str:
    """Every family with its model, and its recipes below."""
    from bitroute.convert.recipe import family_of

    lines = []
    for family, group in groupby(sorted(found, key=lambda name: (family_of(name), name)), key=family_of):
        names = list(group)
        lines.append(f"\n{family}: {found[names[0]].model}")
        lines += [f"  {name:<20} {found[name].description}" for name in names]
    return "\n".join(lines).lstrip()


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


class _Memory(click.ParamType[float]):
    """`12GB` as cards are sold, which is 12 GiB; without a unit GiB too."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d{1,4}(?:\.\d{1,6})?)\s*(?:GI?B?)?", str(value).strip(), re.IGNORECASE)
        return float(found[1]) if found else self.fail(f"{value!r} is not a size such as 12GB", param, ctx)


@click.command("recommend", context_settings=CONTEXT)
@click.argument("model")
@click.option("--vram", type=_Memory(), required=True, help="Memory of the GPU, such as 12GB.")
@click.option("--reserve", type=_Memory(), help="Kept free for activations  [default: 1.5 GiB; for videos 4 GiB]")
@click.option("--allow-pickle", is_flag=True, help="Also read weights from *.bin files, tensors alone.")
@VARIANT
@JSON
def recommend_recipe(
    model: str, vram: float, reserve: float | None, allow_pickle: bool, variant: str | None, as_json: bool
) -> None:
    """Which recipe suits MODEL on a card of that size, and why.

    Every recipe of the model's family is planned; no weight is read. The best is the one that loses least among
    those that need no more than model offload.
    """
    from bitroute.convert.recommend import advice_json, advice_text, recommend

    advice = recommend(model, vram, reserve, allow_pickle=allow_pickle, variant=variant)
    show(advice_json(advice), as_json, advice_text(advice))


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


@click.command("profile", context_settings=CONTEXT)
@click.argument("model")
@click.argument("component", required=False)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the profile to this file.")
@click.option("--allow-pickle", is_flag=True, help="Also read weights from *.bin files, tensors alone.")
@VARIANT
def show_profile(
    model: str, component: str | None, out: Path | None, allow_pickle: bool, variant: str | None
) -> None:  # fmt: skip
    """What the layers of a COMPONENT do and which to keep, as a file to edit.

    It is the built-in profile of the component's class, or else one inferred from its modules. MODEL is a folder, a
    Hub id or builtin:tiny-flux; COMPONENT is its transformer or unet, if not given. A recipe names the edited file
    under the component: `profile: ./FILE.yaml`.
    """
    from bitroute.convert.checkpoint import open_pipeline
    from bitroute.convert.document import write_new
    from bitroute.convert.inference import profile_text

    pipeline = open_pipeline(model, variant=variant, access="outline", allow_pickle=allow_pickle)
    class_name, text = profile_text(pipeline, component)
    click.echo(write_new(text, out, f"{class_name}.yaml") if out else text, nl=bool(out))


@click.command("inspect", context_settings=CONTEXT)
@click.argument("path")
@VARIANT
@JSON
def inspect_path(path: str, variant: str | None, as_json: bool) -> None:
    """What a file or folder of safetensors holds."""
    from bitroute.convert.inspection import inspect, inspection_text

    found = inspect(path, variant)
    show(found, as_json, inspection_text(found))


@click.command("verify", context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", "-m", help="The source to compare with  [default: the one the checkpoint names]")
@click.option("--no-load", is_flag=True, help="Do not load the components in a fresh process.")
@click.option("--allow-pickle", is_flag=True, help="Also read a source whose weights are *.bin files.")
@JSON
@click.pass_context
def verify_folder(
    ctx: click.Context, folder: Path, model: str | None, no_load: bool, allow_pickle: bool, as_json: bool
) -> None:
    """Prove a finished checkpoint.

    Every file is what the job wrote, every layer decodes to its source, every component loads in a fresh process.
    """
    from bitroute.convert.table import verification_json, verification_text

    found = run_verification(folder, model, load=not no_load, allow_pickle=allow_pickle)
    show(verification_json(found), as_json, verification_text(found))
    ctx.exit(1 if found.problems else 0)


@click.command("push", context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
@click.option("--revision", help="A branch, made if it is missing  [default: the default branch]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of writing the branch.")
@click.option("--base-model", metavar="OWNER/NAME", help="The model on the Hub that a local source is.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder of its evaluation  [default: FOLDER-report]")
@click.option("--accept-license", is_flag=True, help="Publish although the base model is gated: its licence lets you.")
@JSON
def push_folder(
    folder: Path, repo: str, private: bool, revision: str | None, create_pr: bool, base_model: str | None,
    report: Path | None, accept_license: bool, as_json: bool,
) -> None:  # fmt: skip
    """Publish a finished checkpoint on the Hub, with a model card.

    FOLDER is verified and loaded in a fresh process before anything is sent; everything arrives in one commit. The same
    command takes up an upload that was interrupted. Weights of another checkpoint in the repository are removed.
    """
    from bitroute.convert.push import check_folder, push
    from bitroute.convert.upload import Target

    target = Target(repo, private, revision, create_pr, accept_license)
    say = None if as_json else say_on_stderr
    verification = None
    if not as_json:  # a bar; but first what can be refused at once
        check_folder(folder, target, base_model, report)
        verification = run_verification(folder, None, load=True)
    url = push(folder, target, base_model=base_model, report=report, verification=verification, progress=say)
    show({"url": url}, as_json, url)


def push_target(planned: Plan, repo: str, accept_license: bool) -> Target:
    """Where `--push`, or else the recipe, puts the result; refused before the job if it cannot be."""
    from bitroute.convert.push import check_push
    from bitroute.convert.schema import PushRecipe
    from bitroute.convert.upload import Target

    recipe = planned.recipe.recipe
    said = (recipe.push if recipe else None) or (PushRecipe.model_validate({"repo": repo}) if repo else None)
    if said is None:
        mend = "give --push OWNER/NAME, or add `push: {repo: OWNER/NAME}` to the recipe"
        raise RecipeError(Problem("the recipe does not say where to publish", planned.recipe.name, next_step=mend))
    target = Target(repo or said.repo, said.private, said.revision, said.create_pr, accept_license)
    check_push(target, planned.pipeline.hub.repo if planned.pipeline.hub else None)
    return target


def publish(folder: Path, target: Target, verification: Verification | None, as_json: bool) -> str:
    """The URL of what a job has just written, verified and evaluated."""
    from bitroute.convert.push import push

    return push(folder, target, verification=verification, progress=None if as_json else say_on_stderr)


@click.command("doctor", context_settings=CONTEXT)
@JSON
def show_doctor(as_json: bool) -> None:
    """This machine and what it can do."""
    from bitroute.convert.doctor import diagnose, diagnosis_text

    found = diagnose()
    show(found, as_json, diagnosis_text(found))


def run_verification(
    folder: Path, model: str | Pipeline | None, *, load: bool, allow_pickle: bool = False
) -> Verification:
    from bitroute.convert.progress import Bar
    from bitroute.convert.record import read_record
    from bitroute.convert.verify import verify

    with Bar("verifying", read_record(folder.expanduser()).size_bytes) as bar:
        return verify(folder, model, load=load, allow_pickle=allow_pickle, progress=bar.advance)


def print_plan(planned: Plan, as_json: bool) -> None:
    """A pipe or a file gets lines wide enough not to be folded."""
    from bitroute.convert.describe import describe

    if as_json:
        click.echo(json.dumps(describe(planned), indent=1))
        return
    from rich.console import Console

    from bitroute.convert.table import plan_table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    console.print(plan_table(planned, console.width))


def say_on_stderr(what: str) -> None:
    click.echo(what, err=True)


def show(content: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(content, indent=1, default=str) if as_json else text)
