"""The schema of a recipe: what each key means, and which values it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from bitroute.convert.document import shown
from bitroute.convert.shards import SIZES, parse_size
from bitroute.convert.validation import near_words, refused

Dequantize = Literal[False, True, "bfloat16", "float16", "float32"]  # True: quantized weights, to bf16; else all floats
MAX_TEXT = 500
MAX_COMPONENTS = 64
MAX_RULES = 2000  # also of the entries of `keep`


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


def _without_method(options: dict[str, Any]) -> dict[str, Any]:
    if "method" in options:
        raise refused("'method' is no option", "`method: {…}` beside `options`, on its own line")
    return options


Options = Annotated[dict[str, Any], AfterValidator(_without_method)]


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
    options: Options = Field({}, description=_OPTIONS)
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
    options: Options = Field({}, description=_OPTIONS)
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

    prompts: str = Field(min_length=1, description="A set such as general-64 or emoji-16, or a file, one a line.")
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
