"""What the torchao formats share: records in torchao's own safetensors layout.

Source: torchao 0.18, torchao/prototype/safetensors/safetensors_utils.py (the reader diffusers and transformers use).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig, config_to_dict
from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

from bitroute.backends.base import NativeRecord, TensorSpec

COMPUTE_DTYPE = torch.bfloat16  # torchao's weights carry it; anything else fails in forward


def native_record(tensor: Tensor, config: AOBaseConfig) -> NativeRecord:
    """The record of a torchao weight, made from a tensor subclass on the meta device."""
    header: Mapping[str, Any] = json.loads(json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder))
    names = {suffix: f"_weight_{suffix}" for suffix in header["_tensor_data_names"]}
    return NativeRecord(names=names, header=header, config=config_to_dict(config))


def arithmetic_rows(rows: Tensor) -> Tensor:
    """bf16 and fp32 as they are (torchao's own arithmetic), fp16 as fp32: 1e-12 underflows in fp16."""
    return rows.float() if rows.dtype == torch.float16 else rows


def refuse_single_column(weight: TensorSpec) -> str | None:
    """torchao takes a row of one element for a whole tensor, of weights and of activations alike."""
    one = weight.shape[1] == 1
    return "torchao scales rows, and rows of one input feature would be smaller than their scale" if one else None


def refuse_dynamic_convolution(activations: str) -> str | None:
    """Weights are decoded: torchao's Int8Tensor has no convolution, Float8Tensor's runs on Blackwell with mslk only."""
    return None if activations == "none" else "of a convolution the weight can be quantized, the activations cannot"
