"""This machine and the formats: what is installed, what can be stored and computed here."""

from __future__ import annotations

import dataclasses
import inspect
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args, get_origin, get_type_hints

import psutil
import torch

from bitroute import backends
from bitroute.backends import _compiled
from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.describe import LIBRARIES
from bitroute.errors import BackendError

PROBE = TensorSpec((3072, 3072), torch.bfloat16)


def list_formats() -> dict[str, str]:
    """Backend name → its bits and first line, or why it cannot be imported."""
    return {name: _one_line(name) for name in backends.available()}


def describe_backend(name: str) -> dict[str, Any]:
    """Options with their choices, bits per weight of a 3072×3072 layer, container, and the module's own words.

    Raises:
        BackendError: no such backend, or its library is missing.
    """
    found = backends.find(name)
    backend = backends.create(name)
    described: dict[str, Any] = {
        "name": name,
        "options": option_choices(found),
        "bits_per_weight": round(bits_per_weight(backend), 3),
        "container": container_words(backend),
        "computes_on": backend.gpu_to_compute() or "any device",
        "needs": sorted(found.needs),
    }
    lines = [f"{key}: {value}" for key, value in described.items() if key not in ("options", "name")]
    lines += [f"option {option}: {words}" for option, words in described["options"].items()]
    return {**described, "text": "\n".join([name, documentation(found), "", *lines])}


def option_choices(backend: type[Backend]) -> dict[str, str]:
    """Option → its values and its default."""
    hints = get_type_hints(backend)
    return {
        option.name: f"{_choices(hints[option.name])} (default {_shown(option.default)})"
        for option in dataclasses.fields(backend)
    }


def documentation(backend: type[Backend]) -> str:
    return inspect.getdoc(inspect.getmodule(backend)) or ""


def bits_per_weight(backend: Backend) -> float:
    return 8 * sum(spec.size_bytes for spec in backend.outputs(PROBE).values()) / PROBE.numel


def container_words(backend: Backend) -> str:
    if backend.name == "keep":
        return "any"
    if backend.record(PROBE) is None:
        return "bitroute"
    return backend.family.partition("_")[0]


def diagnose() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "libraries": {library: _version(library) for library in ("bitroute", *LIBRARIES)},
        "devices": _devices(),
        "memory_bytes": {"total": memory.total, "available": memory.available},
        "rounding": _compiled.described(),
        "formats": {name: _here(name) for name in backends.available()},
    }


def diagnosis_text(found: dict[str, Any]) -> str:
    memory = found["memory_bytes"]
    lines = [f"python {found['python']}"]
    lines += [f"{library:<15} {number}" for library, number in found["libraries"].items()]
    lines += ["", *(f"device: {device}" for device in found["devices"])]
    lines += [f"memory: {memory['available'] / 1e9:.1f} GB free of {memory['total'] / 1e9:.1f} GB"]
    lines += [f"rounding: {found['rounding']}", ""]
    return "\n".join([*lines, *(f"{name:<15} {words}" for name, words in found["formats"].items())])


def _one_line(name: str) -> str:
    try:
        backend = backends.create(name)
    except BackendError as error:
        return str(error.problems[0])
    words = documentation(type(backend)).partition("\n")[0]
    return f"{bits_per_weight(backend):6.3f} bits  {words}"


def _here(name: str) -> str:
    """Whether this machine writes, loads and computes the format."""
    try:
        backend = backends.create(name)
    except BackendError as error:
        return f"cannot be written: {error.problems[0].what}"
    container = container_words(backend)
    loads = f"loads from {'any' if container == 'any' else 'a ' + container} folder"
    if backend.family.startswith("bitsandbytes") and not torch.cuda.is_available():
        loads += " on a machine with a GPU"
    return f"can be written · {loads} · computes on {backend.gpu_to_compute() or 'any device'}"


def _devices() -> list[str]:
    found = [f"cpu: {platform.processor() or platform.machine()}, {psutil.cpu_count()} threads"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB, compute capability {gpu.major}.{gpu.minor}"
        )
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU (has no float8 dtype)")
    return found


def _choices(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(_shown(choice) for choice in get_args(hint))
    return "true | false" if hint is bool else getattr(hint, "__name__", str(hint))


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
