"""LoRA files fused into the weights before they are quantized: W + scale · Δ, rounded once to the dtype of W.

diffusers and peft read the files, with all their spellings, into the model's class, without its weights; what peft
would add to each weight (Δ = alpha / rank · B A and its relatives) is added here when the weight is read.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitroute.backends.load import Rename
from bitroute.convert.architecture import build_model
from bitroute.convert.checkpoint import Component, Pipeline
from bitroute.convert.document import printable, shown
from bitroute.convert.files import sha256
from bitroute.convert.layout import DerivedTensor, StoredTensor, read_header
from bitroute.errors import Problem, SourceError

__all__ = ["Lora", "LoraFile", "with_loras"]

ADAPTER = "bitroute"
MAX_TENSORS = 10_000  # the largest have two thirds of it; the loaders' time grows with their square
LIMIT_BYTES = 4 * 10**9  # a LoRA is held in memory; larger ones are whole models
SECOND = "transformer_2"  # diffusers loads there only when it is asked to


@dataclass(frozen=True)
class LoraFile:
    """What a recipe asks for. name: as the recipe writes it; into: where its transformer layers go, if said."""

    file: Path
    name: str
    scale: float
    into: str | None = None
    sha256: str = ""  # that it must have, if said

    @classmethod
    def recorded(cls, content: Mapping[str, Any]) -> LoraFile:
        """As a checkpoint's record names it; seen from where the command runs."""
        name = str(content["path"])
        return cls(Path(name).expanduser(), name, float(content["scale"]), content["into"], content["sha256"])

    @property
    def words(self) -> str:
        return f"LoRA {shown(self.name)} × {self.scale:g}"

    def problem(self, what: str, **more: str) -> SourceError:
        return SourceError(Problem(f"the LoRA {shown(self.name)} {what}", str(self.file), **more))


@dataclass(frozen=True)
class Lora:
    """layers: component → layer → peft's module for it; changed: the weights that came out otherwise when read."""

    source: LoraFile
    sha256: str
    layers: Mapping[str, Mapping[str, Any]]
    changed: set[tuple[str, str]] = field(default_factory=set, compare=False)

    def note(self, component: str) -> str:
        return f"{self.source.words} is fused into {len(self.layers[component])} layers first"

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        source = self.source
        return {"path": source.name, "sha256": self.sha256, "scale": source.scale, "into": source.into}


def with_loras(pipeline: Pipeline, wanted: Sequence[LoraFile]) -> Pipeline:
    """The pipeline as it would be with these LoRAs fused; their files are read here, the weights when they are needed.

    Raises:
        SourceError: a file is no LoRA of this pipeline, holds what cannot be fused, or changes nothing.
    """
    if not wanted:
        return pipeline
    loras, problems = list[Lora](), list[Problem]()
    for lora in wanted:
        try:
            loras.append(_read(pipeline, lora))
        except SourceError as error:
            problems += error.problems
    if problems:
        raise SourceError(problems)
    names = dict.fromkeys(name for lora in loras for name in lora.layers)
    views = {name: (_view(pipeline.components[name], loras),) for name in names}
    return replace(pipeline, loras=tuple(loras), views=views)


def _read(pipeline: Pipeline, lora: LoraFile) -> Lora:
    _check_file(lora)
    digest = sha256(lora.file)
    if lora.sha256 not in ("", digest):
        raise lora.problem("is another file than the one that was fused", got=digest, expected=lora.sha256)
    models = _load(pipeline, lora)
    layers = {name: found for name, model in models.items() if (found := _layers(model, lora))}
    if not layers:
        first = shown(next(iter(read_header(lora.file).tensors), ""))
        raise lora.problem(
            "has no layer of this pipeline", got=f"names such as {first}",
            expected=f"layers of {', '.join(models)}, as {pipeline.index.get('_class_name')} reads them",
            next_step="take one of this family; `into: transformer_2` puts there what is named `transformer`",
        )  # fmt: skip
    if not any(_moves(module) for found in layers.values() for module in found.values()):
        raise lora.problem("changes nothing", got="updates that are zero everywhere", next_step="leave it out")
    return Lora(lora, digest, layers)


