"""What the LoRA loaders of diffusers ask of a model beside its layers (0.42: loaders/lora_pipeline.py).

For Flux they take `L.weight` of the layers that a LoRA changes out of `state_dict()`, to compare shapes. A quantized
layer stores other tensors, so its entry is made when it is asked for, and decoded only if somebody reads numbers.
PEFT fuses layer after layer; a model with a quantized one among them refuses before the first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from bitroute.backends.layers import QuantizedLayer, read_only


class StateDict(OrderedDict[str, Tensor]):
    """What is stored, and on request the weight of a quantized layer; pickled it is a plain dictionary."""

    layers: Mapping[str, QuantizedLayer] = MappingProxyType({})

    def __missing__(self, name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.layers:
            raise KeyError(name)
        return self.layers[layer].weight

    def __reduce__(self) -> Any:
        attributes = {name: value for name, value in vars(self).items() if name != "layers"}
        return OrderedDict, (), attributes, None, iter(self.items())


def prepare_for_loras(model: nn.Module) -> None:
    """From now on `model.state_dict()` is a StateDict, and `model.fuse_lora` fuses into all layers or none."""
    untyped: Any = model
    untyped._register_state_dict_hook(_with_weights)
    if hasattr(model, "fuse_lora"):
        untyped.fuse_lora = partial(_fuse_lora, model)


def _fuse_lora(
    model: nn.Module, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
) -> None:
    """Raises BackendError where one of the adapters, by default the active ones, changes a quantized layer."""
    for layer in model.modules():
        base: Any = getattr(layer, "base_layer", None)
        if isinstance(base, QuantizedLayer):
            wrapper: Any = layer
            if any(name in wrapper.lora_A for name in adapter_names or wrapper.active_adapters):
                raise read_only(base)
    untyped: Any = type(model)
    untyped.fuse_lora(model, lora_scale, safe_fusing, adapter_names)


def _with_weights(model: nn.Module, found: OrderedDict[str, Tensor], prefix: str, _: dict[str, Any]) -> StateDict:
    answer = StateDict(found)
    answer.__dict__.update(vars(found))  # torch keeps the versions of the modules there
    answer.layers = {
        prefix + name.removesuffix(".base_layer"): layer  # as PEFT calls the layer that it wraps
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    return answer
