"""The formats that are measured, and how each library is asked for them: every linear layer, on all sides.

Libraries are imported only where they are used: one of them lives in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

BITROUTE, COPYING, BF16 = "bitroute", "copying", "bf16"
UNCOMPILED = "bitroute, no compiler"
BITSANDBYTES, QUANTO, SDNQ, TORCHAO = "bitsandbytes", "quanto", "sdnq", "torchao"
Config = Callable[[], Any]


@dataclass(frozen=True)
class Format:
    """Of the backend of the same name.

    written: bytes for each byte of bf16 that is read, without the scales of rows. peers: name → its configuration.
    """

    about: str
    written: float
    peers: Mapping[str, Config] = field(default_factory=dict)


def lift_gpu_check() -> None:
    """bitsandbytes has kernels for CPUs, which diffusers 0.42 refuses to use."""
    quantizers = import_module("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        getattr(quantizers, name).validate_environment = lambda self, *args, **kwargs: None


def _torchao(module: str, name: str) -> Any:
    from diffusers import TorchAoConfig

    return TorchAoConfig(getattr(import_module(f"torchao.{module}"), name)())


def _torchao_mxfp4() -> Any:
    import torch
    from diffusers import TorchAoConfig
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig

    element = torch.float4_e2m1fn_x2
    return TorchAoConfig(MXDynamicActivationMXWeightConfig(activation_dtype=element, weight_dtype=element))


def _bitsandbytes(**options: Any) -> Any:
    from diffusers import BitsAndBytesConfig

    lift_gpu_check()
    return BitsAndBytesConfig(**options)


def _quanto(dtype: str) -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype=dtype)


def _sdnq(dtype: str) -> Any:
    """add_skip_keys=False: by default it leaves the embedders and the output layers in bf16."""
    return import_module("sdnq").SDNQConfig(weights_dtype=dtype, add_skip_keys=False)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMATS: Mapping[str, Format] = {
    "float8": Format("E4M3, a scale for each row", 1 / 2, {
        TORCHAO: partial(_torchao, "quantization", "Float8WeightOnlyConfig"),
        QUANTO: partial(_quanto, "float8"),
        SDNQ: partial(_sdnq, "float8_e4m3fn"),
    }),
    "int8": Format("a scale for each row", 1 / 2, {
        TORCHAO: partial(_torchao, "quantization", "Int8WeightOnlyConfig"),
        BITSANDBYTES: partial(_bitsandbytes, load_in_8bit=True),
        QUANTO: partial(_quanto, "int8"),
        SDNQ: partial(_sdnq, "int8"),
    }),
    "nvfp4": Format("E2M1 in blocks of 16 with E4M3 scales, one scale over them", 4.5 / 16, {
        TORCHAO: partial(_torchao, "prototype.mx_formats", "NVFP4WeightOnlyConfig"),
    }),
    "mxfp4": Format("E2M1 in blocks of 32, powers of two as scales", 4.25 / 16, {TORCHAO: _torchao_mxfp4}),
    "nf4": Format("NF4 in blocks of 64, scales quantized too", 4.13 / 16, {
        BITSANDBYTES: partial(_bitsandbytes, **NF4),
    }),
}  # fmt: skip