def _check_file(lora: LoraFile) -> None:
    if not lora.scale:
        raise lora.problem("changes nothing", got="scale 0", next_step="leave it out")
    if not lora.file.is_file():
        raise lora.problem("is not there", expected="a *.safetensors file, relative to the recipe")
    header = read_header(lora.file)
    size_bytes = sum(tensor.spec.size_bytes for tensor in header.tensors.values())
    if size_bytes > LIMIT_BYTES:
        raise lora.problem("is too large", got=f"{size_bytes / 1e9:.1f} GB", expected=f"at most {LIMIT_BYTES / 1e9} GB")
    if len(header.tensors) > MAX_TENSORS:
        raise lora.problem("has too many tensors", got=f"{len(header.tensors)}", expected=f"at most {MAX_TENSORS}")
    _check_patterns(lora, header.metadata.get("lora_adapter_metadata", "{}"))
    unable = [name for name in header.tensors if "dora_scale" in name or "lora_magnitude_vector" in name]
    if unable:
        raise lora.problem(
            "is a DoRA, which is not fused", got=unable[0],
            next_step="fuse it with diffusers (load_lora_weights, fuse_lora, save_pretrained) and convert the result",
        )  # fmt: skip


def _check_patterns(lora: LoraFile, metadata: str) -> None:
    """peft runs what names layers there as regular expressions; some of these take for ever."""
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise lora.problem("has metadata that is not JSON", got=str(error)[:200]) from error
    texts = [
        text for key, value in (content.items() if isinstance(content, dict) else ())
        if key.endswith(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"))
        for text in ([value] if isinstance(value, str) else value if isinstance(value, list | dict) else ())
    ]  # fmt: skip
    unsafe = [text for text in texts if not isinstance(text, str) or set(text) & set("*+{?|(")]
    if unsafe:
        raise lora.problem("names its layers by a regular expression", got=shown(unsafe[0]), expected="plain names")


def _load(pipeline: Pipeline, lora: LoraFile) -> dict[str, nn.Module]:
    """Component → its class without weights and with the LoRA's layers, by the loader of the pipeline's own class."""
    import diffusers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pipeline_class = getattr(diffusers, str(pipeline.index.get("_class_name")), None)
    loadable = getattr(pipeline_class, "_lora_loadable_modules", ())
    models = {name: _hollow(pipeline.components[name]) for name in loadable if name in pipeline.components}
    if pipeline_class is None or not models:
        raise lora.problem("does not suit the pipeline", got=f"{pipeline.index.get('_class_name')} loads no LoRA")
    if lora.into is not None and lora.into not in models:
        expected = f"one of {', '.join(models)}"
        raise lora.problem("cannot go there", got=f"component {shown(lora.into)}", expected=expected)
    choice = {"load_into_transformer_2": True} if lora.into == SECOND else {}
    with _warnings() as warned:
        try:
            parts = inspect.signature(pipeline_class.__init__).parameters
            pipe = pipeline_class(**{name: models.get(name) for name in parts if name != "self"})
            warned.clear()
            given = _what_it_reads(pipe)
            pipe.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name, adapter_name=ADAPTER, **choice)
        except ImportError as error:
            raise lora.problem("needs peft to be read", next_step="pip install peft") from error
        except Exception as error:  # the loaders raise whatever they like on what is not theirs
            mend = f"take one of this family: {pipeline_class.__name__}.load_lora_weights refuses this one too"
            got = f"{type(error).__name__}: {error}"[:500]
            raise lora.problem("cannot be read", got=got, next_step=mend) from error
    unused = [line for line in warned if "No LoRA keys" not in line]
    if unused:
        raise lora.problem("does not fit the pipeline", got=unused[0][:500], expected="layers that the model has")
    dropped = [name for name, tensor in given.items() if not _is_taken(name, tensor, given, models)]
    if dropped:
        raise lora.problem(
            "holds what diffusers would leave out", got=printable(", ".join(dropped[:5])[:500]),
            expected=f"updates of layers of {', '.join(models)}, with the alpha that their rank says",
            next_step="take these tensors out of the file to fuse the rest",
        )  # fmt: skip
    other = [name for name, tensor in given.items() if _is_padded(name, tensor, models)]
    if other:
        got = f"{other[0]} {list(given[other[0]].shape)}"
        raise lora.problem("is of a model with other widths", got=printable(got[:500]), expected="widths of this model")
    return models


def _is_padded(name: str, tensor: Tensor, models: Mapping[str, nn.Module]) -> bool:
    """diffusers fills updates of fewer inputs up with zeros, so that those of another model load too."""
    component, _, layer = name.removesuffix(".lora_A.weight").partition(".")
    if not name.endswith(".lora_A.weight") or component not in models:
        return False
    try:
        module = models[component].get_submodule(layer)
    except AttributeError:
        return False  # a name that peft spells otherwise
    return tensor.shape[1] != getattr(module, "in_features", getattr(module, "in_channels", tensor.shape[1]))


