"""What is wrong with a document, in words: pydantic finds the errors, this says them all at once with their lines.

`levels` are the models of the schema by the length of the paths of their keys: 1 for those of the whole document;
a section at the top that has not the schema of its length is listed by its name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from bitroute import backends
from bitroute.convert.document import MAX_PROBLEMS, SHOWN, KeyPath, Value, printable, shown, sorted_problems
from bitroute.errors import BackendError, Problem, did_you_mean

__all__ = ["Levels", "near_words", "refused", "validate"]

Levels = Mapping[int | str, type[BaseModel]]

_PLACES = {
    1: "at the top of the recipe", 2: "under `eval`", "push": "under `push`", "fuse_loras": "under `fuse_loras`",
    3: "in a component", 5: "in a rule",
}  # fmt: skip
_FIRST_KEYS = {"eval": "prompts", "push": "repo"}
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than_equal": "a larger number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_too_long": "a shorter text",
    "list_type": "a list, one item per `- ` line",
    "dict_type": "a mapping of `key: value` lines",
    "model_type": "a mapping of `key: value` lines",
    "too_short": "at least one",
}


def refused(what: str, expected: str, next_step: str = "") -> PydanticCustomError:
    """What a validator of the schema raises to say it in its own words."""
    return PydanticCustomError("bitroute", "{what}", {"what": what, "expected": expected, "next": next_step})


def near_words(value: object, known: list[str]) -> str:
    """`did_you_mean` for any value: comparing takes long where words are long."""
    return did_you_mean(str(value), known) if isinstance(value, str) and len(value) <= SHOWN else ""


def validate(levels: Levels, document: Value) -> tuple[BaseModel | None, list[Problem]]:
    """Validates, cuts what was refused, and validates the rest, until something valid or nothing is left.

    Gives up where one round finds more than MAX_PROBLEMS: that many are counted, not explained.
    """
    problems: list[Problem] = []
    damaged: set[Value] = set()
    context = {"backends": backends.available()}  # reading them for every rule would take seconds
    while True:
        try:
            return levels[1].model_validate(document.plain, context=context), sorted_problems(problems)
        except ValidationError as error:
            details = error.errors(include_url=False)
        if len(details) > MAX_PROBLEMS:
            return None, _first(details, document, levels)
        cuts = _judge_all(details, document, damaged, levels)
        problems += [cut.problem for cut in cuts if cut.problem]
        if not all([_apply(cut, document, damaged) for cut in cuts]):
            return None, sorted_problems(problems)


def _first(details: list[ErrorDetails], document: Value, levels: Levels) -> list[Problem]:
    """The MAX_PROBLEMS that stand first in the file, and how many there are besides."""
    places = [document.nearest(detail["loc"]) for detail in details]
    order = sorted(range(len(details)), key=lambda index: (places[index].file, places[index].line))
    said = [_problem(details[index], document, levels) for index in order[:MAX_PROBLEMS]]
    unsaid = [Problem("", document.where(details[index]["loc"])) for index in order[MAX_PROBLEMS:]]
    return sorted_problems(said + unsaid)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What validation refused, by its own path, and what there is to say about it."""

    parent: Value
    child: Value | None  # None: the whole document
    problem: Problem | None
    harmless: bool  # the rest means the same without it


def _judge_all(details: list[ErrorDetails], document: Value, damaged: set[Value], levels: Levels) -> list[_Cut]:
    unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
    typos = {(*loc[:-1], _suggestion(loc, levels)) for loc in unknown}
    return [_judge(detail, document, damaged, typos, levels) for detail in details]


def _judge(detail: ErrorDetails, document: Value, damaged: set[Value], typos: set[KeyPath], levels: Levels) -> _Cut:
    loc: KeyPath = detail["loc"]
    missing = detail["type"] == "missing"
    path = loc[:-1] if missing else loc
    parent, subject = document.nearest(path[:-1]), document.nearest(path)
    follows = subject in damaged or (missing and loc in typos)
    problem = None if follows else _problem(detail, document, levels)
    harmless = detail["type"] == "extra_forbidden" and not _suggestion(loc, levels)
    return _Cut(parent, None if subject is parent else subject, problem, harmless)


def _apply(cut: _Cut, document: Value, damaged: set[Value]) -> bool:
    if cut.child is None:
        return False
    if cut.child is cut.parent.child("backend"):
        for beside in filter(None, map(cut.parent.child, ("options", "method"))):
            cut.parent.remove(beside)  # they were meant for the backend that is not known
    cut.parent.remove(cut.child)
    if not cut.harmless:
        damaged.add(cut.parent)
    return True


