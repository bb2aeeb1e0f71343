"""`quantize search`: the recipe that loses least within a budget."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from bitroute.convert.commands import CONTEXT, JSON, Bytes, show
from bitroute.eval.commands import CALL, DEVICE, INPUT, PIPELINE, PROMPTS, SIZE, STEPS, THREADS

if TYPE_CHECKING:
    from rich.progress import Progress

    from bitroute.calibrate.search_request import Wish
    from bitroute.convert.schema import EvalRecipe

GENERAL = "general-16"


@click.command("search", context_settings=CONTEXT)
@click.argument("model", required=False)
@click.option("--bits", type=float, help="Bits per weight of the component, everything counted: 4.6.")
@click.option("--budget", "budget_bytes", type=Bytes(), help="Size of the whole checkpoint, all components: 7GB.")
@click.option("--gate", help="The smallest whose pictures pass these limits on the means: lpips<0.1,psnr>28.")
@click.option("--recipe-out", "-o", type=click.Path(path_type=Path), required=True, help="The recipe to write.")
@click.option("--recipe", "-r", "base", help="A recipe for the other components, with the model, and how to run it.")
@click.option("--component", help="The denoiser to search  [default: transformer or unet]")
@click.option(
    "--candidates", metavar="LIST|FILE",
    help="Formats to choose from: nvfp4:scale=mse,mxfp4:method.rotate=32,int8,keep; or a YAML file with "
    "`candidates:`, a list of {backend, options, method}  [default: formats of 4, 6 and 8 bits, with GPTQ where "
    "--statistics allows it, and keep]",
)  # fmt: skip
@click.option(
    "--keep", type=click.Choice(["8-bit", "profile", "none"]), default="8-bit", show_default=True,
    help="What the profile of the model class keeps: at least 8-bit weights and plain activations; as the profile "
    "says; or anything that the measurements allow.",
)  # fmt: skip
@click.option(
    "--container", type=click.Choice(["auto", "native"]), default="auto", show_default=True,
    help="native: only formats that one library's folder can hold, so that plain diffusers loads the result.",
)  # fmt: skip
@PROMPTS
@STEPS
@SIZE
@CALL
@INPUT
@PIPELINE
@click.option(
    "--samples", type=click.IntRange(1), default=32, show_default=True,
    help="Calls of the denoiser for each measurement, spread over the steps of up to 16 prompts.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
    help="In which the denoiser is measured. bfloat16 takes half the memory, but its own rounding hides what a layer "
    "in 8 bits loses.",
)  # fmt: skip
@click.option("--statistics", type=click.Path(path_type=Path), help="A file of `quantize calibrate`, for the formats.")
@click.option(
    "--estimate", is_flag=True,
    help="Run each layer in one candidate only, in two where some use GPTQ; the errors of the others come from "
    "--statistics. For large models.",
)  # fmt: skip
@click.option(
    "--methods", is_flag=True,
    help="Try rotations, smoothing and branches of low rank with each format that rounds weight by weight, with GPTQ "
    "where --statistics has the Hessian, and measure those that lower the layer's expected error per byte.",
)  # fmt: skip
@click.option(
    "--simplify", type=click.FloatRange(0, 100), default=1.0, show_default=True, metavar="PERCENT",
    help="How much more squared error a recipe of fewer rules may have.",
)  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), help="Folder of the measurements  [default: NAME-search]")
@click.option("--pareto", type=click.Path(path_type=Path), help="Write the front to this .svg or .json file too.")
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
@DEVICE
@THREADS
@JSON
def search_recipe(
    model: str | None, recipe_out: Path, pareto: Path | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Find the recipe that loses least within a budget.

    Runs MODEL's denoiser on its own recorded inputs, with one linear layer at a time in each candidate format, and
    chooses a format for each layer so that the error of the output is least: for --bits, for --budget, or for the
    smallest checkpoint that passes --gate. Convolutions stay as they are; other components too, or as --recipe says.

    The average of --bits counts everything in the component, --budget everything in the checkpoint. What the profile
    of the model class keeps may get 8-bit weights, never fewer: --keep says otherwise. With --keep none the error is
    least, because a layer's own measurement protects it.

    Each measurement is kept: the same command goes on after an interrupt, and another goal with the same --work
    measures nothing anew. Needs pip install "bitroute[search]".
    """
    from bitroute.calibrate.search import run
    from bitroute.calibrate.search_report import check_plot, content, estimate_text, text, write_plot
    from bitroute.calibrate.search_request import prepare

    check_plot(pareto, recipe_out)
    search = prepare(_wish(model, recipe_out, options))
    cost = {
        "forward_passes": search.forwards,
        "encodings": search.encodings,
        "layers": len(search.space.layers),
        "work": str(search.work),
    }
    if dry_run:
        show(cost, as_json, estimate_text(search))
        return
    if not as_json:
        click.echo(estimate_text(search), err=True)
    with Counts() as counts:
        found = run(search, counts.say)
    if pareto:
        write_plot(found, pareto)
    show(content(found), as_json, text(found))


