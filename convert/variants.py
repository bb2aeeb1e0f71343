"""One variant of the weights in a local folder, seen under plain names: by links, which are not told a variant for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path, constants

from bitroute.convert.bare import BareIndex
from bitroute.convert.checkpoint import file_names, folder_name, read_index
from bitroute.convert.copies import walk
from bitroute.convert.selection import select
from bitroute.errors import Problem, SourceError


def plain_folder(model: str, folder: Path, variant: str) -> Path:
    """A folder of links to what the model needs, which tells as little of a variant as a download from the Hub does.

    model: its name in errors. A part that has no such weights gives its plain ones.

    Raises:
        SourceError: no part has this variant, the folder cannot be read, or there is no place for the links.
    """
    source = folder.resolve()
    index = read_index(source)
    names = select(_names(source, index), index, variant, model)
    kind = hashlib.sha256(f"{variant} {source}".encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        assets = cached_assets_path("bitroute", "folders", kind, assets_dir=constants.HF_ASSETS_CACHE)
        place = assets / (folder_name(source) or "model")
        link_files(place, {plain: source / name for plain, name in names.items()})
    except (OSError, ValueError) as error:  # the latter from cached_assets_path, where a file is in the way
        what, mend = "cannot link the weights of a variant", "set HF_HOME to a folder that can be written"
        raise SourceError(Problem(what, constants.HF_ASSETS_CACHE, str(error)[:300], next_step=mend)) from error
    return place


def link_files(place: Path, targets: Mapping[str, Path]) -> None:
    """Makes `place` hold a link of each name to its target, and no other file."""
    for plain, target in targets.items():
        link = place / plain
        if not (link.exists() and link.samefile(target)):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            _link(target, link)
    for file in [file for file in place.rglob("*") if file.is_symlink() or file.is_file()]:
        if file.relative_to(place).as_posix() not in targets:
            file.unlink()


def _link(target: Path, link: Path) -> None:
    try:
        link.symlink_to(target)
    except OSError:  # Windows without the right to make symbolic links
        os.link(target, link)


def _names(folder: Path, index: Mapping[str, Any]) -> Iterator[str]:
    """Of the files beside the index and in its parts; raises SourceError for what a copy would not hold either."""
    problems: list[Problem] = []
    for name in file_names(folder):
        if not os.path.isdir(folder / name):
            yield name
        elif name in index and not isinstance(index, BareIndex):
            yield from (file.relative_to(folder).as_posix() for file in walk(folder / name, problems))
    if problems:
        raise SourceError(problems)
