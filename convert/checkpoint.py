"""The read side: the components of a pipeline folder, and the tensors of a component, one block at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from bitroute.convert.bare import CONFIG, INDEX, BareIndex, bare_index
from bitroute.convert.document import SHOWN, printable
from bitroute.convert.layout import Header, StoredTensor, read_header
from bitroute.convert.pickles import read_pickle
from bitroute.convert.reading import read_json
from bitroute.convert.schema import Dequantize
from bitroute.convert.shards import index_name, weight_name
from bitroute.errors import Problem, SourceError, did_you_mean

if TYPE_CHECKING:
    from bitroute.convert.download import HubSource
    from bitroute.convert.lora import Lora

BUILTIN = "builtin:"
View = Callable[[dict[str, StoredTensor]], dict[str, StoredTensor]]
Access = Literal["download", "outline", "cache"]  # of a model on the Hub
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLE_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "pytorch_model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = (".safetensors", ".bin", ".index.json")
MAX_FILE_NAME_BYTES = 255  # of most file systems


@dataclass(frozen=True)
class Component:
    """One folder of a pipeline that holds a model: its class, and its weights by name."""

    name: str
    library: str  # diffusers or transformers
    class_name: str
    folder: Path
    allow_pickle: bool = False
    views: tuple[View, ...] = ()  # what the stored tensors are read as, one after the other
    notes: tuple[str, ...] = ()  # what a plan says of how it is read
    bare: bool = False  # the whole model: no pipeline is around it
    variant: str | None = None  # in the names of its weights; a source is read under plain names

    @property
    def place(self) -> PurePosixPath:
        """Its folder, relative to that of its model."""
        return PurePosixPath("." if self.bare else self.name)

    @property
    def root(self) -> Path:
        """The folder of its model."""
        return self.folder if self.bare else self.folder.parent

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @property
    def stem(self) -> str:
        return STEMS[self.library]

    @cached_property
    def headers(self) -> dict[Path, Header]:
        return {file: read_pickle(file) if file.suffix == ".bin" else read_header(file) for file in self._files()}

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Raises SourceError where two files hold the same tensor."""
        found: dict[str, StoredTensor] = {}
        for file, header in self.headers.items():
            for name, tensor in header.tensors.items():
                if name in found:
                    raise SourceError(
                        Problem(f"tensor {name!r} stands in two files", str(file), got=str(found[name].file))
                    )
                found[name] = tensor
        for view in self.views:
            found = view(found)
        return found

    def _files(self) -> list[Path]:
        kinds = {"safetensors": self.stem}
        if self.allow_pickle:
            kinds["bin"] = PICKLE_STEMS[self.library]
        names = []
        for suffix, stem in kinds.items():
            single, index = (name(stem, self.variant, suffix) for name in (weight_name, index_name))
            if os.path.lexists(self.folder / index):
                return self._shards(self.folder / index, f".{suffix}")
            if os.path.lexists(self.folder / single):  # a link that leads nowhere is named where it is read
                return [self.folder / single]
            names += [single, index]
        raise SourceError(self._no_weights(list(kinds), names))

    def _no_weights(self, kinds: list[str], names: list[str]) -> Problem:
        from bitroute.convert.selection import choose_variant, variants_of

        others = [name for name in file_names(self.folder) if name.endswith((".safetensors", *PICKLES))]
        mend = "rename or save the weights you want under the plain name"
        if not self.allow_pickle and any(name.endswith(PICKLES) for name in others):
            mend = "a pickle can run code: save the model as safetensors, or give --allow-pickle (.bin, tensors alone)"
        usable = [name for name in others if self.allow_pickle or not name.endswith(PICKLES)]
        if self.variant is None and (variants := variants_of(usable)):
            mend = choose_variant(variants)
        return Problem(
            f"component {self.name!r} has no weights in {' or '.join(kinds)}",
            str(self.folder), got=printable(", ".join(others[:10])) or "no weight file",
            expected=" or ".join(names), next_step=mend,
        )  # fmt: skip

    def _shards(self, index: Path, suffix: str) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(Problem("the index has no weight_map", str(index)))
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not is_plain_name(name):
                raise SourceError(_outside(index, "a file outside its folder", name, "plain file names"))
            if Path(name).suffix != suffix:  # else an index of safetensors could lead to a pickle
                raise SourceError(_outside(index, "a file of another kind", name, f"*{suffix}"))
            if not (self.folder / name).is_file():
                raise SourceError(
                    Problem(f"shard {name!r} is missing", str(index), next_step="download the model again")
                )
        return [self.folder / name for name in names]


