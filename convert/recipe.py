"""What the user wants: recipes read with all of their problems at once (their keys: schema)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

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
from bitroute.convert.schema import MAX_TEXT, ComponentRecipe, EvalRecipe, LoraRecipe, PushRecipe, Recipe, Rule
from bitroute.convert.validation import Levels, near_words, validate
from bitroute.errors import Problem, RecipeError

EXTENDS = (
    "`extends: NAME` at the top of a recipe starts from another one: a built-in recipe, or a file relative to this "
    "one. Mappings are merged key by key; lists and single values replace those below. A mapping that says `backend` "
    "does not inherit `options` and `method`: they were written for the other backend. At most 16 recipes may "
    "extend each other."
)


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
