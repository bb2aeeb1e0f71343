"""The formats among which the search chooses for every layer, as the user lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitroute import backends
from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.container import NATIVE
from bitroute.convert.document import parse, read_text, shown
from bitroute.convert.layout import StoredTensor
from bitroute.errors import BackendError, Problem, RecipeError

__all__ = [
    "KEEP", "can_use", "default_candidates", "is_fitted", "native_families", "parse_candidates", "without_plain",
]  # fmt: skip

KEEP = "keep"
WHERE = "--candidates"
MOST = 32
DEFAULT = "codebook4:block=32,codebook4:block=16,nf4:scale=mse,mxfp4:scale=mse,nvfp4:scale=mse,int6,int8,float8,keep"
ROUNDED = "codebook4:block=32,codebook4:block=16,nf4:scale=mse,nvfp4:scale=mse,int6"
COMPENSATED = ",".join([*(f"{word}:method.gptq=true" for word in ROUNDED.split(",")), ROUNDED, "int8,float8,keep"])
EXPECTED = "NAME or NAME:OPTION=VALUE, such as nvfp4:scale=mse,int8,keep; or a YAML file"


def parse_candidates(text: str) -> list[Backend]:
    """`nvfp4:scale=mse,mxfp4:method.rotate=32,keep`, or a YAML file: `candidates:`, a list as the rules of a recipe.

    Raises:
        RecipeError: everything that is wrong with the list, at once.
    """
    asked = _from_file(Path(text)) if text.endswith((".yaml", ".yml")) else _from_words(text)
    if not 0 < len(asked) <= MOST:
        expected = f"1 to {MOST}: {EXPECTED}"
        raise RecipeError(Problem("not a list of candidates", WHERE, got=f"{len(asked)} of them", expected=expected))
    return _create(asked)


def default_candidates(compensated: bool = False) -> list[Backend]:
    """4 bits in several ways, 6, 8 and all; compensated: with GPTQ too, which needs the Hessians of layers' inputs."""
    return _create(_from_words(COMPENSATED if compensated else DEFAULT))


def can_use(backend: Backend, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether what was measured of a layer's input, kind → tensor, is all that it needs."""
    needed = {kind: stored[kind].spec for kind in backend.measured & stored.keys()}
    return backend.measured <= stored.keys() and backend.refuse_statistics(needed) is None


def is_fitted(backend: Backend) -> bool:
    """Whether GPTQ fits it to a Hessian, by which it then loses less than on other inputs."""
    return "hessian" in backend.measured


def without_plain(candidates: Mapping[str, Backend], sizes: Mapping[str, int]) -> dict[str, int]:
    """Of what a layer can have, label → bytes: no format without GPTQ that is there with it."""
    plain = {str(getattr(candidates[key], "inner", "")) for key in sizes if is_fitted(candidates[key])}
    return {key: size for key, size in sizes.items() if key not in plain}


def native_families(candidates: Iterable[Backend]) -> dict[str, list[Backend]]:
    """Native container → the candidates that it can hold beside each other; `keep` goes with all."""
    probe = TensorSpec((256, 256), torch.bfloat16)
    found: dict[str, list[Backend]] = {}
    for backend in candidates:
        if backend.family in NATIVE and backend.record(probe) is not None:
            name = backend.family if NATIVE[backend.family].mixes else f"{backend.family} {backend}"
            found.setdefault(name, []).append(backend)
    kept = [backend for backend in candidates if backend.name == KEEP]
    return {family: [*members, *kept] for family, members in found.items()}


Asked = tuple[str, str, Mapping[str, Any]]  # where, the backend's name, its options


def _from_words(text: str) -> list[Asked]:
    found, problems = list[Asked](), list[Problem]()
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, *pairs = word.split(":")
        options = dict[str, Any]()
        for pair in pairs:
            key, equals, value = pair.partition("=")
            group, dot, inner = key.partition(".")
            if not equals or not group or (dot and not inner):
                problems.append(Problem(f"not an option: {shown(pair)}", WHERE, got=shown(word), expected=EXPECTED))
            elif dot and isinstance(options.setdefault(group, {}), dict):
                options[group][inner] = _value(value)
            elif dot:
                problems.append(Problem(f"{shown(group)} is said twice", WHERE, got=shown(word), expected=EXPECTED))
            else:
                options[group] = _value(value)
        found.append((f"{WHERE} {name[:40]}", name, options))
    if problems:
        raise RecipeError(problems)
    return found


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _from_file(file: Path) -> list[Asked]:
    document = parse(read_text(file, str(file)), str(file))
    listed = document.child("candidates")
    content = listed.plain if listed else None
    if not isinstance(content, list) or len(list(document.plain or [])) != 1:  # type: ignore[call-overload]
        raise RecipeError(Problem("not a list of candidates", str(file), expected="`candidates:` and a list, no more"))
    found, problems = list[Asked](), list[Problem]()
    for index, entry in enumerate(content):
        where = document.where(("candidates", index))
        if isinstance(entry, str):
            found.append((where, entry, {}))
        elif isinstance(entry, dict) and isinstance(entry.get("backend"), str) and _has_known_keys(entry):
            method = {"method": entry["method"]} if entry.get("method") else {}
            found.append((where, entry["backend"], {**(entry.get("options") or {}), **method}))
        else:
            expected = "{backend: NAME, options: {…}, method: {…}}, or a name"
            problems.append(Problem("not a candidate", where, got=shown(entry), expected=expected))
    if problems:
        raise RecipeError(problems)
    return found


def _has_known_keys(entry: Mapping[str, Any]) -> bool:
    return entry.keys() <= {"backend", "options", "method"} and isinstance(entry.get("options") or {}, dict)


def _create(asked: Iterable[Asked]) -> list[Backend]:
    """Each once, in order; all bad ones at once."""
    made, problems = dict[str, Backend](), list[Problem]()
    for where, name, options in asked:
        try:
            backend = backends.create(name, **options)
            if backend.name == KEEP and backend.options:
                problems.append(Problem("keep is the layer as it is", where, got=str(backend), expected="no options"))
            made.setdefault(str(backend), backend)
        except BackendError as error:
            problems += [Problem(p.what, where, p.got, p.expected, p.next_step) for p in error.problems]
    if problems:
        raise RecipeError(problems)
    return list(made.values())