def _what_it_reads(pipe: Any) -> dict[str, Tensor]:
    """Filled when the pipeline reads a file: its tensors under the names that diffusers gives them."""
    given: dict[str, Tensor] = {}
    read = pipe.lora_state_dict

    def remember(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        given.update(found[0] if isinstance(found, tuple) else found)
        return found

    pipe.lora_state_dict = remember
    return given


def _is_taken(name: str, tensor: Tensor, given: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> bool:
    """diffusers passes over what belongs to no model, what is no LoRA, and an alpha that it has not read by now."""
    if name.partition(".")[0] not in models:
        return False
    layer = name.removesuffix(".alpha")
    if layer == name:
        return "lora" in name or "lokr_" in name
    down = given.get(f"{layer}.lora_A.weight", given.get(f"{layer}.lora.down.weight"))
    return down is not None and tensor.numel() == 1 and tensor.item() == len(down)


def _hollow(component: Component) -> nn.Module:
    """The class with weights that take no memory; on the meta device peft would lose the LoRA."""
    model = build_model(component)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            empty = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(empty, requires_grad=False) if is_parameter else empty)
    return model


@contextmanager
def _warnings() -> Any:
    """What diffusers would only log: keys that it left unused."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("diffusers")
    level, handlers = logger.level, logger.handlers
    logger.handlers = [Keep(logging.WARNING)]
    logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def _layers(model: nn.Module, lora: LoraFile) -> dict[str, Any]:
    """Layer → peft's module, with its parts in float32, so that Δ is not rounded before it is added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        parts = [part for kind in module.adapter_layer_names for part in _parameters(getattr(module, kind, {}))]
        if any(part.is_meta for part in parts):
            raise lora.problem("lacks a part", got=f"half of the update of layer {name!r}")
        for part in parts:
            part.data = part.data.float()
        if not all(part.isfinite().all() for part in (*parts, *_scalings(module))):
            raise lora.problem("is not finite", got=f"NaN, infinity or no number in the update of layer {name!r}")
        found[name] = module
    return found


def _parameters(holder: Any) -> Iterable[Tensor]:
    for part in holder.values() if hasattr(holder, "values") else ():
        yield from [part] if isinstance(part, Tensor) else part.parameters()


def _scalings(module: Any) -> Iterable[Tensor]:
    """alpha / rank; what is no number counts as NaN."""
    for scaling in module.scaling.values():
        tensor = torch.as_tensor(scaling, dtype=torch.float64)
        yield tensor if tensor.numel() == 1 else torch.tensor(torch.nan)


def _moves(module: Any) -> bool:
    return bool(module.get_delta_weight(ADAPTER).abs().amax() > 0)


def _view(component: Component, loras: Sequence[Lora]) -> Any:
    """Every weight that a LoRA touches becomes a tensor derived from it."""
    rename, expected = _naming(component)

    def fused(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        names, found = {rename(name, expected): name for name in tensors}, dict(tensors)
        for layer in dict.fromkeys(layer for lora in loras for layer in lora.layers.get(component.name, ())):
            for parameter, updates in _updates(component.name, layer, loras).items():
                name = names.get(f"{layer}.{parameter}", "")
                if name not in tensors:
                    what = f"layer {layer!r} of {component.name}, to which a LoRA is to be fused, has no {parameter}"
                    raise SourceError(Problem(what, str(component.folder), got=loras[0].source.name))
                stored = tensors[name]
                found[name] = DerivedTensor(
                    name, stored.spec, stored.file, stored.offset, (stored,), _Fusion((component.name, name), updates)
                )
        return found

    return fused


def _naming(component: Component) -> tuple[Rename, Mapping[str, object]]:
    """From what a file calls a tensor to what the class does: older transformers wrote other prefixes."""
    if component.library != "transformers":
        return lambda name, expected: name, {}
    from bitroute.backends._transformers import renaming

    model = build_model(component)
    return renaming(model), model.state_dict()


def _updates(component: str, layer: str, loras: Sequence[Lora]) -> dict[str, list[tuple[Lora, Any]]]:
    """Parameter → the LoRAs that change it, and how peft computes by what."""
    found: dict[str, list[tuple[Lora, Any]]] = {}
    for lora in loras:
        module = lora.layers.get(component, {}).get(layer)
        if module is not None:
            found.setdefault("weight", []).append((lora, lambda module=module: module.get_delta_weight(ADAPTER)))
            bias = getattr(module, "lora_bias", {}).get(ADAPTER)
            if bias:
                found.setdefault("bias", []).append(
                    (lora, lambda module=module: module.lora_B[ADAPTER].bias * module.scaling[ADAPTER])
                )
    return found


@dataclass(frozen=True)
class _Fusion:
    key: tuple[str, str]
    updates: Sequence[tuple[Lora, Any]]

    def __call__(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            total = weight.float()
            for lora, delta in self.updates:
                total = total + lora.source.scale * delta().reshape(weight.shape)
            fused = total.to(weight.dtype)
        if not torch.equal(fused, weight):
            for lora, _ in self.updates:
                lora.changed.add(self.key)
        return fused
