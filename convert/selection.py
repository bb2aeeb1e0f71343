"""Which files of a repository make up a pipeline: no single-file twin, no second precision, no other framework.

Names of weights as diffusers 0.42 knows them (pipelines/pipeline_loading_utils.py, variant_compatible_siblings).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitroute.convert.bare import CONFIG, BareIndex, goes_along
from bitroute.convert.copies import BESIDE, WEIGHTS, is_index
from bitroute.errors import Problem, SourceError

OTHER_WEIGHTS = (*WEIGHTS, ".onnx_data", ".pb", ".gguf", ".pth", ".tflite", ".flashpack")
ROOT_FILES = ("model_index.json", "bitroute.json")
_STEM = r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(rf"{_STEM}({_SHARD})?(\.(?P<variant>[\w-]+?))?({_SHARD})?\.(?P<suffix>safetensors|bin)")
_INDEX = re.compile(
    rf"{_STEM}\.(?P<suffix>safetensors|bin)(\.index|\.index\.(?P<variant>[\w-]+)|\.(?P<legacy>[\w-]+)\.index)\.json"
)
Names = dict[str, str]  # what diffusers reads without a variant → what the repository calls it


def select(files: Iterable[str], index: Mapping[str, Any], variant: str | None, repo: str) -> Names:
    """The files that a pipeline of this index needs.

    variant: such as fp16; a part that has no such weights gives its plain ones, as in diffusers.

    Raises:
        SourceError: a part has weights of other variants only, or no part has this one.
    """
    names = list(files)
    chosen = {name: name for name in names if name in ROOT_FILES or _is_beside(name)}
    variants: set[str | None] = set()
    problems = []
    bare = isinstance(index, BareIndex)
    if bare:
        chosen |= {name: name for name in names if name == CONFIG or goes_along(name, index)}
    for part in [part for part, entry in index.items() if isinstance(entry, list) and any(entry)]:
        inside = [name for name in names if bare or name.startswith(f"{part}/")]
        chosen |= {name: name for name in inside if not (bare or _is_weight(name))}
        by_variant = _weights("" if bare else f"{part}/", inside)
        variants |= by_variant.keys()
        best = by_variant.get(variant) or by_variant.get(None)
        if by_variant and best is None:
            problems.append(_no_variant(repo if bare else f"{repo}/{part}", variant, by_variant))
        chosen |= best or {}
    if variant and not problems and variant not in variants:
        problems.append(_no_variant(repo, variant, variants))
    if problems:
        raise SourceError(problems)
    return chosen


def _weights(place: str, inside: Iterable[str]) -> dict[str | None, Names]:
    """The weights of a part by variant (None: plain), in safetensors, or pickled where there is nothing else.

    place: what their names begin with, such as `vae/`.
    """
    found: dict[str, dict[str | None, Names]] = {"safetensors": {}, "bin": {}}
    sharded: set[tuple[str, str | None]] = set()
    for name in sorted(inside):
        file = name.removeprefix(place)
        index, weights = _INDEX.fullmatch(file), _WEIGHTS.fullmatch(file)
        if index:
            key = index["suffix"], index["variant"] or index["legacy"]
            sharded.add(key)
            found[key[0]].setdefault(key[1], {})[f"{place}{index['stem']}.{key[0]}.index.json"] = name
        elif weights:
            plain = file if re.search(_SHARD, file) else f"{weights['stem']}.{weights['suffix']}"
            found[weights["suffix"]].setdefault(weights["variant"], {})[f"{place}{plain}"] = name
    for suffix, variant in sharded:  # the loaders prefer an index to a single file beside it
        names = found[suffix][variant]
        found[suffix][variant] = {
            plain: name for plain, name in names.items() if re.search(_SHARD, name) or plain.endswith(".json")
        }
    return found["safetensors"] or found["bin"]


def _is_weight(name: str) -> bool:
    return name.endswith(OTHER_WEIGHTS) or is_index(name)


def _is_beside(name: str) -> bool:
    return "/" not in name and name.upper().startswith(BESIDE)


def variants_of(names: Iterable[str]) -> list[str]:
    """Of the weights among the files of one folder."""
    return sorted(variant for variant in _weights("", names) if variant)


def other_variants(names: Iterable[str]) -> set[str]:
    """The weights of one folder that no loader reads unless it is told their variant, where there are plain ones."""
    found = _weights("", names)
    plain = found.pop(None, {}).values()
    if all(is_index(name) for name in plain):  # none, or that of shards which still carry their variant
        return set()
    return {name for others in found.values() for name in others.values()}


def choose_variant(variants: Sequence[str]) -> str:
    """What to do where there are these only."""
    return f"say `variant: {variants[0]}` in the recipe, or give --variant {variants[0]}"


def _no_variant(where: str, variant: str | None, there: Iterable[str | None]) -> Problem:
    others = sorted(name for name in there if name)
    got = ", ".join([*(["plain weights"] if None in set(there) else []), *others])
    what = f"no weights of the variant {variant!r}" if variant else "no weights under plain names"
    mend = choose_variant(others) if others else "leave `variant:` or --variant out"
    return Problem(what, where, got=f"only {got}", next_step=mend)
