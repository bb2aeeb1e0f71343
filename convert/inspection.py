"""What a safetensors file or a checkpoint folder holds, from its headers and configs alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitroute.backends.base import CODES
from bitroute.convert.bare import CONFIG, INDEX, bare_index
from bitroute.convert.checkpoint import BUILTIN, file_names, open_pipeline
from bitroute.convert.layout import Header, read_header
from bitroute.convert.reading import read_json
from bitroute.errors import Problem, SourceError, printable


def inspect(path: str | Path, variant: str | None = None) -> dict[str, Any]:
    """A description of a .safetensors file, a component folder or a pipeline folder; sizes in bytes.

    variant: only these weights of a folder, and the plain ones of parts that have no such.

    Raises:
        SourceError: there is nothing there that safetensors tools could read, or a folder cannot be read.
    """
    place = open_pipeline(str(path), variant=variant, access="cache").folder if variant else _place(str(path))
    if place.is_file():
        header = read_header(place)
        return {"file": str(place), **_contents({place: header}), "tensors": _tensors(header)}
    if not place.is_dir():
        raise SourceError(
            Problem("no such file or folder", str(path), next_step="give a .safetensors file or a folder")
        )
    folders = [place, *(place / name for name in file_names(place) if os.path.isdir(place / name))]
    components = {_name(folder, place): _component(folder) for folder in folders if _weights(folder)}
    if not components:
        raise SourceError(Problem("no safetensors file in this folder or right below it", str(path)))
    origin = read_json(place / "bitroute.json") if (place / "bitroute.json").is_file() else None
    said = str(path if variant else place)
    return {"folder": said, "components": components, "made_by": _origin(origin) if origin else None}


def _place(path: str) -> Path:
    if path.startswith(BUILTIN):
        return open_pipeline(path).folder
    try:
        place = Path(path).expanduser()
        place.exists()
        return place
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user
        raise SourceError(Problem("not a usable path", path[:100], got=str(error)[:200])) from error


def _name(folder: Path, place: Path) -> str:
    """What recipes call it; of a folder below `place` its name."""
    bare = folder == place and INDEX not in file_names(place) and (place / CONFIG).is_file()
    index = bare_index(read_json(place / CONFIG)) if bare else None
    return next(iter(index)) if index else folder.name


def _weights(folder: Path) -> list[Path]:
    return [folder / name for name in file_names(folder) if name.endswith(".safetensors")]


def _component(folder: Path) -> dict[str, Any]:
    headers = {file: read_header(file) for file in _weights(folder)}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = _mapping(config.get("quantization_config"))
    name = config.get("_class_name") or config.get("architectures") or "unknown class"
    layers = _mapping(_mapping(quantization.get("bitroute")).get("layers"))
    return {
        "class": ", ".join(map(str, name)) if isinstance(name, list) else str(name),
        "quant_method": quantization.get("quant_method"),
        "layers": {key: names for key, names in layers.items() if isinstance(names, list)} or None,
        **_contents(headers),
    }


def _contents(headers: Mapping[Path, Header]) -> dict[str, Any]:
    size_bytes: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    unaligned = 0
    for header in headers.values():
        for tensor in header.tensors.values():
            size_bytes[CODES[tensor.spec.dtype]] += tensor.spec.size_bytes
            tensors[CODES[tensor.spec.dtype]] += 1
            unaligned += tensor.spec.dtype == torch.int8 and tensor.offset % 16 != 0
    return {
        "files": [file.name for file in headers],
        "size_bytes": sum(size_bytes.values()),
        "dtypes": {code: {"tensors": tensors[code], "size_bytes": size_bytes[code]} for code in tensors},
        "unaligned_tensors": unaligned,
        "metadata_keys": sorted({key for header in headers.values() for key in header.metadata})[:5],
    }


def _tensors(header: Header) -> dict[str, Any]:
    return {
        name: {"dtype": CODES[tensor.spec.dtype], "shape": list(tensor.spec.shape), "offset": tensor.offset}
        for name, tensor in header.tensors.items()
    }


def _origin(content: Mapping[str, Any]) -> dict[str, Any]:
    origin = {key: content.get(key) for key in ("bitroute", "libraries", "recipe")}
    return {**origin, "source": _mapping(content.get("source"))}


def _mapping(value: object) -> dict[str, Any]:
    """Other tools write configs too."""
    return value if isinstance(value, dict) else {}


def inspection_text(found: Mapping[str, Any]) -> str:
    if "file" in found:
        tensors = [f"  {name}  {t['dtype']} {t['shape']}" for name, t in found["tensors"].items()]
        return "\n".join(map(printable, [found["file"], *_contents_lines(found), *tensors]))
    lines = [found["folder"]]
    if found["made_by"]:
        made_by = found["made_by"]
        lines.append(f"made by bitroute {made_by['bitroute']} from {made_by['source'].get('model')}")
    for name, component in found["components"].items():
        method = component["quant_method"] or "not quantized"
        lines.append(f"{name}: {component['class']}, {method}")
        lines += _contents_lines(component)
        for backend, layers in (component["layers"] or {}).items():
            lines.append(f"  {backend}: {', '.join(map(str, layers[:6]))}{' …' if len(layers) > 6 else ''}")
    return "\n".join(map(printable, lines))


def _contents_lines(contents: Mapping[str, Any]) -> list[str]:
    dtypes = ", ".join(
        f"{code} {held['tensors']} tensors {held['size_bytes'] / 1e6:.2f} MB"
        for code, held in contents["dtypes"].items()
    )
    lines = [f"  {len(contents['files'])} files, {contents['size_bytes'] / 1e6:.2f} MB: {dtypes}"]
    if contents["unaligned_tensors"]:
        lines.append(
            f"  {contents['unaligned_tensors']} int8 tensors are not 16-byte aligned: torch kernels may crash on them"
        )
    return lines
