"""What the LoRA loaders of diffusers ask of a model beside its layers (0.42: loaders/lora_pipeline.py).

For Flux they take `L.weight` of the layers that a LoRA changes out of `state_dict()`, to compare shapes. A quantized
layer stores other tensors, so its entry is made when it is asked for, and decoded only if somebody reads numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from bitroute.backends.layers import QuantizedLayer


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


def answer_for_weights(model: nn.Module) -> None:
    """From now on `model.state_dict()` is a StateDict."""
    untyped: Any = model
    untyped._register_state_dict_hook(_with_weights)


def _with_weights(model: nn.Module, found: OrderedDict[str, Tensor], prefix: str, _: dict[str, Any]) -> StateDict:
    answer = StateDict(found)
    answer.__dict__.update(vars(found))  # torch keeps the versions of the modules there
    answer.layers = {
        prefix + name.removesuffix(".base_layer"): layer  # as PEFT calls the layer that it wraps
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    return answer