def holds_model(folder: Path, library: str) -> bool:
    """Whether there is a config or weights; where there is only one of them, reading the other says so."""
    names, stems = file_names(folder), (STEMS[library], PICKLE_STEMS[library])
    return "config.json" in names or any(name.startswith(stems) and name.endswith(WEIGHTS) for name in names)


def _outside(index: Path, what: str, name: str, expected: str) -> Problem:
    return Problem(f"the index names {what}", str(index), got=printable(name[:SHOWN]), expected=expected)


def file_names(folder: Path) -> list[str]:
    """Raises SourceError where the folder cannot be listed or entered."""
    try:
        names = sorted(os.listdir(folder))
        os.stat(os.path.join(folder, os.curdir))  # one may list a folder without the right to enter it
    except OSError as error:
        raise SourceError(Problem("the folder cannot be read", str(folder), got=error.strerror or "")) from error
    return names


def is_plain_name(name: str) -> bool:
    """Whether a name from an index is that of a file or folder beside it, and fit to be shown."""
    return (
        Path(name).name == name
        and name not in ("", "..")
        and name.isprintable()
        and len(name.encode()) <= MAX_FILE_NAME_BYTES
    )


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline folder, or that of a model which is one component."""

    folder: Path
    name: str  # as the user wrote it
    index: dict[str, Any]
    hub: HubSource | None = None  # where on the Hub it comes from
    is_outline: bool = False  # good for a plan only: the weights are headers without data
    allow_pickle: bool = False  # whether weights may be read from *.bin
    dequantize: Dequantize = False  # as what components that are already quantized are read
    held: Mapping[str, Component] = field(default_factory=dict)  # those whose weights are in the single file `name`
    config: Pipeline | None = None  # where everything else comes from, if `name` is a single file
    loras: tuple[Lora, ...] = ()  # fused into the weights
    variant: str | None = None  # of the weights of a local folder; then `folder` is one of links to it
    views: Mapping[str, tuple[View, ...]] = field(default_factory=dict)  # component → what else its tensors are read as

    @property
    def bare(self) -> bool:
        return isinstance(self.index, BareIndex)

    def place(self, name: str) -> Path:
        """The folder of a part."""
        return self.folder if self.bare else self.folder / name

    @cached_property
    def components(self) -> dict[str, Component]:
        """The parts that hold weights; tokenizers and schedulers are files to copy.

        Raises:
            SourceError: the folder of a part cannot be read.
        """
        found = {}
        for name, entry in self.index.items():
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
                continue
            library, class_name = entry
            place = self.place(name)
            if place.is_dir() and library in STEMS and holds_model(place, library):
                found[name] = Component(name, library, class_name, place, self.allow_pickle, bare=self.bare)
        if self.dequantize:
            found = {name: self._decoded(component) for name, component in found.items()}
        found |= {name: replace(held, folder=self.place(name), bare=self.bare) for name, held in self.held.items()}
        return found | {name: self._viewed(found[name], views) for name, views in self.views.items() if name in found}

    def _viewed(self, component: Component, views: tuple[View, ...]) -> Component:
        notes = (lora.note(component.name) for lora in self.loras if component.name in lora.layers)
        return replace(component, views=(*component.views, *views), notes=(*component.notes, *notes))

    def _decoded(self, component: Component) -> Component:
        from bitroute.convert.decoded import decoded

        return decoded(component, self.dequantize)

    @property
    def wanted(self) -> list[str]:
        """Every part that the pipeline's index names; optional parts that it leaves out are [null, null]."""
        return [name for name, entry in self.index.items() if isinstance(entry, list) and any(entry)]

    @property
    def parts(self) -> list[str]:
        """Every folder that the pipeline's index names and that is there."""
        return [name for name in self.wanted if self.place(name).is_dir()]


