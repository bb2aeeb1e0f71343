"""How a component's tensors and its `quantization_config` are stored: four containers and a plain folder.

Each container only merges what the formats' own records say. Layouts: torchao 0.18 safetensors support,
bitsandbytes 0.50 quant_state, optimum-quanto 0.2.7, as diffusers 0.42 and transformers 5.23 read them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from bitroute.convert.entry import Entry
from bitroute.convert.fold import fold_by

FORMAT_VERSION = 1


class Container(ABC):
    """Names tensors, writes shard metadata and the component's `quantization_config`."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # what loading needs beside torch and the component's own library
    device: ClassVar[str] = ""  # what loading needs of the machine
    mixes: ClassVar[bool] = True  # whether layers may have different formats of its family

    def names(self, entry: Entry) -> dict[str, str]:
        """Output suffix → stored tensor name."""
        if not entry.quantized:
            return {"weight": entry.name}
        assert entry.record is not None, "the plan gives such layers to the bitroute container"
        return {suffix: f"{entry.layer}.{name}" for suffix, name in entry.record.names.items()}

    def metadata(self, shard: Sequence[Entry], component: Sequence[Entry]) -> dict[str, str]:
        """The `__metadata__` of a shard's header."""
        return {"format": "pt"}

    @abstractmethod
    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The component's quantization_config; empty where nothing is quantized."""

    @classmethod
    def cannot(cls, entries: Sequence[Entry], library: str) -> str:
        """Why these layers cannot be stored so, or an empty string."""
        return ""


class Plain(Container):
    name, packages = "plain", ()

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {}


class Torchao(Container):
    """Mixed per layer; every shard's metadata lists all names, because readers believe the last shard they see.

    FqnToConfig leaves out the few layers for which torchao has a tensor but no config (an empty record).
    """

    name, packages = "torchao", ("torchao",)

    def metadata(self, shard: Sequence[Entry], component: Sequence[Entry]) -> dict[str, str]:
        records = {entry.name: _torchao_header(entry) for entry in component}
        return {"format": "pt", "tensor_names": json.dumps(list(records)), **records}

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        configs = {entry.layer: json.dumps(_record_config(entry)) for entry in entries if entry.quantized}
        configs = {layer: config for layer, config in configs.items() if config != "{}"}
        layers = {f"re:{fold.regex}": json.loads(config) for config, fold in fold_by(configs)}
        quant_type = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": layers}}
        return {"quant_method": "torchao", "quant_type": {"default": quant_type}}


class Bitsandbytes(Container):
    """4-bit or 8-bit; the layers that stay are listed, and the readers match that list by loose rules."""

    name, packages = "bitsandbytes", ("bitsandbytes",)
    device = "a GPU that bitsandbytes supports (its loaders refuse to start without one)"

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        configs = [_record_config(entry) for entry in entries if entry.quantized]
        return {"quant_method": "bitsandbytes", **configs[0], "llm_int8_skip_modules": _kept(entries)}

    @classmethod
    def cannot(cls, entries: Sequence[Entry], library: str) -> str:
        quantized = [entry.layer for entry in entries if entry.quantized]
        for kept in _kept(entries):
            caught = [layer for layer in quantized if _skips(kept, layer, library)]
            if caught:
                return f"its loader cannot keep {kept!r} without keeping {caught[0]!r}: it matches parts of names"
        return ""


class Quanto(Container):
    """One type per component; diffusers only, and diffusers 1.0 drops it."""

    name, packages, mixes = "quanto", ("optimum-quanto",), False

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        config = next(_record_config(entry) for entry in entries if entry.quantized)
        return {
            "quant_method": "quanto",
            **config,
            "modules_to_not_convert": sorted(_last_parts(_kept(entries))),
        }

    @classmethod
    def cannot(cls, entries: Sequence[Entry], library: str) -> str:
        if library != "diffusers":
            return f"{library} does not load quanto weights"
        if len({json.dumps(_record_config(entry)) for entry in entries if entry.quantized}) > 1:
            return "a quanto folder holds one type for all layers"
        both = _last_parts(_kept(entries)) & _last_parts(entry.layer for entry in entries if entry.quantized)
        if both:
            name = sorted(both)[0]
            return f"its loader knows layers by their last name only, and {name!r} is both kept and quantized"
        return ""


class Bitroute(Container):
    """Any mix; loading needs `import bitroute` beforehand."""

    name, packages = "bitroute", ("bitroute",)

    def names(self, entry: Entry) -> dict[str, str]:
        if not entry.quantized:
            return {"weight": entry.name}
        return {suffix: f"{entry.layer}.{suffix}" for suffix in entry.outputs}

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        groups: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            if entry.quantized:
                key = (entry.backend.name, json.dumps(entry.backend.options))
                groups.setdefault(key, []).append(entry.layer)
        return {
            "quant_method": "bitroute",
            "format_version": FORMAT_VERSION,
            "compute_dtype": "bfloat16",
            "groups": [
                {"backend": backend, "options": json.loads(options), "layers": layers}
                for (backend, options), layers in groups.items()
            ],
        }


NATIVE: Mapping[str, type[Container]] = {
    "torchao": Torchao,
    "bitsandbytes_4bit": Bitsandbytes,
    "bitsandbytes_8bit": Bitsandbytes,
    "quanto": Quanto,
}


def choose(entries: Sequence[Entry], library: str, wish: str) -> tuple[Container, str]:
    """The container for a component and, where it is not the native one, why.

    `wish` is the recipe's auto, native or bitroute. A native wish that cannot be met returns the bitroute
    container with the reason; the plan refuses it.
    """
    quantized = [entry for entry in entries if entry.quantized]
    if not quantized:
        return Plain(), ""
    if wish == "bitroute":
        return Bitroute(), ""
    convolutions = [entry.layer for entry in quantized if entry.kind != "Linear"]
    if convolutions:
        return Bitroute(), f"no library runs weight-only convolutions such as {convolutions[0]!r}"
    families = sorted({entry.backend.family for entry in quantized})
    if len(families) > 1:
        return Bitroute(), f"it mixes the families {', '.join(families)}"
    nameless = sorted({str(entry.backend) for entry in quantized if entry.record is None})
    if nameless or families[0] not in NATIVE:
        return Bitroute(), f"no library runs {', '.join(nameless or families)} weights as they are stored"
    native = NATIVE[families[0]]
    reason = native.cannot(entries, library)
    return (Bitroute(), reason) if reason else (native(), "")


def _record_config(entry: Entry) -> dict[str, Any]:
    assert entry.record is not None
    return dict(entry.record.config)


def _torchao_header(entry: Entry) -> str:
    if not entry.quantized:
        return json.dumps({"_type": "Tensor"})
    assert entry.record is not None
    return json.dumps(entry.record.header)


def _kept(entries: Iterable[Entry]) -> list[str]:
    return [entry.layer for entry in entries if entry.kind == "Linear" and not entry.quantized]


def _last_parts(layers: Iterable[str]) -> set[str]:
    return {layer.rpartition(".")[2] for layer in layers}


def _skips(key: str, layer: str, library: str) -> bool:
    """Whether a skip-list entry `key` makes a bitsandbytes loader skip `layer`.

    Sources: diffusers/quantizers/bitsandbytes/utils.py, transformers/quantizers/quantizers_utils.py.
    """
    if library == "transformers":
        return layer.endswith(key) or layer.startswith(f"{key}.")
    return layer.rpartition(".")[2] == key or f"{key}." in layer or key == layer
