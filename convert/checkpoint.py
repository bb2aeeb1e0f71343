"""The read side: the components of a pipeline folder, and the tensors of a component, one block at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitroute.convert.layout import Header, StoredTensor, read_header
from bitroute.convert.reading import read_json
from bitroute.errors import Problem, SourceError, did_you_mean

BUILTIN = "builtin:"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True)
class Component:
    """One folder of a pipeline that holds a model: its class, and its weights by name."""

    name: str
    library: str  # diffusers or transformers
    class_name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @property
    def stem(self) -> str:
        return STEMS[self.library]

    @cached_property
    def headers(self) -> dict[Path, Header]:
        return {file: read_header(file) for file in self._files()}

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
        return found

    def _files(self) -> list[Path]:
        index = self.folder / f"{self.stem}.safetensors.index.json"
        single = self.folder / f"{self.stem}.safetensors"
        if index.exists():
            return self._shards(index)
        if single.exists():
            return [single]
        others = sorted(p.name for p in self.folder.iterdir() if p.suffix in {".safetensors", ".bin", ".ckpt", ".pt"})
        raise SourceError(
            Problem(
                f"component {self.name!r} has no weights in safetensors", str(self.folder),
                got=", ".join(others) or "no weight file",
                expected=f"{single.name} or {index.name}",
                next_step="pickle files are not read, they can run code: save the model as safetensors first"
                if any(name.endswith((".bin", ".ckpt", ".pt")) for name in others)
                else "rename or save the variant you want under the plain name",
            )
        )  # fmt: skip

    def _shards(self, index: Path) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(Problem("the index has no weight_map", str(index)))
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise SourceError(
                    Problem("the index names a file outside its folder", str(index), got=name,
                            expected="plain file names")
                )  # fmt: skip
            if not (self.folder / name).is_file():
                raise SourceError(
                    Problem(f"shard {name!r} is missing", str(index), next_step="download the model again")
                )
        return [self.folder / name for name in names]


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline folder."""

    folder: Path
    name: str  # as the user wrote it
    index: dict[str, Any]

    @cached_property
    def components(self) -> dict[str, Component]:
        """The parts that hold weights; tokenizers and schedulers are files to copy."""
        found = {}
        for name, entry in self.index.items():
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
                continue
            library, class_name = entry
            if library in STEMS and (self.folder / name / "config.json").is_file():
                found[name] = Component(name, library, class_name, self.folder / name)
        return found

    @property
    def wanted(self) -> list[str]:
        """Every part that the pipeline's index names; optional parts that it leaves out are [null, null]."""
        return [name for name, entry in self.index.items() if isinstance(entry, list) and any(entry)]

    @property
    def parts(self) -> list[str]:
        """Every folder that the pipeline's index names and that is there."""
        return [name for name in self.wanted if (self.folder / name).is_dir()]


def open_pipeline(model: str) -> Pipeline:
    """A local pipeline folder, or `builtin:NAME`.

    Raises:
        SourceError: there is no such folder, or it is not a pipeline folder.
    """
    try:
        folder = _builtin(model) if model.startswith(BUILTIN) else Path(model).expanduser()
        if not model or not folder.is_dir():
            raise SourceError(_no_folder(model, folder))
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, no permission
        raise SourceError(Problem("not a usable model path", model[:100], got=str(error)[:200])) from error
    if not (folder / "model_index.json").is_file():
        raise SourceError(
            Problem(
                "not a diffusers pipeline folder", str(folder), got="no model_index.json",
                next_step="give the folder that holds model_index.json, not one of its components",
            )
        )  # fmt: skip
    index = read_json(folder / "model_index.json")
    for name in index:
        if Path(name).name != name or name in ("", ".."):
            raise SourceError(
                Problem("the index names a part outside the pipeline folder", str(folder / "model_index.json"),
                        got=name, expected="plain folder names")
            )  # fmt: skip
    return Pipeline(folder, model, index)


def _no_folder(model: str, folder: Path) -> Problem:
    owner, slash, name = model.partition("/")
    if folder.exists():
        got, mend = "a file", "give the diffusers folder (with model_index.json): single files are not read"
    elif model.startswith(BUILTIN):
        got, mend = "no bundled model of that name", "builtin:tiny-flux is the bundled one"
    elif slash and owner.strip(".~") and "/" not in name:
        got = "no folder of that name; perhaps a Hub id"
        mend = f"download it: hf download {model} --local-dir {name}, then give --model {name}"
    else:
        beside = [path.parent.name for path in folder.parent.glob("*/model_index.json")]
        got, mend = "no folder of that name", did_you_mean(folder.name, beside)
    expected = "a diffusers pipeline folder, or builtin:tiny-flux"
    return Problem("no such model folder", model, got, expected, mend)


def _builtin(model: str) -> Path:
    from importlib.resources import files

    folder = Path(str(files("bitroute.recipes"))) / model.removeprefix(BUILTIN)
    return folder if (folder / "model_index.json").is_file() else Path(model)
