"""A component as its class builds it, on the meta device: which layers there are, without a byte of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from bitroute.backends.layers import CONVOLUTIONS, is_convolution
from bitroute.convert.bare import CONFIG, INDEX
from bitroute.convert.checkpoint import Component
from bitroute.convert.document import shown
from bitroute.convert.layout import StoredTensor
from bitroute.errors import Problem, SourceError

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # may name a kernel to fetch from the Hub and run
CHOICES = {"quantization_config", *(f"{start}{name}" for name in IMPLEMENTATIONS for start in ("", "_"))}
BUFFERS_OF_OLD = (".position_ids", ".inv_freq")
CONVOLUTION_NAMES = {kind.__name__ for kind in CONVOLUTIONS}
MODULES_PER_TENSOR = 50  # a class has far fewer; a config that asks for more is not that of these weights


@dataclass(frozen=True)
class Architecture:
    """layers: layer → module class, for every module with a weight; sources: tensor name → where it is stored."""

    layers: dict[str, str]
    sources: dict[str, StoredTensor]

    @property
    def parameters(self) -> int:
        return sum(tensor.spec.numel for tensor in self.sources.values())

    @property
    def linear(self) -> list[str]:
        """Layers a quantizing backend can take: linear ones whose weight the checkpoint stores under their name."""
        return [name for name, kind in self.layers.items() if kind == "Linear" and f"{name}.weight" in self.sources]

    @property
    def convolutions(self) -> list[str]:
        """Those that some backends can take, where a rule asks for it."""
        found = [name for name, kind in self.layers.items() if kind in CONVOLUTION_NAMES]
        return [name for name in found if f"{name}.weight" in self.sources]

    @property
    def other(self) -> list[str]:
        linear = set(self.linear)
        return [name for name in self.layers if name not in linear]


def build(component: Component) -> Architecture:
    """The layers of a component, matched with the tensors of its checkpoint.

    Raises:
        SourceError: unknown class, a config the class refuses, a tensor missing or of another shape than the
            class wants, or weights that are already quantized. All mismatches at once.
    """
    _refuse_quantized(component)
    model = build_model(component)
    expected = model.state_dict()
    sources = _match(component, model, expected)
    problems = [*_mismatches(component, expected, sources, _tied(model))]
    unknown = [name for name in sources if name not in expected]
    ignored = [name for name in unknown if _ignored(model, name)]
    problems += [
        Problem(f"tensor {name!r} is none that {component.class_name} has", str(component.folder),
                next_step="config.json and the weights belong to different models")
        for name in unknown if name not in ignored
    ]  # fmt: skip
    if problems:
        raise SourceError(problems[:20])
    return Architecture(dict(_layers(model)), {n: s for n, s in sources.items() if n not in ignored})


def _mismatches(
    component: Component, expected: Mapping[str, Tensor], sources: Mapping[str, StoredTensor], tied: set[str]
) -> Iterator[Problem]:
    where, mend = str(component.folder), "config.json and the weights belong to different models"
    for name, wanted in expected.items():
        if name not in sources:
            if name not in tied:
                want = f"{component.class_name} wants it with shape {list(wanted.shape)}"
                yield Problem(f"the checkpoint lacks tensor {name!r}", where, expected=want, next_step=mend)
            continue
        stored = sources[name].spec
        if stored.shape != tuple(wanted.shape):
            what = f"tensor {name!r} has another shape than {component.class_name} wants"
            yield Problem(what, where, str(list(stored.shape)), str(list(wanted.shape)), mend)
        elif wanted.is_floating_point() and not stored.dtype.is_floating_point:
            yield Problem(f"tensor {name!r} is not a float", where, str(stored.dtype), "bf16, fp16 or fp32")


def _ignored(model: nn.Module, name: str) -> bool:
    """What older checkpoints carry and the class itself leaves unread."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return name.endswith(BUFFERS_OF_OLD) or any(re.search(pattern, name) for pattern in patterns)


def build_model(component: Component) -> nn.Module:
    """The component's class on the meta device. Only classes of diffusers and transformers: no remote code runs."""
    model_class = _find_class(component)
    try:
        with torch.device("meta"), _at_most(MODULES_PER_TENSOR * (len(component.tensors) + 100)):
            if component.library == "diffusers":
                model: nn.Module = model_class.from_config(without_choices(component.config))
            else:
                model = model_class(model_class.config_class.from_dict(without_choices(component.config)))
    except Exception as error:  # the classes raise whatever they like on a config that is not theirs
        raise SourceError(
            Problem(
                f"{component.class_name} refuses its config", str(component.folder / "config.json"),
                got=f"{type(error).__name__}: {error}",
                next_step="check that the class is the right one and that the config is complete",
            )
        ) from error  # fmt: skip
    return model


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Stops a config such as `num_layers: 100000000` before it fills the memory."""
    left = [modules]

    def count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"the config asks for more than {modules} modules, the weights hold far fewer tensors")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _find_class(component: Component) -> Any:
    import diffusers
    import transformers

    library = diffusers if component.library == "diffusers" else transformers
    found = getattr(library, component.class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SourceError(
            Problem(
                f"{component.library} {library.__version__} has no model class {shown(component.class_name)}",
                str(component.root / (CONFIG if component.bare else INDEX)),
                next_step=f"pip install -U {component.library}, or leave {component.name!r} out of the recipe",
            )
        )  # fmt: skip
    return found


def _match(component: Component, model: nn.Module, expected: Mapping[str, object]) -> dict[str, StoredTensor]:
    """The stored tensors under the names the class uses; files of older transformers carry other prefixes."""
    if component.library != "transformers":
        return component.tensors
    from bitroute.backends._transformers import renaming

    rename = renaming(model)
    return {rename(name, expected): tensor for name, tensor in component.tensors.items()}


def _tied(model: nn.Module) -> set[str]:
    """Parameters that the class ties to another one, so that a checkpoint may leave them out."""
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*pairs.keys(), *pairs.values()}


def _layers(model: nn.Module) -> Iterable[tuple[str, str]]:
    for name, module in model.named_modules():
        if name and isinstance(getattr(module, "weight", None), torch.Tensor):
            yield name, _kind(module)


def _kind(module: nn.Module) -> str:
    """The name of the class; convolutions that no backend takes, such as those in groups, have their own."""
    name = type(module).__name__
    return f"other {name}" if name in CONVOLUTION_NAMES and not is_convolution(module) else name


def without_choices(value: Any) -> Any:
    """A config, and those inside it, without what names no layer and would be loaded or checked all the same."""
    if isinstance(value, list):
        return [without_choices(item) for item in value]
    if isinstance(value, dict):
        return {key: without_choices(item) for key, item in value.items() if key not in CHOICES}
    return value


def _refuse_quantized(component: Component) -> None:
    config = component.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else config
    stored = {tensor.spec.dtype for tensor in component.tensors.values()} - {torch.bool}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in stored if dtype.itemsize == 1}
    if config or dtypes:
        got = f"quant_method {shown(method)}" if config else f"{', '.join(sorted(dtypes))} tensors"
        raise SourceError(
            Problem(
                f"component {component.name!r} is already quantized", str(component.folder), got=got,
                expected="bf16, fp16 or fp32 weights",
                next_step="start from the original model; or `quantize dequantize` it first (a job can do that itself: "
                "--dequantize): the errors of both add up",
            )
        )  # fmt: skip
