"""`bitroute.json` read back: what a job said it would write into the folder around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bitroute import backends
from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.checkpoint import STEMS, Component
from bitroute.convert.layout import DTYPES
from bitroute.convert.lora import LoraFile
from bitroute.convert.reading import read_json
from bitroute.convert.schema import Dequantize
from bitroute.convert.seal import check_seal
from bitroute.convert.shards import VARIANT
from bitroute.errors import Problem, SourceError

WEIGHTED_DB = 5.0


@dataclass(frozen=True)
class RecordedEntry:
    """One source tensor and what was made of it."""

    name: str
    layer: str
    backend: Backend
    weight: TensorSpec
    tensors: dict[str, tuple[str, TensorSpec]]  # suffix → stored name and what it must be
    source_shape: tuple[int, ...] = ()  # of a convolution, which backends see as rows
    statistics: bool = False  # whether the rounding knew what the inputs are like

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> RecordedEntry:
        tensors = {
            suffix: (str(name), TensorSpec(tuple(shape), DTYPES[dtype]))
            for suffix, (name, dtype, shape) in entry["tensors"].items()
        }
        backend = backends.create(entry["backend"], **entry["options"])
        weight = TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        if tensors.keys() != backend.outputs(weight).keys():
            raise ValueError(f"tensors {sorted(tensors)} of a {backend.name} layer")
        shape = tuple(int(n) for n in entry.get("source_shape", weight.shape))
        if math.prod(shape) != weight.numel:
            raise ValueError(f"a weight {list(shape)} seen as {list(weight.shape)}")
        return cls(entry["name"], entry["layer"], backend, weight, tensors, shape, bool(entry.get("statistics")))

    @property
    def quantized(self) -> bool:
        return self.backend.name != "keep"

    @property
    def lowest_sqnr_db(self) -> float:
        """Below it a layer is not healthy; with statistics, weights that meet small inputs may err more."""
        return self.backend.lowest_sqnr_db - (WEIGHTED_DB if self.statistics else 0)


@dataclass(frozen=True)
class RecordedComponent:
    component: Component
    container: str
    size_bytes: int
    entries: list[RecordedEntry]

    @classmethod
    def parse(cls, folder: Path, name: str, content: Mapping[str, Any]) -> RecordedComponent:
        if content["library"] not in STEMS:
            raise ValueError(f"library {content['library']!r}")
        bare = content.get("place") == "."
        if bare and not (name.isidentifier() and str(content["class"]).isidentifier()):
            raise ValueError(f"class {content['class']!r}")  # both stand in the code that loads it
        place = folder if bare else folder / name
        variant = _word(content.get("variant"))
        component = Component(name, content["library"], str(content["class"]), place, bare=bare, variant=variant)
        entries = [RecordedEntry.parse(entry) for entry in content["entries"]]
        return cls(component, content["container"], int(content["size_bytes"]), entries)

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        stored = sum(spec.size_bytes for entry in self.entries for _, spec in entry.tensors.values())
        return 8 * stored / max(sum(entry.weight.numel for entry in self.entries), 1)


@dataclass(frozen=True)
class Record:
    model: str  # the source, as the user wrote it
    components: list[RecordedComponent]
    copied: dict[str, int]  # file → bytes
    files: list[str]  # every file but the record itself
    hashes: dict[str, str]  # file → SHA-256 in hexadecimal
    revision: str | None = None  # the commit of a source on the Hub
    variant: str | None = None
    dequantize: Dequantize = False  # how a quantized source was read
    config: str | None = None  # of a single file: the pipeline that it was read with
    loras: tuple[LoraFile, ...] = ()  # fused into the weights

    @property
    def bare(self) -> Component | None:
        """The one component of a model without a pipeline."""
        return next((recorded.component for recorded in self.components if recorded.component.bare), None)

    @property
    def size_bytes(self) -> int:
        """Of the components' tensors."""
        return sum(component.size_bytes for component in self.components)


def read_record(folder: Path) -> Record:
    """The record of a finished checkpoint.

    Raises:
        SourceError: the folder is not a finished checkpoint of bitroute, or its record was damaged.
        BackendError: it was written with a backend that is not installed here.
    """
    content = _content(folder)
    try:
        plan = content["plan"]
        components = [RecordedComponent.parse(folder, *item) for item in plan["components"].items()]
        copied = {str(name): int(size_bytes) for name, size_bytes in plan["copied"].items()}
        files = [str(name) for name in content["files"] if name != "bitroute.json"]
        hashes = {str(name): str(digest) for name, digest in content["sha256"].items()}
        source = {key: value for key, value in content["source"].items() if value is not None}
        revision, variant = source.get("revision"), source.get("variant")
        dequantize = source.get("dequantize", False)
        if dequantize not in get_args(Dequantize):
            raise ValueError(f"dequantize {dequantize!r}")
        config = source.get("config")
        loras = tuple(LoraFile.recorded(lora) for lora in source.get("loras", ()))
        return Record(
            str(source["model"]), components, copied, files, hashes, revision, variant, dequantize, config, loras
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            Problem(
                "not the record that a job writes", str(folder / "bitroute.json"),
                got=f"{type(error).__name__}: {error}", next_step="the file was changed: convert again",
            )
        ) from error  # fmt: skip


def _word(variant: object) -> str | None:
    """A variant stands in file names and in the code that loads it."""
    if variant is not None and not VARIANT.fullmatch(str(variant)):
        raise ValueError(f"variant {variant!r}")
    return None if variant is None else str(variant)


def _content(folder: Path) -> dict[str, Any]:
    file = folder / "bitroute.json"
    if not file.is_file():
        unfinished = (folder / "bitroute.json.part").is_file()
        raise SourceError(
            Problem(
                "not a finished checkpoint of bitroute", str(folder),
                got="an unfinished one: its job was interrupted" if unfinished else "no bitroute.json",
                next_step="run the same command with --resume to finish it, or with --overwrite to begin anew"
                if unfinished
                else "give the folder that a job wrote",
            )
        )  # fmt: skip
    content = read_json(file)
    if content.get("format_version") != 1:
        raise SourceError(
            Problem(
                "bitroute.json has another format", str(file), got=f"format_version {content.get('format_version')}",
                expected="1", next_step="pip install -U bitroute",
            )
        )  # fmt: skip
    check_seal(file, content)
    return content
