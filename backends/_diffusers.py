"""The bitroute quantizer for diffusers (0.42: quantizers/base.py, models/model_loading_utils.py)."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from bitroute.backends import load
from bitroute.backends._adapters import answer_for_weights
from bitroute.errors import BackendError, Problem


class BitrouteConfig(load.Manifest, QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a diffusers component."""


class BitrouteQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False

    def __init__(self, quantization_config: BitrouteConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        load.refuse_unquantized(self.pre_quantized)
        self.backends = quantization_config.backends()
        self.files: list[str] | None = None
        self.stored: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise BackendError(
                Problem(
                    "diffusers casts what it offloads to disk, and a cast scale is another weight",
                    "device_map",
                    got=str(device_map),
                    expected="devices and cpu",
                    next_step="load to cpu, then enable_group_offload(..., offload_to_disk_path=...)",
                )
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch_dtype or self.quantization_config.dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.files = checkpoint_files
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.stored = load.attach(model, self.backends, self.files, keep_in_fp32_modules or ())
        model.register_to_config(quantization_config=self.quantization_config)
        answer_for_weights(model)

    def check_if_quantized_param(
        self, model: nn.Module, value: Tensor, name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        return name in self.stored

    def create_quantized_param(
        self, model: nn.Module, value: Tensor, name: str, device: Any, state_dict: Mapping[str, Tensor],
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Takes the tensor of the file: `value` has already been cast to the model's dtype."""
        layer, _, suffix = name.rpartition(".")
        quantized: Any = model.get_submodule(layer)
        quantized.put(suffix, state_dict[name].to(device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _dequantize(self, model: Any) -> Any:
        """Takes the config away as well, or the saved model could not be loaded."""
        load.dequantize(model)
        model._internal_dict = FrozenDict(
            {key: value for key, value in model.config.items() if key != "quantization_config"}
        )
        del model.quantization_method
        return model


def register(tables: ModuleType) -> None:
    """Adds the two classes to `diffusers.quantizers.auto`."""
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[load.QuantMethod.BITROUTE.value] = BitrouteConfig
    tables.AUTO_QUANTIZER_MAPPING[load.QuantMethod.BITROUTE.value] = BitrouteQuantizer
