"""What is known of a model class: what its layers do, which to keep, and what one forward pass needs.

The knowledge is data: `recipes/profiles/CLASS.yaml`, every entry with its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from bitroute.backends import Kind
from bitroute.convert.document import MAX_PROBLEMS, KeyPath, Value, parse, read_text, shown
from bitroute.convert.pattern import Layers, Pattern
from bitroute.errors import Problem, RecipeError

__all__ = [
    "EVERY_KIND",
    "KINDS",
    "KeptLayers",
    "ProbeInput",
    "Profile",
    "ProfileFile",
    "find_profile",
    "profiles",
    "read_profile",
]

KINDS: tuple[Kind, ...] = get_args(Kind)
EVERY_KIND = frozenset(KINDS)
Role = Literal["attention", "feed-forward", "modulation", "embedder", "output"]
Fill = Literal["random", "zeros", "ones"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeptLayers(_Strict):
    """Layers that stay in high precision, why, and who says so; in which kinds of quantization, by default all."""

    layers: str = Field(description="A pattern, as in the rules of a recipe.")
    why: str = Field(description="Why they stay.")
    source: str = Field(description="Who says so.")
    kinds: list[Kind] = Field(
        list(KINDS),
        alias="for",
        min_length=1,
        description="The kinds of quantization in which they stay, by default all: `8-bit` (weights alone), `w8a8` "
        "(with 8-bit activations), `4-bit` (weights of 4 to 6 bits).",
    )


class InputRecipe(_Strict):
    """One input of the probe: a tensor, or a `value` as it stands; `a.b` is entry b of the dict a.

    A size is a number, a key of the config, keys multiplied with `*`, or a difference of such.
    """

    shape: list[int | str] = []
    value: Any = None
    dtype: Literal["float", "long"] = "float"
    fill: Fill = "random"
    below: str | None = Field(None, description="config key: random integers stay below it")
    when: str | None = Field(None, description="config key: the input exists only if it is true")
    otherwise: list[int | str] = Field([], description="the shape where `when` is false; none: no such input")
    listed: bool = Field(False, description="whether the model wants a list, here of one such tensor")


@dataclass(frozen=True)
class ProbeInput:
    """A tensor to make: `float` is the model's dtype; random means N(0, 1), or integers in [0, below)."""

    shape: tuple[int, ...]
    dtype: Literal["float", "long"]
    fill: Fill
    below: int | None = None
    value: Any = None  # instead of a tensor
    listed: bool = False  # in a list of its own


class Profile(_Strict):
    """What is known of one class; `about` says where it is used, in one line for the documentation."""

    class_name: str = Field(alias="class", description="The model class of diffusers or transformers.")
    about: str = Field("", description="Where it is used, in one line.")
    recipes: dict[str, list[str]] = Field(
        {},
        description="Families of built-in recipes (flux of flux-fp8), and the components that a pipeline must have for "
        "each; `quantize recommend` takes the first that fits.",
    )
    roles: dict[Role, list[str]] = Field(
        description="What layers do, as patterns: attention, feed-forward, modulation, embedder, output."
    )
    keep: list[KeptLayers] = Field(description="What `keep: profile` leaves as it is.")
    inputs: dict[str, InputRecipe] = Field(
        {}, description="One small forward pass for `verify`; without it the model is loaded and not run."
    )
    notes: list[str] = Field([], description="Known pitfalls.")

    def roles_of(self, names: Iterable[str]) -> dict[str, str]:
        """Layer name → role, for the layers that have one."""
        layers = Layers(list(names))
        return {name: role for role, pattern in self._patterns for name in layers.matching(pattern)}

    def kept(self, names: Iterable[str]) -> dict[str, frozenset[Kind]]:
        """Layer name → the kinds of quantization in which it stays as it is."""
        layers, kept = Layers(list(names)), dict[str, frozenset[Kind]]()
        for entry in self.keep:
            for name in layers.matching(Pattern.parse(entry.layers)):
                kept[name] = kept.get(name, frozenset()) | set(entry.kinds)
        return kept

    def probe(self, config: Mapping[str, object]) -> dict[str, ProbeInput]:
        """The inputs of one small forward pass of a model with that config.

        Raises:
            RecipeError: the config lacks a size that the profile names.
        """
        shapes = {
            name: given.shape if not given.when or config.get(given.when) else given.otherwise
            for name, given in self.inputs.items()
            if not given.when or config.get(given.when) or given.otherwise
        }
        return {name: self._probe_input(self.inputs[name], shape, config) for name, shape in shapes.items()}

    @cached_property
    def _patterns(self) -> list[tuple[Role, Pattern]]:
        return [(role, Pattern.parse(text)) for role, texts in self.roles.items() for text in texts]

    def _probe_input(self, given: InputRecipe, wanted: Iterable[int | str], config: Mapping[str, object]) -> ProbeInput:
        shape = tuple(self._size(size, config) for size in wanted)
        below = self._size(given.below, config) if given.below else None
        return ProbeInput(shape, given.dtype, given.fill, below, given.value, given.listed)

    def _size(self, size: int | str, config: Mapping[str, object]) -> int:
        whole, *less = (self._product(part, config) for part in str(size).split(" - "))
        return whole - sum(less)

    def _product(self, size: str, config: Mapping[str, object]) -> int:
        keys = size.split("*")
        values = [int(key) if key.strip().isdigit() else config.get(key.strip()) for key in keys]
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) < len(values):
            what = f"the config of a {self.class_name} lacks the size {size!r}"
            raise RecipeError(Problem(what, got=f"keys {', '.join(sorted(config)) or 'none'}"))
        return math.prod(numbers)


