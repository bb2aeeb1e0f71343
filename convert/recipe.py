"""What the user wants: the schema of a recipe, and reading one with all of its problems at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bitroute import backends
from bitroute.convert.document import (
    KeyPath,
    Value,
    as_comments,
    compose,
    parse,
    printable,
    read_text,
    shown,
    sorted_problems,
    write_new,
)
from bitroute.convert.profile import ProfileFile, read_profile
from bitroute.convert.shards import SIZES, parse_size
from bitroute.convert.validation import Levels, near_words, refused, validate
from bitroute.errors import Problem, RecipeError

__all__ = [
    "EXTENDS",
    "ComponentRecipe",
    "Recipe",
    "RecipeFile",
    "Rule",
    "builtin_recipes",
    "copy_recipe",
    "family_of",
    "read_recipe",
]

Dequantize = Literal[False, True, "bfloat16", "float16", "float32"]  # True: quantized weights, to bf16; else all floats
MAX_TEXT = 500
MAX_COMPONENTS = 64
MAX_RULES = 2000  # also of the entries of `keep`
EXTENDS = (
    "`extends: NAME` at the top of a recipe starts from another one: a built-in recipe, or a file relative to this "
    "one. Mappings are merged key by key; lists and single values replace those below. A mapping that says `backend` "
    "does not inherit `options` and `method`: they were written for the other backend. At most 16 recipes may "
    "extend each other."
)


def _known_backend(name: str, info: ValidationInfo) -> str:
    known = (info.context or {}).get("backends") or backends.available()
    if name not in known:
        raise PydanticCustomError("unknown_backend", "unknown backend")
    return name


def _known_keep(value: object) -> object:
    if value in ("profile", "none"):
        return value
    expected = "profile, none, or a list of layer patterns"
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        near = near_words(value, ["profile", "none"])
        listed = f"write a list: `keep: [{_quoted(value)}]`" if isinstance(value, str) and value else ""
        raise refused("'keep' is not valid", expected, near or listed)
    if len(value) > MAX_RULES:
        raise refused(f"'keep' has {len(value)} entries", f"at most {MAX_RULES}")
    return value


def _known_size(value: object) -> int | None:
    if value is None:
        return None
    found = parse_size(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    if found is None:
        raise refused("'shard_size' is not valid", SIZES)
    return found


def _quoted(text: str) -> str:
    """A scalar as it is written in a YAML list."""
    return text if re.fullmatch(r"[A-Za-z_][\w.]{0,79}", text) else shown(text)


BackendName = Annotated[str, AfterValidator(_known_backend)]
Otherwise = Literal["refuse", "keep"]
_BACKEND = "The format of the weights; `quantize backends` lists them."
_OPTIONS = "Options of that backend; `quantize backends NAME` lists them."
_METHOD = (
    "What is done to a weight before that backend rounds it: `rotate: 32` (blocks of 16, 32, 64 or 128 inputs by a "
    "Hadamard matrix), `low_rank: 16` (a branch of that rank in bf16), `smooth: 0.5` (large inputs move into the "
    "weight) and `gptq: true` (errors are made up for by later weights). The last two need `statistics`. With GPTQ "
    "alone the layer loads as the backend's own; the others are run by bitroute."
)
_OTHERWISE = "What happens to a layer whose shape the backend cannot hold: `refuse` the plan, or `keep` the layer."


def _encoding(options: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "method": method} if method else dict(options)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """Some layers and their backend; the first rule that matches a layer wins."""

    layers: str | None = Field(
        None,
        min_length=1,
        description="A pattern over the full dotted layer name: `*` (crosses dots), `?`, `[...]`, block "
        "ranges `{0-3}`, `{5}`, `{-2--1}` (negative from the end), or `re:` and a regular expression. It takes the "
        "linear layers; where it matches none, the convolutions.",
    )
    role: str | None = Field(
        None,
        min_length=1,
        description="Instead of `layers`: all layers that do this by the profile of the model class "
        "(attention, feed-forward, modulation, embedder, output), or every `convolution`.",
    )
    backend: BackendName = Field(description=_BACKEND)
    options: dict[str, Any] = Field({}, description=_OPTIONS)
    method: dict[str, Any] = Field({}, description=_METHOD)
    otherwise: Otherwise = Field("refuse", description=_OTHERWISE)

    @property
    def encoding(self) -> dict[str, Any]:
        """The options that `backends.create` takes."""
        return _encoding(self.options, self.method)

    @model_validator(mode="after")
    def _names_layers_once(self) -> Self:
        if (self.layers is None) == (self.role is None):
            said = "neither 'layers' nor 'role'" if self.layers is None else "both 'layers' and 'role'"
            raise refused(f"a rule says {said}", "exactly one of them")
        return self


class ComponentRecipe(_Strict):
    """How one component of the pipeline is converted."""

    backend: BackendName = Field("keep", description="The backend of every linear layer that no rule takes.")
    options: dict[str, Any] = Field({}, description=_OPTIONS)
    otherwise: Otherwise = Field("refuse", description=_OTHERWISE)
    method: dict[str, Any] = Field({}, description=_METHOD)
    keep: Annotated[Literal["profile", "none"] | list[str], BeforeValidator(_known_keep)] = Field(
        "profile",
        description="The layers that no rule touches: what the `profile` of the model class keeps (inferred from its "
        "modules where there is none), a list of patterns in its place, or `none`.",
    )
    profile: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT,
        description="A profile file, relative to this recipe, instead of the built-in profile of the model class; "
        "`quantize profile MODEL` writes one to edit.",
    )
    rules: list[Rule] = Field(
        [], max_length=MAX_RULES, description="Tried from the top for every layer; the first that matches wins."
    )
    container: Literal["auto", "native", "bitroute"] = Field(
        "auto",
        description="How the component is stored: `native` loads in plain diffusers, `bitroute` holds any "
        "mix of backends, `auto` is native wherever that is possible.",
    )

    @property
    def encoding(self) -> dict[str, Any]:
        """The options that `backends.create` takes."""
        return _encoding(self.options, self.method)


class EvalRecipe(_Strict):
    """How `--eval` compares the result with the original."""

    prompts: str = Field(min_length=1, description="A set (emoji-16, general-16, -64, -128) or a file, one a line.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; the pipeline's own number by default.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="One picture per prompt and seed.")
    call: dict[str, Any] = Field({}, description="Further arguments of the pipeline, such as `height: 1024`.")
    inputs: dict[str, str] = Field(
        {}, description="Pictures given to the pipeline: argument → a file, or a folder with one for each prompt."
    )
    pipeline: str | None = Field(None, min_length=1, description="Another class of diffusers for the same models.")
    gate: dict[Literal["lpips", "psnr", "ssim", "ms_ssim", "flip"], float] = Field(
        {},
        description="Limits on the means, lpips and flip from above, the others from below: `{lpips: 0.10, psnr: 28}`.",
    )


class LoraRecipe(_Strict):
    """A LoRA that becomes part of the weights before they are quantized."""

    path: str = Field(
        min_length=1, max_length=MAX_TEXT, description="A safetensors file, relative to this recipe; any spelling that "
        "diffusers reads into this pipeline.",
    )  # fmt: skip
    scale: float = Field(1.0, allow_inf_nan=False, description="How much of it: W + scale · alpha / rank · B A.")
    into: str | None = Field(
        None, min_length=1, max_length=MAX_TEXT, description="`transformer_2` puts it there instead of `transformer`."
    )


class PushRecipe(_Strict):
    """Where `--push` puts the result on the Hub."""

    repo: str = Field(
        min_length=3, max_length=MAX_TEXT, description="`owner/name` of the repository; it is made if it is missing."
    )
    private: bool = Field(False, description="Whether a repository that is made is private.")
    revision: str | None = Field(
        None, min_length=1, max_length=MAX_TEXT, description="A branch, made if it is missing; `main` by default."
    )
    create_pr: bool = Field(False, description="Open a pull request instead of writing the default branch.")


class Recipe(_Strict):
    """Which components of which model become what."""

    description: str = Field("", max_length=MAX_TEXT, description="One line that `quantize recipes` shows.")
    model: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT,
        description="The folder of a diffusers pipeline (seen from where the command runs), `owner/name` on the "
        "Hugging Face Hub (a local folder of that name wins; `owner/name@revision` pins it), a single file of "
        "safetensors (see `config`), or `builtin:tiny-flux`; `--model` overrides it.",
    )
    revision: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT,
        description="A branch, a tag or a commit of that model on the Hub; the default branch if it is not given.",
    )
    variant: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT,
        description="The weights of that model to read, such as `fp16` for `model.fp16.safetensors`; "
        "parts without them give their plain ones. The result has plain names. `--variant` overrides it.",
    )
    config: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT,
        description="If `model` is a single file: the folder or Hub id of a pipeline of its family, for all that the "
        "file lacks; `--config` overrides it. Of two components of one class `DIR/transformer_2` names one.",
    )
    shard_size: Annotated[int | None, BeforeValidator(_known_size)] = Field(
        None,
        description="At most this in one weight file, such as `2GB`; `5GB` by default. A layer is never split. "
        "`--shard-size` overrides it.",
    )
    dequantize: Dequantize = Field(
        False,
        description="Read components that are already quantized: `true` decodes their weights to bfloat16, a dtype "
        "(`bfloat16`, `float16`, `float32`) is that of all their floats. The errors of both quantizations add up.",
    )
    statistics: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT,
        description="What `quantize calibrate` measured of this model, a file relative to this recipe: methods read "
        "it, and searches of a scale weigh errors by it. `--statistics` overrides it.",
    )
    fuse_loras: list[LoraRecipe] = Field(
        [], max_length=16, description="LoRAs to fuse into the weights first; needs `pip install peft`."
    )
    components: dict[str, ComponentRecipe] = Field(
        min_length=1,
        max_length=MAX_COMPONENTS,
        description="Component name → its recipe. Components that are not named are copied untouched.",
    )
    eval: EvalRecipe | None = Field(None, description="What `--eval` draws and measures.")
    push: PushRecipe | None = Field(None, description="Where `--push` publishes the result.")


# recipe keys, eval.KEY, push.KEY, fuse_loras.0.KEY, components.NAME.KEY, components.NAME.rules.0.KEY
_LEVELS: Levels = {1: Recipe, 2: EvalRecipe, "push": PushRecipe, "fuse_loras": LoraRecipe, 3: ComponentRecipe, 5: Rule}


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file says, and everything that is wrong with it.

    recipe: what could be understood (None when nothing could); complete only if `problems` is empty.
    text: the source, followed by the recipes it extends and the profiles it names as comments.
    profiles: component → the profile that its recipe names.
    """

    name: str
    text: str
    recipe: Recipe | None
    problems: list[Problem]
    document: Value
    profiles: Mapping[str, ProfileFile] = field(default_factory=dict)

    @classmethod
    def made(cls, name: str, text: str) -> RecipeFile:
        """One that the program writes itself, and therefore right; errors call it `name`."""
        document = parse(text, name)
        return cls(name, text, Recipe.model_validate(document.plain), [], document)

    def where(self, path: KeyPath) -> str:
        """`file:line` of a value of `recipe`, such as ("components", "transformer", "rules", 0)."""
        return self.document.where(path)


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with bitroute, by name."""
    folder = Path(str(files("bitroute.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def family_of(name: str) -> str:
    """The models that a built-in recipe is for, by its name: flux of flux-fp8."""
    return name.rpartition("-")[0]


def read_recipe(name_or_path: str) -> RecipeFile:
    """The recipe in a file, or the built-in one of that name.

    Raises:
        RecipeError: no such recipe, or it is not a YAML mapping. What is wrong inside is collected instead.
    """
    path, name = _locate(name_or_path)
    document, text = compose(path, name, _find)
    found, problems = validate(_LEVELS, document)
    recipe = found if isinstance(found, Recipe) else None
    profiles, bad = _read_profiles(recipe, document) if recipe else ({}, [])
    for component, file in profiles.items():
        text += f"\n# profile of {component}:\n{as_comments(file.text)}"
    problems = sorted_problems([*problems, *bad]) if bad else problems  # those of the recipe are counted already
    return RecipeFile(name, text, recipe, problems, document, profiles)


def _read_profiles(recipe: Recipe, document: Value) -> tuple[dict[str, ProfileFile], list[Problem]]:
    """The profiles that components name, seen from the recipe that names them."""
    profiles, problems = dict[str, ProfileFile](), list[Problem]()
    for component, said in recipe.components.items():
        if said.profile is None:
            continue
        value = document.nearest(("components", component, "profile"))
        path = Path(value.file).parent / Path(said.profile).expanduser()
        try:
            if not path.exists():
                raise RecipeError(_no_profile_file(said.profile, value.where()))
            profiles[component] = read_profile(path, printable(str(path)))
        except OSError as error:
            problems.append(Problem("cannot find the profile", value.where(), got=str(error)[:MAX_TEXT]))
        except RecipeError as error:
            problems += error.problems
    return profiles, problems


def _no_profile_file(name: str, where: str) -> Problem:
    return Problem(
        f"no profile {shown(name)}", where, expected="a YAML file, relative to this recipe",
        next_step="`quantize profile MODEL --out FILE` writes one",
    )  # fmt: skip


def copy_recipe(name: str, target: Path | None = None) -> Path:
    """Copies a recipe to `target`, by default a file of its name in this folder; returns where it went.

    Raises:
        RecipeError: no such recipe, or the target exists or cannot be written.
    """
    path, called = _locate(name)
    return write_new(read_text(path, called), target or Path(path.name), path.name)


def _locate(name: str) -> tuple[Path, str]:
    found = _find(name, Path())
    if found is None:
        raise RecipeError(_no_such_recipe(name))
    return found


def _find(name: str, folder: Path) -> tuple[Path, str] | None:
    """A file seen from `folder`, or else a built-in recipe; and what errors call it."""
    path = folder / name
    builtin = builtin_recipes().get(name.removesuffix(".yaml"))
    try:
        if path.is_file() or (path.exists() and not builtin):  # a result often has the name of its recipe
            return path, printable(str(path))
    except (OSError, ValueError):  # a name longer than the file system allows, a folder without permission
        pass
    return (builtin, builtin.name) if builtin else None


def _no_such_recipe(name: str) -> Problem:
    near = near_words(Path(name).name.removesuffix(".yaml"), list(builtin_recipes()))
    listing = "`quantize recipes list` shows the built-in ones"
    next_step = f"{near} {listing}" if near else listing
    return Problem(f"no recipe {shown(name)}", expected="a YAML file, or a built-in recipe", next_step=next_step)
