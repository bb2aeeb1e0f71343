"""A pipeline from the Hub: outlined from kilobytes for a plan, downloaded for a job, found again in the cache."""

from __future__ import annotations

import glob
import json
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from huggingface_hub import cached_assets_path, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import tqdm

from bitroute.convert.bare import CONFIG, INDEX, bare_index
from bitroute.convert.hub import (
    HubModel,
    explained,
    find_cached,
    find_model,
    read_bytes,
    remember_branch,
    snapshot_folder,
)
from bitroute.convert.layout import HEADER_LIMIT_BYTES
from bitroute.convert.progress import Bar
from bitroute.convert.reading import CONFIG_LIMIT_BYTES
from bitroute.convert.selection import ROOT_FILES, Names, select
from bitroute.convert.variants import link_files
from bitroute.errors import JobError, Problem, SourceError

HEAD_BYTES = 2**16  # the headers of FLUX.1-dev's shards are half as long
CONNECTIONS = 8
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class HubSource:
    """The part of a repository that its pipeline needs."""

    model: HubModel
    variant: str | None
    names: Names

    @property
    def repo(self) -> str:
        return self.model.repo

    @property
    def commit(self) -> str:
        return self.model.commit

    @property
    def missing(self) -> dict[str, int]:
        """What is not in the cache yet → bytes."""
        cached = partial(try_to_load_from_cache, self.repo, revision=self.commit)
        return {
            name: self.model.sizes[name] for name in self.names.values() if not isinstance(cached(filename=name), str)
        }


def find_source(
    repo: str, revision: str | None, variant: str | None, *, cached: bool = False, whole: bool = True
) -> HubSource:
    """Which commit, and which of its files; nothing is downloaded but the index.

    cached: without network, as offline mode has it; every file is then there, if it is to be `whole`.

    Raises:
        SourceError: no such model, no access, no pipeline, no such variant, or not all of it in the cache.
    """
    cached = cached or constants.is_offline_mode()
    model = find_cached(repo, revision) if cached else find_model(repo, revision)
    source = HubSource(model, variant, select(model.sizes, _index(model, cached), variant, repo))
    if cached and whole:
        check_complete(source)
    return source


def download(source: HubSource, progress: Progress | None = None) -> Path:
    """The pipeline's folder in the cache, with every file that it needs under its plain name.

    A cut connection is taken up where it was cut; a killed download keeps its complete files.
    progress: is told the bytes that arrived since the last call; without it a bar is drawn on stderr.

    Raises:
        SourceError: the disk is too full. JobError: the download failed.
    """
    missing = source.missing
    missing_bytes = sum(missing.values())
    if missing:
        _check_room(source, missing_bytes)
        if progress:
            _fetch(source, progress)
        else:
            with Bar(f"downloading {source.repo}", missing_bytes) as bar:
                _fetch(source, bar.advance)
    with explained(source.repo, source.model.revision):
        return _plain(source, snapshot_folder(source.repo, source.commit))


def _fetch(source: HubSource, progress: Progress) -> None:
    """The client's threads do not see an interrupt: it waits here, and the meter ends them."""
    stop = Event()
    meter = type("Meter", (_Meter,), {"report": staticmethod(progress), "stop": stop})
    names = [glob.escape(name) for name in source.names.values()]
    start = partial(
        snapshot_download, source.repo, revision=source.commit, allow_patterns=names, library_name="bitroute",
        tqdm_class=meter,
    )  # fmt: skip
    with explained(source.repo, source.model.revision, JobError), ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(start).result()
        finally:
            stop.set()
    remember_branch(source.model)


class _Meter(tqdm):
    """Draws nothing; hands on the bytes that reach the disk."""

    report: Progress
    stop: Event

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.counts = str(settings.get("desc", "")).startswith("Reconstructing")
        super().__init__(*args, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

    def update(self, n: float | None = 1) -> None:
        if self.counts and n:
            if self.stop.is_set():
                raise InterruptedError
            self.report(int(n), "")


def outline(source: HubSource) -> Path:
    """A folder to plan with: the real configs and indexes; weights are their headers and holes of the true size.

    It lies among the temporary files until `forget_with` or the end of the process: nobody should load from it.

    Raises:
        SourceError: a file cannot be read.
    """
    folder = Path(tempfile.mkdtemp(prefix="bitroute-plan-only-"))
    try:
        with explained(source.repo, source.model.revision), ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(partial(_outline_file, source.model, folder), *zip(*source.names.items(), strict=True)))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def forget_with(owner: object, folder: Path) -> None:
    """Removes the folder when its owner is gone."""
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)


