"""What the user wants: the schema of a recipe, and reading one with all of its problems at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from bitroute import backends
from bitroute.convert.document import KeyPath, Value, compose
from bitroute.errors import Problem, RecipeError, did_you_mean

__all__ = ["ComponentRecipe", "Recipe", "RecipeFile", "Rule", "builtin_recipes", "copy_recipe", "read_recipe"]


def _ours(what: str, expected: str, next_step: str = "") -> PydanticCustomError:
    return PydanticCustomError("bitroute", "{what}", {"what": what, "expected": expected, "next": next_step})


def _known_backend(name: str) -> str:
    known = backends.available()
    if name not in known:
        installed = "one of " + ", ".join(known)
        raise _ours(f"unknown backend {name!r}", installed, backends.suggest(name))
    return name


def _known_keep(value: object) -> object:
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if value not in ("profile", "none") and not texts:
        near = did_you_mean(str(value), ["profile", "none"])
        raise _ours("'keep' is not valid", "profile, none, or a list of layer patterns", near)
    return value


BackendName = Annotated[str, AfterValidator(_known_backend)]
Otherwise = Literal["refuse", "keep"]
_BACKEND = "The format of the weights; `quantize backends` lists them."
_OPTIONS = "Options of that backend; `quantize backends NAME` lists them."
_OTHERWISE = "What happens to a layer whose shape the backend cannot hold: `refuse` the plan, or `keep` the layer."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """Some layers and their backend; the first rule that matches a layer wins."""

    layers: str | None = Field(
        None,
        min_length=1,
        description="A pattern over the full dotted layer name: `*` (crosses dots), `?`, `[...]`, block "
        "ranges `{0-3}`, `{5}`, `{-2--1}` (negative from the end), or `re:` and a regular expression.",
    )
    role: str | None = Field(
        None,
        min_length=1,
        description="Instead of `layers`: all layers that do this by the profile of the model class "
        "(attention, feed-forward, modulation, embedder, output).",
    )
    backend: BackendName = Field(description=_BACKEND)
    options: dict[str, Any] = Field({}, description=_OPTIONS)
    otherwise: Otherwise = Field("refuse", description=_OTHERWISE)

    @model_validator(mode="after")
    def _names_layers_once(self) -> Self:
        if (self.layers is None) == (self.role is None):
            said = "neither 'layers' nor 'role'" if self.layers is None else "both 'layers' and 'role'"
            raise _ours(f"a rule says {said}", "exactly one of them")
        return self


class ComponentRecipe(_Strict):
    """How one component of the pipeline is converted."""

    backend: BackendName = Field("keep", description="The backend of every linear layer that no rule takes.")
    options: dict[str, Any] = Field({}, description=_OPTIONS)
    otherwise: Otherwise = Field("refuse", description=_OTHERWISE)
    keep: Annotated[Literal["profile", "none"] | list[str], BeforeValidator(_known_keep)] = Field(
        "profile",
        description="The layers that no rule touches: what the `profile` of the model class keeps, a list of "
        "patterns in its place, or `none`.",
    )
    rules: list[Rule] = Field([], description="Tried from the top for every layer; the first that matches wins.")
    container: Literal["auto", "native", "bitroute"] = Field(
        "auto",
        description="How the component is stored: `native` loads in plain diffusers, `bitroute` holds any "
        "mix of backends, `auto` is native wherever that is possible.",
    )


class Recipe(_Strict):
    """Which components of which model become what."""

    description: str = Field("", description="One line that `quantize recipes` shows.")
    model: str | None = Field(
        None,
        min_length=1,
        description="The folder of a diffusers pipeline (seen from where the command runs), or `builtin:tiny-flux`; "
        "`--model` overrides it. A Hub id says which model to download; it is not downloaded.",
    )
    components: dict[str, ComponentRecipe] = Field(
        min_length=1,
        description="Component name → its recipe. Components that are not named are copied untouched.",
    )


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file says, and everything that is wrong with it.

    recipe: what could be understood (None when nothing could); complete only if `problems` is empty.
    text: the source, followed by the recipes it extends as comments.
    """

    name: str
    text: str
    recipe: Recipe | None
    problems: list[Problem]
    document: Value

    def where(self, path: KeyPath) -> str:
        """`file:line` of a value of `recipe`, such as ("components", "transformer", "rules", 0)."""
        return self.document.where(path)


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with bitroute, by name."""
    folder = Path(str(files("bitroute.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name_or_path: str) -> RecipeFile:
    """The recipe in a file, or the built-in one of that name.

    Raises:
        RecipeError: no such recipe, or it is not a YAML mapping. What is wrong inside is collected instead.
    """
    found = _find(name_or_path, Path())
    if found is None:
        raise RecipeError(_no_such_recipe(name_or_path))
    document, text = compose(*found, _find)
    recipe, problems = _validate(document)
    return RecipeFile(found[1], text, recipe, problems, document)


def copy_recipe(name: str, target: Path | None = None) -> Path:
    """Copies a built-in recipe to `target`, by default a file of its name in this folder; returns where it went.

    Raises:
        RecipeError: no such recipe, or the target exists or cannot be written.
    """
    found = _find(name, Path())
    if found is None:
        raise RecipeError(_no_such_recipe(name))
    place = target or Path(found[0].name)
    place = place / found[0].name if place.is_dir() else place
    try:
        with open(place, "x", encoding="utf-8") as stream:
            stream.write(found[0].read_text(encoding="utf-8"))
    except FileExistsError:
        raise RecipeError(Problem("the file exists already", str(place), next_step="give another name")) from None
    except OSError as error:
        raise RecipeError(Problem("cannot write the recipe", str(place), got=error.strerror or "")) from error
    return place


def _find(name: str, folder: Path) -> tuple[Path, str] | None:
    """A file seen from `folder`, or else a built-in recipe; and what errors call it."""
    path = folder / name
    try:
        if path.is_file():
            return path, str(path)
    except OSError:  # a name longer than the file system allows, a folder without permission
        return None
    builtin = builtin_recipes().get(name.removesuffix(".yaml"))
    return (builtin, builtin.name) if builtin else None


def _no_such_recipe(name: str) -> Problem:
    near = did_you_mean(Path(name).name.removesuffix(".yaml"), builtin_recipes())
    listing = "`quantize recipes list` shows the built-in ones"
    next_step = f"{near} {listing}" if near else listing
    return Problem(f"no recipe {name!r}", expected="a YAML file, or a built-in recipe", next_step=next_step)


def _validate(document: Value) -> tuple[Recipe | None, list[Problem]]:
    """Validates, cuts what was refused, and validates the rest, until something valid or nothing is left."""
    problems: list[Problem] = []
    damaged: set[Value] = set()
    while True:
        try:
            return Recipe.model_validate(document.plain), sorted(problems, key=_place)
        except ValidationError as error:
            details = error.errors()
        cuts = [_judge(detail, document, damaged, _typos(details)) for detail in details]
        problems += [cut.problem for cut in cuts if cut.problem]
        if not all([_apply(cut, document, damaged) for cut in cuts]):
            return None, sorted(problems, key=_place)


def _place(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":")
    return file, int(line)


@dataclass(frozen=True)
class _Cut:
    """What validation refused, by its own path, and what there is to say about it."""

    parent: Value
    child: Value | None  # None: the whole document
    problem: Problem | None
    harmless: bool  # the rest means the same without it


def _judge(detail: ErrorDetails, document: Value, damaged: set[Value], typos: set[KeyPath]) -> _Cut:
    loc: KeyPath = detail["loc"]
    missing = detail["type"] == "missing"
    path = loc[:-1] if missing else loc
    parent, subject = document.nearest(path[:-1]), document.nearest(path)
    follows = subject in damaged or (missing and loc in typos)
    problem = None if follows else _problem(detail, document)
    harmless = detail["type"] == "extra_forbidden" and not _suggestion(loc)
    return _Cut(parent, None if subject is parent else subject, problem, harmless)


def _apply(cut: _Cut, document: Value, damaged: set[Value]) -> bool:
    if cut.child is None:
        return False
    if cut.child is cut.parent.child("backend"):
        options = cut.parent.child("options")
        if options:  # they were meant for the backend that is not known
            cut.parent.remove(options)
    cut.parent.remove(cut.child)
    if not cut.harmless:
        damaged.add(cut.parent)
    return True


def _typos(details: list[ErrorDetails]) -> set[KeyPath]:
    """The keys that unknown keys were probably meant to be."""
    unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
    return {(*loc[:-1], _suggestion(loc)) for loc in unknown}


def _known_keys(loc: KeyPath) -> list[str]:
    """The keys of the mapping that holds `loc`."""
    model = _model(loc)
    return [*model.model_fields, *(["extends"] if model is Recipe else [])]


def _suggestion(loc: KeyPath) -> str:
    return did_you_mean(str(loc[-1]), _known_keys(loc)).removeprefix("did you mean '").removesuffix("'?")


def _problem(detail: ErrorDetails, document: Value) -> Problem:
    """What pydantic found, in our words."""
    loc: KeyPath = detail["loc"]
    key, where, kind = str(loc[-1]), document.where(loc), detail["type"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    got = _shown(detail["input"])
    if kind == "extra_forbidden":
        known = _known_keys(loc)
        return Problem(f"unknown key {key!r}", where, "", "one of " + ", ".join(known), did_you_mean(key, known))
    if kind == "missing":
        return Problem(f"{key!r} is missing", where, expected=_description(loc))
    if kind == "bitroute":
        return Problem(context["what"], where, got, context["expected"], context["next"])
    expected = _EXPECTED.get(kind, detail["msg"])
    what = f"item {key} of {loc[-2]!r} is not valid" if isinstance(loc[-1], int) else f"{key!r} is not valid"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        return Problem(what, where, got, "one of " + ", ".join(choices), did_you_mean(str(detail["input"]), choices))
    quote = kind == "string_type" and isinstance(detail["input"], int | float)
    return Problem(what, where, got, expected, "put it in quotes" if quote else "")


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list, one item per `- ` line",
    "dict_type": "a mapping of `key: value` lines",
    "model_type": "a mapping of `key: value` lines",
    "too_short": "at least one component",
}


def _description(loc: KeyPath) -> str:
    return _model(loc).model_fields[str(loc[-1])].description or ""


def _model(loc: KeyPath) -> type[BaseModel]:
    """The model with the key `loc`: components, components.NAME.keep, components.NAME.rules.0.backend."""
    models: dict[int, type[BaseModel]] = {1: Recipe, 3: ComponentRecipe, 5: Rule}
    return models[len(loc)]


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