class Counts:
    """A bar for each stage on a terminal; elsewhere a line at each tenth of a stage."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._task: Any = None
        self.what, self.tenth, self.begun = "", -1, 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            self._live = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, what: str, done: int, total: int) -> None:
        """total: 0 where it is one thing."""
        if what != self.what:
            self.what, self.tenth, self.begun = what, -1, time.monotonic()
            if self._live:
                from rich.markup import escape

                self._task = self._live.add_task(escape(what), total=total or None)
        if self._live:
            self._live.update(self._task, completed=done, total=total or None)
        elif (tenth := done * 10 // total if total else 0) > self.tenth:
            self.tenth = tenth
            print(f"searching: {what}{self._far(done, total)}", file=sys.stderr)

    def _far(self, done: int, total: int) -> str:
        if not total:
            return ""
        left = (time.monotonic() - self.begun) * (total - done) / done if done else None
        return f", {done} of {total}" + (f", about {left:.0f} s left" if left is not None and done < total else "")


def _wish(model: str | None, recipe_out: Path, options: dict[str, Any]) -> Wish:
    """Where nothing is said, the `eval` of the base recipe says how to run the model."""
    from bitroute.calibrate.search_request import Wish
    from bitroute.eval.inputs import parse_inputs
    from bitroute.eval.sampling import Sampling, call_arguments, read_prompts

    said = _eval_of(options["base"])
    prompts = options.pop("prompts") or (said.prompts if said else GENERAL)
    own = call_arguments(options.pop("call"), options.pop("steps"), options.pop("size"))
    steps = {"num_inference_steps": said.steps} if said and said.steps else {}
    call = {**steps, **(said.call if said else {}), **own}
    inputs = options.pop("inputs") or [f"{name}={file}" for name, file in (said.inputs if said else {}).items()]
    pipeline = options.pop("pipeline") or (said.pipeline if said else None)
    texts = read_prompts(prompts)
    sampling = Sampling(
        texts, tuple(said.seeds if said else (0,)), call, options.pop("device"), options.pop("threads"),
        pipeline=pipeline, inputs=parse_inputs(inputs, len(texts)),
    )  # fmt: skip
    options["native"] = options.pop("container") == "native"
    options["give_up"] = options.pop("simplify") / 100
    return Wish(model, recipe_out, sampling, eval=_eval_section(prompts, inputs, sampling, said), **options)


def _eval_of(base: str | None) -> EvalRecipe | None:
    from bitroute.convert.recipe import read_recipe

    recipe = read_recipe(base).recipe if base else None
    return recipe.eval if recipe else None


def _eval_section(prompts: str, inputs: Sequence[str], sampling: Any, said: EvalRecipe | None) -> dict[str, Any]:
    """What `quantize --eval` draws with the recipe: the same, from wherever it is run; {} where no recipe says that."""
    from bitroute.eval.sampling import prompt_sets

    pictures = {name: file for name, _, file in (text.partition("=") for text in inputs)}
    if len(pictures) != len(inputs):
        return {}
    call = dict(sampling.call)
    steps = call.pop("num_inference_steps", None)
    section: dict[str, Any] = {"prompts": prompts if prompts in prompt_sets() else os.path.abspath(prompts)}
    absolute = {name: os.path.abspath(Path(file).expanduser()) for name, file in pictures.items()}
    section |= {"inputs": absolute} if absolute else {}
    section |= {"steps": steps} if isinstance(steps, int) else {}
    section |= {"call": call} if call else {}
    section |= {"seeds": list(sampling.seeds)} if sampling.seeds != (0,) else {}
    section |= {"pipeline": sampling.pipeline} if sampling.pipeline else {}
    return section | ({"gate": dict(said.gate)} if said and said.gate else {})
