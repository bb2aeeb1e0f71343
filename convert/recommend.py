"""Which recipe suits a card: the smallest loss of precision among those whose weights fit, and how to load it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch

from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.checkpoint import Component, Pipeline, open_pipeline
from bitroute.convert.plan import Plan, plan_pipeline
from bitroute.convert.profile import find_profile
from bitroute.convert.recipe import RecipeFile, builtin_recipes, family_of, read_recipe
from bitroute.convert.table import size
from bitroute.errors import BitrouteError, Problem, RecipeError

__all__ = ["Advice", "Choice", "advice_json", "advice_text", "recommend"]

Offload = Literal["none", "model", "blocks"]
HOW: Mapping[Offload, str] = {
    "none": "pipeline.to('cuda')",
    "model": "pipeline.enable_model_cpu_offload()      # one component on the GPU at a time",
    "blocks": "pipeline.enable_sequential_cpu_offload() # every block crosses the bus in every step: slow",
}
DENOISERS = ("transformer", "transformer_2", "unet", "unet_2", "prior")
AS_IT_IS = "(as it is)"
GENERIC = {"int8": "int8", "fp8": "float8", "nf4": "nf4"}  # for classes without a family of recipes
GIB = 2**30
NEAR_LOSSLESS = 0.04  # relative weight error of every 8-bit format; pictures of tiny-flux: LPIPS below 0.0002
PICTURE_RESERVE_GIB, VIDEO_RESERVE_GIB = (
    1.5,
    4.0,
)  # estimates: CUDA context, activations of a 1024 px picture, of 33 frames


@dataclass(frozen=True)
class Choice:
    """One way to run a model: what each component weighs on the GPU, and what its weights lose."""

    recipe: str  # a built-in name, the text of a recipe, or AS_IT_IS
    name: str
    size_bytes: Mapping[str, int]  # component → weights as they lie on the GPU, 16-bit where they are not quantized
    error: float  # of the denoiser's weights, relative, as normally distributed weights would have it
    needs: tuple[str, ...] = ()  # of the machine
    plain: bool = True  # whether it loads without `import bitroute`

    @cached_property
    def total_bytes(self) -> int:
        return sum(self.size_bytes.values())

    @cached_property
    def largest(self) -> str:
        return max(self.size_bytes, key=lambda name: self.size_bytes[name])

    def offload(self, room_bytes: float) -> Offload:
        if self.total_bytes <= room_bytes:
            return "none"
        return "model" if self.size_bytes[self.largest] <= room_bytes else "blocks"


@dataclass(frozen=True)
class Advice:
    """All choices, best precision first; `best` is the one to take."""

    model: str
    vram_gib: float
    reserve_gib: float
    choices: tuple[Choice, ...]

    @property
    def room_bytes(self) -> float:
        return (self.vram_gib - self.reserve_gib) * GIB

    @property
    def best(self) -> Choice:
        """Eight bits or more without offload; else the smallest error with model offload; else what is smallest."""
        free = self.without_offload
        if free and free.error < NEAR_LOSSLESS:
            return free
        fitting = [choice for choice in self.choices if choice.offload(self.room_bytes) != "blocks"]
        return fitting[0] if fitting else min(self.choices, key=lambda choice: choice.size_bytes[choice.largest])

    @property
    def without_offload(self) -> Choice | None:
        return next((choice for choice in self.choices if choice.offload(self.room_bytes) == "none"), None)


def recommend(
    model: str, vram_gib: float, reserve_gib: float | None = None, *,
    allow_pickle: bool = False, variant: str | None = None,
) -> Advice:  # fmt: skip
    """What to run on a card with so much memory; plans every recipe of the model's family, reads no weight.

    reserve_gib: kept free for activations and the CUDA context; 1.5 for pictures and 4 for videos if not given.

    Raises:
        SourceError: the model cannot be opened. RecipeError: there is nothing to quantize in it, or no room at all.
    """
    pipeline = open_pipeline(model, variant=variant, access="outline", allow_pickle=allow_pickle)
    if pipeline.bare:
        raise RecipeError(_no_pipeline(pipeline))
    denoisers = [pipeline.components[name] for name in DENOISERS if name in pipeline.components]
    if not denoisers:
        raise RecipeError(_no_denoiser(pipeline))
    video = any("3D" in component.class_name for component in denoisers)
    reserve = (VIDEO_RESERVE_GIB if video else PICTURE_RESERVE_GIB) if reserve_gib is None else reserve_gib
    if not 0 <= reserve < vram_gib:
        got = f"{vram_gib:g} GiB, of which {reserve:g} GiB stay free"
        raise RecipeError(Problem("no room for weights on such a card", "--vram, --reserve", got=got))
    choices = [_as_it_is(pipeline), *_choices(pipeline, denoisers)]
    return Advice(pipeline.name, vram_gib, reserve, tuple(sorted(choices, key=lambda c: (c.error, c.total_bytes))))


def _choices(pipeline: Pipeline, denoisers: list[Component]) -> Iterator[Choice]:
    profile = find_profile(denoisers[0].class_name)
    families = profile.recipes if profile else {}
    family = next((name for name, parts in families.items() if set(parts) <= set(pipeline.components)), None)
    names = [name for name in builtin_recipes() if family_of(name) == family]
    for name in names:
        yield from _choice(name, name, pipeline, read_recipe(name))
    for name, backend in () if names else GENERIC.items():
        text = "components:\n" + "".join(f"  {part.name}: {{backend: {backend}}}\n" for part in denoisers)
        yield from _choice(text, name, pipeline, RecipeFile.made(name, text))


def _choice(recipe: str, name: str, pipeline: Pipeline, file: RecipeFile) -> Iterator[Choice]:
    """Nothing where the recipe is for other members of the family."""
    try:
        planned = plan_pipeline(file, pipeline)
    except BitrouteError:
        return
    quantized = {component.name: component.size_bytes for component in planned.components}
    others = {part: _half_bytes(found) for part, found in pipeline.components.items() if part not in quantized}
    plain = all(component.container.name != "bitroute" for component in planned.components)
    yield Choice(recipe, name, {**quantized, **others}, _error(planned), tuple(planned.devices), plain)


def _as_it_is(pipeline: Pipeline) -> Choice:
    return Choice(AS_IT_IS, AS_IT_IS, {name: _half_bytes(part) for name, part in pipeline.components.items()}, 0.0)


def _half_bytes(component: Component) -> int:
    """Loaded in 16 bits, as the loading code of the card does."""
    return sum(tensor.spec.numel * min(tensor.spec.dtype.itemsize, 2) for tensor in component.tensors.values())


def _error(planned: Plan) -> float:
    """√(Σ n·e² / Σ n) over the weights of the denoisers, e the relative error of each format."""
    entries = [e for c in planned.components if c.name in DENOISERS for e in c.entries]
    lost = sum(e.weight.numel * _gaussian_error(e.backend) ** 2 for e in entries if e.quantized)
    return math.sqrt(lost / max(sum(e.weight.numel for e in entries), 1))


@cache
def _gaussian_error(backend: Backend) -> float:
    """‖ŵ - w‖ / ‖w‖ of normally distributed weights, [128, 1024], measured with the format itself."""
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    spec = TensorSpec((128, 1024), torch.bfloat16)
    error = backend.decode(backend.quantize(weight), spec) - weight.float()
    return float(error.norm() / weight.float().norm())


def advice_json(advice: Advice) -> dict[str, Any]:
    def described(choice: Choice) -> dict[str, Any]:
        return {
            "recipe": choice.name, "size_bytes": dict(choice.size_bytes), "total_bytes": choice.total_bytes,
            "weight_error": choice.error, "offload": choice.offload(advice.room_bytes), "needs": list(choice.needs),
            "loads_with": _loads_with(choice),
        }  # fmt: skip

    best, free = advice.best, advice.without_offload
    return {
        "model": advice.model, "vram_gib": advice.vram_gib, "reserve_gib": advice.reserve_gib,
        "best": best.name, "without_offload": free.name if free else None,
        "choices": [described(choice) for choice in advice.choices],
    }  # fmt: skip


def advice_text(advice: Advice) -> str:
    """The table of all choices, then the one to take, why, and what to type."""
    best = advice.best
    lines = [
        f"{advice.model} on a card of {advice.vram_gib:g} GiB, {advice.reserve_gib:g} GiB of it free for activations "
        "(an estimate: --reserve); sizes in units of 1000\n",
        f"{'recipe':<20} {'all weights':>11} {'largest component':>28} weight error  {'offload':<15} loads with",
        *(_row(choice, advice.room_bytes) for choice in advice.choices),
        "\nweight error: of the denoiser, as normally distributed weights have it; `--eval` measures the pictures",
        f"\n{best.name}: {_why(advice)}",
        "  " + ", ".join(f"{name} {size(size_bytes)}" for name, size_bytes in best.size_bytes.items()),
        *(f"  {need}" for need in best.needs),
        *_commands(advice.model, best, advice.room_bytes),
    ]
    free = advice.without_offload
    if free and free is not best:
        lines.append(f"\nwithout any offload: {free.name}, {size(free.total_bytes)}")
    return "\n".join(lines)


def _row(choice: Choice, room_bytes: float) -> str:
    largest = f"{choice.largest} {size(choice.size_bytes[choice.largest])}"
    words = {"none": "not needed", "model": "model", "blocks": "block by block"}[choice.offload(room_bytes)]
    return (
        f"{choice.name:<20} {size(choice.total_bytes):>11} {largest:>28} {choice.error:>12.2%}  {words:<15} "
        f"{_loads_with(choice)}"
    )


def _loads_with(choice: Choice) -> str:
    return "diffusers" if choice.plain else "import bitroute"


def _why(advice: Advice) -> str:
    best, room = advice.best, size(advice.room_bytes)
    match best.offload(advice.room_bytes):
        case "none":
            return f"the smallest error of those whose weights all fit into {room}"
        case "model":
            return f"the smallest error of those whose largest component fits into {room}"
        case _:
            return f"no component of this size fits into {room}; this one is the smallest"


def _commands(model: str, best: Choice, room_bytes: float) -> Iterator[str]:
    if best.name != AS_IT_IS:
        if best.recipe != best.name:
            yield f"\nno built-in recipe is made for it; save this as {best.name}.yaml:\n\n{best.recipe}"
        file = best.name if best.recipe == best.name else f"{best.name}.yaml"
        yield f"\n  quantize --recipe {file} --model {shlex.quote(model)}"
    yield f"  {HOW[best.offload(room_bytes)]}"


def _no_pipeline(pipeline: Pipeline) -> Problem:
    ((name, (_, class_name)),) = pipeline.index.items()
    return Problem(
        "one component does not say what the whole pipeline needs", pipeline.name, got=f"{name}, a {class_name}",
        next_step="give the pipeline that it is used in",
    )  # fmt: skip


def _no_denoiser(pipeline: Pipeline) -> Problem:
    return Problem(
        "nothing here denoises", pipeline.name, got=", ".join(pipeline.components) or "no component with weights",
        expected=f"one of {', '.join(DENOISERS)}", next_step="write a recipe for the components that are there",
    )  # fmt: skip