def _known_keys(loc: KeyPath, levels: Levels) -> list[str]:
    """The keys of the mapping that holds `loc`."""
    return [*_model(loc, levels).model_fields, *(["extends"] if len(loc) == 1 else [])]


def _model(loc: KeyPath, levels: Levels) -> type[BaseModel]:
    """The schema of the mapping that holds `loc`."""
    return levels[loc[0]] if len(loc) > 1 and loc[0] in levels else levels[len(loc)]


def _suggestion(loc: KeyPath, levels: Levels) -> str:
    """The key that an unknown one was probably meant to be."""
    return near_words(loc[-1], _known_keys(loc, levels)).removeprefix("did you mean '").removesuffix("'?")


def _problem(detail: ErrorDetails, document: Value, levels: Levels) -> Problem:
    """What pydantic found, in our words."""
    loc: KeyPath = detail["loc"]
    key, where, kind = shown(str(loc[-1])), document.where(loc), detail["type"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    got = shown(detail["input"])
    if kind == "extra_forbidden":
        known = "one of " + ", ".join(_known_keys(loc, levels))
        return Problem(f"unknown key {key}", where, "", known, _for_unknown(loc, document, levels))
    if kind == "unknown_backend":
        return _unknown_backend(detail["input"], where)
    if kind == "missing":
        return Problem(f"{key} is missing", where, expected=_description(loc, levels))
    if kind == "bitroute":
        return Problem(context["what"], where, got, context["expected"], context["next"])
    item = isinstance(loc[-1], int)
    what = f"item {int(key[1:-1]) + 1} of {loc[-2]!r} is not valid" if item else f"{key} is not valid"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        near = near_words(detail["input"], choices)
        return Problem(what, where, got, "one of " + ", ".join(choices), near)
    if kind == "too_long":
        count, most = context["actual_length"], context["max_length"]
        return Problem(what, where, f"{count or 'too many'} of them", f"at most {most}")
    return Problem(what, where, got, _EXPECTED.get(kind, detail["msg"]), _mend(kind, loc, detail["input"]))


def _unknown_backend(name: str, where: str) -> Problem:
    installed = "one of " + ", ".join(backends.available())
    near = backends.suggest(name) if len(name) <= SHOWN else ""
    return Problem(f"unknown backend {shown(name)}", where, "", installed, near)


def _for_unknown(loc: KeyPath, document: Value, levels: Levels) -> str:
    """Where an unknown key would be known, or what it could be a typo of."""
    key = str(loc[-1])
    backend = document.nearest(loc[:-1]).child("backend")
    name = str(backend.content) if backend else ""
    if key in _options(name):
        return f"{key!r} is an option of {name}: write `options: {{{key}: …}}`"
    places = [_PLACES[depth] for depth, model in levels.items() if key in model.model_fields]
    if places:
        return f"{key!r} belongs {' or '.join(places)}"
    near = near_words(key, _known_keys(loc, levels))
    value = document.nearest(loc)
    if not near and len(loc) == 1 and isinstance(value.content, dict):
        return "components stand under `components:`"
    return near


def _options(backend: str) -> set[str]:
    if backend not in backends.available():
        return set()
    try:
        return {option.name for option in dataclasses.fields(backends.find(backend))}
    except BackendError:  # its library is missing
        return set()


def _mend(kind: str, loc: KeyPath, value: object) -> str:
    """How a value of the wrong type was probably meant."""
    if kind == "string_type" and isinstance(value, int | float):
        return "put it in quotes"
    if kind != "model_type" or not isinstance(value, str):
        return ""
    if loc[-1] in _FIRST_KEYS:
        return f"write `{loc[-1]}: {{{_FIRST_KEYS[str(loc[-1])]}: {shown(value)}}}`"
    if loc[0] == "fuse_loras":
        return f"write `- {{path: {shown(value)}}}`"
    if len(loc) == 2:
        return f"write `{printable(str(loc[-1]))}: {{backend: {_backend_meant(value)}}}`"
    return f"write `{{layers: {shown(value)}, backend: NAME}}`"


def _backend_meant(name: str) -> str:
    if name in backends.available():
        return name
    near = backends.suggest(name) if len(name) <= SHOWN else ""
    return near.removeprefix("did you mean '").removesuffix("'?") or "NAME"


def _description(loc: KeyPath, levels: Levels) -> str:
    return _model(loc, levels).model_fields[str(loc[-1])].description or ""
