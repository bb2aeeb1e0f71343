"""The pipeline beside a single file: everything but the weights that the file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from bitroute.convert import download
from bitroute.convert.checkpoint import WEIGHTS, Access, Component, Pipeline, open_pipeline, read_index
from bitroute.convert.hub import parse_hub_id, snapshot_folder

Hold = Callable[[Pipeline, str | None], Mapping[str, Component]]  # a pipeline, the one component that may be meant


def open_config(config: str, access: Access, hold: Hold) -> Pipeline:
    """The pipeline with the components that `hold` finds in a file; of those the Hub is not asked for weights.

    Raises:
        SourceError: there is no such pipeline, and whatever `hold` raises.
    """
    name, only = _split(config)
    hub_id = None if Path(name).expanduser().is_dir() else parse_hub_id(name)
    base = _cached(name, *hub_id) if hub_id and access == "cache" else open_pipeline(name, access="outline")
    held = hold(base, only)
    made = replace(base, held=held, config=base)
    return _without_weights(made, made.hub, access) if made.hub else made


def _split(config: str) -> tuple[str, str | None]:
    """The pipeline, and the component that the path leads to inside it."""
    place, _, name = config.rstrip("/").rpartition("/")
    folder = Path(place).expanduser()
    if place and ((folder / "model_index.json").is_file() or (config.count("/") == 2 and parse_hub_id(place))):
        return place, name
    return config, None


def _cached(name: str, repo: str, revision: str | None) -> Pipeline:
    """As an earlier job downloaded it: without the weights that a file holds."""
    source = download.find_source(repo, revision, None, cached=True, whole=False)
    folder = snapshot_folder(repo, source.commit)
    return Pipeline(folder, name, read_index(folder), source)


def _without_weights(made: Pipeline, hub: download.HubSource, access: Access) -> Pipeline:
    """Nothing is downloaded that the file replaces."""
    names = {
        plain: name
        for plain, name in hub.names.items()
        if not ((made.bare or plain.partition("/")[0] in made.held) and plain.endswith(WEIGHTS))
    }
    hub = replace(hub, names=names)
    if access == "cache":
        download.check_complete(hub)
    if made.is_outline and (access == "download" or not hub.missing):
        return replace(made, hub=hub, folder=download.download(hub), is_outline=False)
    return replace(made, hub=hub)