@dataclass(frozen=True)
class ProfileFile:
    """A profile that a recipe names, and its text with the lines."""

    profile: Profile
    text: str
    document: Value

    def idle(self, names: Iterable[str]) -> list[str]:
        """What is said in vain: entries of `keep` that match none of these layers, with their lines."""
        layers = Layers(list(names))
        return [
            f"{shown(entry.layers)} matches no layer ({self.document.where(('keep', index, 'layers'))})"
            for index, entry in enumerate(self.profile.keep)
            if not layers.matching(Pattern.parse(entry.layers))
        ]


def read_profile(path: Path, name: str) -> ProfileFile:
    """The profile in a file that errors call `name`.

    Raises:
        RecipeError: it cannot be read, or is no profile; everything that is wrong with it, with the lines.
    """
    text = read_text(path, name)
    document = parse(text, name)
    try:
        profile = Profile.model_validate(document.plain)
    except ValidationError as error:
        found = error.errors(include_url=False)[:MAX_PROBLEMS]
        raise RecipeError(_invalid(detail, document) for detail in found) from None
    problems = [*_pattern_problems(profile, document)]
    if problems:
        raise RecipeError(problems)
    return ProfileFile(profile, text, document)


def _invalid(detail: ErrorDetails, document: Value) -> Problem:
    where, key = document.where(detail["loc"]), shown(".".join(map(str, detail["loc"])))
    next_step = "docs/recipes.md lists the keys of a profile; `quantize profile MODEL` writes one to edit"
    if detail["type"] == "missing":
        return Problem(f"{key} is missing in a profile", where, next_step=next_step)
    if detail["type"] == "extra_forbidden":
        return Problem(f"unknown key {key} in a profile", where, next_step=next_step)
    expected = "a list, such as [4-bit]" if detail["type"] == "list_type" else detail["msg"]
    return Problem(f"{key} is not valid in a profile", where, shown(detail["input"]), expected, next_step)


def _pattern_problems(profile: Profile, document: Value) -> Iterator[Problem]:
    texts: dict[KeyPath, str] = {
        ("roles", role, index): text for role, texts in profile.roles.items() for index, text in enumerate(texts)
    }
    texts |= {("keep", index, "layers"): entry.layers for index, entry in enumerate(profile.keep)}
    for path, text in texts.items():
        try:
            Pattern.parse(text)
        except RecipeError as error:
            place = document.where(path)
            yield from (Problem(p.what, place, p.got, p.expected, p.next_step) for p in error.problems)


@cache
def find_profile(class_name: str) -> Profile | None:
    """The profile of a diffusers or transformers model class, or None where there is none yet."""
    path = profiles().get(class_name)
    return Profile.model_validate(parse(read_text(path, path.name), path.name).plain) if path else None


def profiles() -> dict[str, Path]:
    """The profiles that come with bitroute, by class name."""
    folder = Path(str(files("bitroute.recipes"))) / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