def _outline_file(model: HubModel, folder: Path, plain: str, name: str) -> None:
    size_bytes = model.sizes[name]
    content = b""
    if name.endswith(".safetensors"):
        content = _header(model, name)
    elif name in (*ROOT_FILES, CONFIG) or name.endswith(("/config.json", ".index.json")) or ".index." in name:
        if size_bytes > CONFIG_LIMIT_BYTES:
            raise SourceError(Problem("a JSON file of that size is not a config", f"{model.repo}/{name}"))
        content = read_bytes(model, name)
    file = folder / plain
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(content)
        stream.truncate(size_bytes)


def _header(model: HubModel, name: str) -> bytes:
    """The length and the header of a safetensors file; what is no such file is left to the reader of headers."""
    start = read_bytes(model, name, HEAD_BYTES)
    stop = 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if stop > min(HEADER_LIMIT_BYTES, model.sizes[name]):
        return start
    return start[:stop] if stop <= len(start) else read_bytes(model, name, stop)


def _plain(source: HubSource, snapshot: Path) -> Path:
    """The snapshot; where names differ, a folder of links to it, which no loader needs to be told a variant for."""
    if all(plain == name for plain, name in source.names.items()):
        return snapshot
    kind = f"{source.commit}-{source.variant}"
    folder = cached_assets_path("bitroute", source.repo, kind, assets_dir=constants.HF_ASSETS_CACHE)
    place = folder / source.repo.rpartition("/")[2]  # reports call a model by its folder
    link_files(place, {plain: (snapshot / name).resolve() for plain, name in source.names.items()})
    return place


def _check_room(source: HubSource, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise SourceError(
            Problem(
                "the disk is too full for the download", str(cache), got=f"{free / 1e9:.2f} GB free",
                expected=f"{needed / 1e9:.2f} GB for {source.repo}",
                next_step="free some room, or set HF_HOME to a folder on another disk",
            )
        )  # fmt: skip


def _index(model: HubModel, cached: bool) -> Mapping[str, Any]:
    """Of a pipeline, or of a model that is one component."""
    if INDEX in model.sizes:
        return _json(model, INDEX, cached)
    index = bare_index(_json(model, CONFIG, cached)) if CONFIG in model.sizes else None
    if index is None:
        raise SourceError(_no_pipeline(model))
    return index


def _json(model: HubModel, name: str, cached: bool) -> dict[str, Any]:
    where = f"{model.repo}/{name}"
    if model.sizes[name] > CONFIG_LIMIT_BYTES:
        raise SourceError(Problem("a JSON file of that size is not a config", where))
    try:
        here = (snapshot_folder(model.repo, model.commit) / name).read_bytes if cached else None
        content = json.loads(here() if here else read_bytes(model, name))
    except (ValueError, RecursionError) as error:
        raise SourceError(Problem("cannot read the file as JSON", where, got=str(error))) from error
    if not isinstance(content, dict):
        raise SourceError(Problem("not a JSON mapping", where, got=type(content).__name__))
    return content


def _no_pipeline(model: HubModel) -> Problem:
    there = [name for name in model.sizes if "/" not in name and name.endswith((".safetensors", ".gguf", ".ckpt"))]
    single = "a single file is given as --model FILE --config REPO"
    return Problem(
        "not a diffusers pipeline", model.repo, got=f"no {INDEX}" + (f", but {', '.join(there[:3])}" if there else ""),
        next_step=f"give the repository with the diffusers layout; {single}",
    )  # fmt: skip


def check_complete(source: HubSource) -> None:
    """Raises SourceError where the cache lacks a file."""
    if source.missing:
        raise SourceError(_incomplete(source))


def _incomplete(source: HubSource) -> Problem:
    names = list(source.missing)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Problem(
        "the model was not downloaded completely", source.repo, got=f"without {', '.join(names[:3])}{more}",
        expected=f"{sum(source.missing.values()) / 1e9:.2f} GB more of commit {source.commit}",
        next_step="unset HF_HUB_OFFLINE and run it again" if constants.is_offline_mode()
        else f"download it: hf download {source.repo} --revision {source.commit}",
    )  # fmt: skip
