"""The bitroute quantizer for transformers (5.23: quantizers/base.py, core_model_loading.py)."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitroute.backends import load

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class BitrouteConfig(load.Manifest, QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a transformers component."""


class BitrouteQuantizer(HfQuantizer):  # type: ignore[misc]
    is_trainable = False

    def __init__(self, quantization_config: BitrouteConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        load.refuse_unquantized(self.pre_quantized)
        self.backends = quantization_config.backends()
        self.stored: frozenset[str] = frozenset()

    def is_serializable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Where config.json names no dtype, "auto" takes that of the first tensor, maybe a stored one."""
        return dtype if dtype in COMPUTE_DTYPES else self.quantization_config.dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if self.stored.isdisjoint(converter.target_patterns):
            found: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
            return found
        return None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        float32 = model._get_dtype_plan(model.config.dtype)
        self.stored = load.attach(model, self.backends, checkpoint_files, float32, renaming(model))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """transformers would have floats trained, and codes and scales are none."""
        for layer in load.quantized_layers(model):
            for tensor in layer.stored.values():
                tensor.requires_grad_(False)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        load.dequantize(model, None if dtype == model.config.dtype else dtype)
        return model


def renaming(model: Any) -> load.Rename:
    """What transformers makes of the names in a file: those of older versions carry other prefixes."""
    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]

    def rename(name: str, expected: Mapping[str, object]) -> str:
        renamed: str = rename_source_key(name, steps, [], model.base_model_prefix, expected)[0]
        return renamed if renamed in expected else name

    return rename


def register(tables: ModuleType) -> None:
    """Adds the two classes to `transformers.quantizers.auto`."""
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[load.QuantMethod.BITROUTE.value] = BitrouteConfig
    tables.AUTO_QUANTIZER_MAPPING[load.QuantMethod.BITROUTE.value] = BitrouteQuantizer
