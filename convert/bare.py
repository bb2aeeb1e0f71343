"""A model that is one component without a pipeline around it: its config.json names its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from bitroute.errors import Problem, RecipeError, did_you_mean

if TYPE_CHECKING:
    from bitroute.convert.checkpoint import Pipeline

INDEX = "model_index.json"
CONFIG = "config.json"
NAMES = {  # what the pipelines of diffusers call their parts; the first that fits
    "UNet*": "unet", "*ControlNet*": "controlnet", "*Autoencoder*": "vae", "*Transformer?DModel": "transformer",
}  # fmt: skip
OF_A_TEXT_ENCODER = (  # what its tokenizer and `generate` read beside its weights
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


class BareIndex(dict[str, Any]):
    """The index that a pipeline of this one component would have: its name → its library and class."""


def bare_index(config: Mapping[str, Any]) -> BareIndex | None:
    """None where a config.json names no class: `_class_name` of diffusers, `architectures` of transformers."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    for library, class_name in (("diffusers", config.get("_class_name")), ("transformers", first)):
        if isinstance(class_name, str):
            return BareIndex({name_of(library, class_name): [library, class_name]})
    return None


def name_of(library: str, class_name: str) -> str:
    """What recipes call a component that has no name of its own."""
    if library == "transformers":
        return "text_encoder"
    return next((name for pattern, name in NAMES.items() if fnmatchcase(class_name, pattern)), "model")


def goes_along(file: str, index: Mapping[str, Any]) -> bool:
    """Whether a file beside the config of a bare model belongs to it; pictures and other weights do not."""
    of_transformers = any(entry[0] == "transformers" for entry in index.values())
    return of_transformers and "/" not in file and any(fnmatchcase(file, pattern) for pattern in OF_A_TEXT_ENCODER)


def no_component(name: str, pipeline: Pipeline, where: Callable[[tuple[str | int, ...]], str]) -> Problem:
    """A recipe names what is not there."""
    known = list(pipeline.components)
    if pipeline.bare and known:
        (found,) = pipeline.components.values()
        what = f"the model is one component without a pipeline, and it is not called {name!r}"
        mend = f"call it {found.name!r} in the recipe, or give the whole pipeline"
        expected = f"{found.name}, a {found.class_name} ({pipeline.folder})"
        return Problem(what, where(("components", name)), expected=expected, next_step=mend)
    return Problem(
        f"the pipeline has no component {name!r}", where(("components", name)),
        expected=f"one of {', '.join(known)} ({pipeline.folder})", next_step=did_you_mean(name, known),
    )  # fmt: skip


def check_draws(pipeline: Pipeline) -> None:
    """Raises RecipeError for a bare model: without its pipeline nothing draws pictures to compare."""
    if pipeline.bare:
        (name,) = pipeline.index
        mend = f"put its folder in the place of {name}/ in a pipeline folder that has one, and evaluate that"
        got = f"one component, {pipeline.index[name][1]}"
        what = "only a whole pipeline draws pictures to compare"
        raise RecipeError(Problem(what, pipeline.name, got, next_step=mend))
