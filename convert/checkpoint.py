"""The read side: the components of a pipeline folder, and the tensors of a component, one block at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitroute.convert.layout import Header, StoredTensor, read_header
from bitroute.errors import Problem, SourceError, did_you_mean

BUILTIN = "builtin:"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
CONFIG_LIMIT_BYTES = 50_000_000


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
        others = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in {".safetensors", ".bin", ".ckpt", ".pt"}
        )
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
    def parts(self) -> list[str]:
        """Every folder that the pipeline's index names and that is there."""
        return [n for n, e in self.index.items() if isinstance(e, list) and (self.folder / n).is_dir()]


def open_pipeline(model: str) -> Pipeline:
    """A local pipeline folder, or `builtin:NAME`.

    Raises:
        SourceError: there is no such folder, or it is not a pipeline folder.
    """
    folder = _builtin(model) if model.startswith(BUILTIN) else Path(model).expanduser()
    if not folder.is_dir():
        raise SourceError(_no_folder(model, folder))
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


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of a tensor seen as [out, everything else]; a fresh copy.

    Raises:
        SourceError: the file ends early or cannot be read.
    """
    rows = tensor.spec.rows
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    buffer = bytearray((stop - start) * row_bytes)
    if not buffer:
        return torch.empty(stop - start, rows.shape[1], dtype=rows.dtype)
    read_into(tensor, start * row_bytes, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=rows.dtype).reshape(stop - start, rows.shape[1])


def read_tensor(tensor: StoredTensor) -> Tensor:
    """The whole tensor in its own shape; a fresh copy."""
    return read_rows(tensor, 0, tensor.spec.rows.shape[0]).reshape(tensor.spec.shape)


def read_into(tensor: StoredTensor, begin: int, buffer: memoryview) -> None:
    """Fills the buffer with the tensor's bytes from `begin` on; raises as `read_rows` does."""
    try:
        with open(tensor.file, "rb", buffering=0) as stream:
            stream.seek(tensor.offset + begin)
            while buffer:
                got = stream.readinto(buffer)
                if not got:
                    raise SourceError(_ends_early(tensor))
                buffer = buffer[got:]
    except OSError as error:
        raise SourceError(
            Problem(f"cannot read tensor {tensor.name!r}", str(tensor.file), got=str(error))
        ) from error


def _ends_early(tensor: StoredTensor) -> Problem:
    return Problem(
        f"the file ends inside tensor {tensor.name!r}", str(tensor.file),
        next_step="download or write this file again",
    )  # fmt: skip


def read_blocks(tensor: StoredTensor, bounds: Iterator[tuple[int, int]]) -> Iterator[Tensor]:
    for start, stop in bounds:
        yield read_rows(tensor, start, stop)


def read_json(file: Path) -> dict[str, Any]:
    """Raises SourceError that names the file when it is missing, huge, or not a JSON mapping."""
    try:
        if file.stat().st_size > CONFIG_LIMIT_BYTES:
            raise SourceError(Problem("a JSON file of that size is not a config", str(file)))
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(Problem("the file is missing", str(file))) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(Problem("cannot read the file as JSON", str(file), got=str(error))) from error
    if not isinstance(content, dict):
        raise SourceError(Problem("not a JSON mapping", str(file), got=type(content).__name__))
    return content


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