def open_pipeline(
    model: str, revision: str | None = None, variant: str | None = None, *,
    access: Access = "download", allow_pickle: bool = False, dequantize: Dequantize = False, config: str | None = None,
) -> Pipeline:  # fmt: skip
    """A local pipeline folder, `builtin:NAME`, or else a model on the Hub, `owner/name` or `owner/name@revision`.

    Or a single file, with the pipeline that it belongs to as its `config`.

    revision: a branch, a tag or a commit, on the Hub only. variant: of the weights, such as fp16.
    access: `download` what the pipeline needs, `outline` it for a plan, or open what the `cache` has, without network.
    allow_pickle: also read weights from *.bin, tensors alone. dequantize: read quantized components as floats.

    Raises:
        SourceError: there is no such folder and no such model, or it is not a pipeline folder.
        JobError: the download failed.
    """
    try:
        folder = _builtin(model) if model.startswith(BUILTIN) else Path(model).expanduser()
        is_folder, is_there = bool(model) and folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, no permission
        raise SourceError(Problem("not a usable model path", model[:100], got=str(error)[:200])) from error
    if is_there and (revision or (variant and not is_folder)):
        raise SourceError(_not_here(model, "revision" if revision else "variant", folder))
    if is_there and not is_folder:
        from bitroute.convert.single_file import open_single_file

        return open_single_file(model, folder, config, access, dequantize)
    if config is not None:
        raise SourceError(_no_single_file(model))
    if not is_there:
        from bitroute.convert.hub import parse_hub_id

        hub_id = parse_hub_id(model)
        if hub_id:
            return _open_hub(model, hub_id[0], revision or hub_id[1], variant, access, allow_pickle, dequantize)
    if not is_folder:
        raise SourceError(_no_folder(model, folder))
    if variant:
        from bitroute.convert.variants import plain_folder

        folder = plain_folder(model, folder, variant)
    index = read_index(folder)
    return Pipeline(folder, model, index, allow_pickle=allow_pickle, dequantize=dequantize, variant=variant)


def _open_hub(
    model: str, repo: str, revision: str | None, variant: str | None, access: Access, allow_pickle: bool,
    dequantize: Dequantize,
) -> Pipeline:  # fmt: skip
    from bitroute.convert import download

    source = download.find_source(repo, revision, variant, cached=access == "cache")
    if access != "outline" or not source.missing:
        folder = download.download(source)
        return Pipeline(folder, model, read_index(folder), source, False, allow_pickle, dequantize)
    if allow_pickle and any(name.endswith(".bin") for name in source.names):
        mend = f"hf download {repo} --revision {source.commit}, then run it again"
        raise SourceError(Problem("pickled weights cannot be planned before they are here", model, next_step=mend))
    folder = download.outline(source)
    pipeline = Pipeline(folder, model, read_index(folder), source, True, allow_pickle, dequantize)
    download.forget_with(source, folder)  # which every copy of the pipeline holds
    return pipeline


def folder_name(folder: Path) -> str:
    """What people call the model in a folder; the Hub's cache calls it by its commit."""
    repository = folder.parent.parent.name
    in_cache = folder.parent.name == "snapshots" and repository.startswith("models--")
    return repository.rpartition("--")[2] if in_cache else folder.name


def read_index(folder: Path) -> dict[str, Any]:
    """The parts of a pipeline, or the one of a bare model; raises SourceError where there is neither."""
    names = file_names(folder)
    if INDEX not in names:
        bare = bare_index(read_json(folder / CONFIG)) if CONFIG in names else None
        if bare is None:
            raise SourceError(_no_model(folder, f"a {CONFIG} that names no class" if CONFIG in names else ""))
        return bare
    index = read_json(folder / INDEX)
    for name in index:
        if not is_plain_name(name):
            what = "a part outside the pipeline folder"
            raise SourceError(_outside(folder / INDEX, what, name, "plain folder names"))
    return index


def _no_model(folder: Path, got: str) -> Problem:
    return Problem(
        "not a diffusers pipeline folder", str(folder), got=f"no {INDEX}" + (f", and {got}" if got else ""),
        expected=f"{INDEX}, or weights and a {CONFIG} with the `_class_name` or the `architectures` of one component",
    )  # fmt: skip


def _not_here(model: str, what: str, place: Path) -> Problem:
    kind = "folder" if place.is_dir() else "file"
    return Problem(
        f"a local {kind} has no `{what}`", model, got=f"a {kind}, which wins over the Hub",
        next_step=f"leave it out, or rename the {kind} to mean the model on the Hub",
    )  # fmt: skip


def _no_single_file(model: str) -> Problem:
    mend = "leave --config (`config:` in the recipe) out"
    return Problem("only a single file has a config beside it", model, got="no file of that name", next_step=mend)


def _no_folder(model: str, folder: Path) -> Problem:
    if model.startswith(BUILTIN):
        got, mend = "no bundled model of that name", "builtin:tiny-flux is the bundled one"
    else:
        beside = [path.parent.name for path in folder.parent.glob(f"*/{INDEX}")]
        got, mend = "no folder of that name", did_you_mean(folder.name, beside)
    expected = "a diffusers pipeline folder, a single file, owner/name on the Hub, or builtin:tiny-flux"
    return Problem("no such model folder", model, got, expected, mend)


def _builtin(model: str) -> Path:
    from importlib.resources import files

    folder = Path(str(files("bitroute.recipes"))) / model.removeprefix(BUILTIN)
    return folder if (folder / INDEX).is_file() else Path(model)
