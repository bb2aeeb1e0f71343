"""What a checkpoint was made from, for its card: the base model on the Hub, its licence, and whether it is gated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.hub import TIMEOUT_S, api, explained, find_model, parse_hub_id, read_bytes
from bitroute.convert.record import Record
from bitroute.errors import Problem, RecipeError, SourceError

CARD = "README.md"
CARD_LIMIT_BYTES = 2_000_000
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """The source of a checkpoint, as a stranger may know it."""

    name: str  # the Hub's id, or a folder's name
    repo: str | None = None  # on the Hub
    commit: str | None = None
    license: Mapping[str, Any] = field(default_factory=dict)  # license, license_name, license_link of its card
    note: str = ""  # what could not be found out


def find_origin(record: Record, base_model: str | None = None) -> Origin:
    """Asks the Hub for the card of the base model; of a local source its README.md is read.

    base_model: the id of the model on the Hub that a local source is.

    Raises:
        RecipeError: `base_model` is no such id.
    """
    repo = base_repo(record, base_model)
    if repo is None:
        return _local(record)
    commit = record.revision if repo == record.model else None
    try:
        model = find_model(repo, commit)
        known = CARD in model.sizes and model.sizes[CARD] <= CARD_LIMIT_BYTES
        content = read_bytes(model, CARD) if known else b""
    except SourceError as error:
        return Origin(repo, repo, commit, note=f"the card of {repo} could not be read: {error.problems[0].what}")
    found = licence_of(content.decode("utf-8", "replace"))
    return Origin(repo, repo, commit, _absolute(found, repo, commit or model.commit, record), _unknown(found))


def base_repo(record: Record, base_model: str | None = None) -> str | None:
    """The base model's id on the Hub, where it is known; raises RecipeError where `base_model` is none."""
    if base_model and (parse_hub_id(base_model) or ("", "no revision"))[1]:
        expected = "owner/name of a model on the Hub"
        raise RecipeError(Problem("not a base model", got=base_model, expected=expected))
    return base_model or (record.model if record.revision and parse_hub_id(record.model) else None)


def is_gated(repo: str) -> bool | None:
    """Whether the Hub makes people agree to conditions before they get the model; None where it cannot be asked."""
    try:
        with explained(repo):
            return bool(api().model_info(repo, timeout=TIMEOUT_S).gated)
    except SourceError:
        return None


def licence_of(card: str) -> dict[str, str]:
    """The keys of a card's metadata that say its licence; cards come from strangers."""
    block = REGEX_YAML_BLOCK.search(card)
    try:
        found: Any = yaml.safe_load(block.group(2)) if block else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    entries = found if isinstance(found, dict) else {}
    return {key: value for key in LICENSE_KEYS if isinstance(value := entries.get(key), str) and 0 < len(value) < 300}


def _absolute(licence: dict[str, str], repo: str, commit: str, record: Record) -> dict[str, str]:
    """A link to a file of the base's repository, unless that file goes along."""
    link = licence.get("license_link", "")
    if not link or re.match(r"https?://", link) or link in record.copied:
        return licence
    return {**licence, "license_link": f"https://huggingface.co/{repo}/blob/{commit}/{link.lstrip('./')}"}


def _local(record: Record) -> Origin:
    builtin = record.model.startswith("builtin:")
    name = record.model if builtin else Path(record.model.rstrip("/\\")).name
    note = "" if builtin else "the source is a folder: --base-model OWNER/NAME says which model on the Hub it is"
    try:
        card = open_pipeline(record.model, access="cache").folder / CARD
        readable = card.is_file() and card.stat().st_size <= CARD_LIMIT_BYTES
        found = licence_of(card.read_text("utf-8", "replace") if readable else "")
    except (SourceError, OSError):
        found = {}
    return Origin(name, license=found, note=note or _unknown(found))


def _unknown(licence: Mapping[str, str]) -> str:
    return "" if licence else "the source's card names no licence: add it to the card by hand"
