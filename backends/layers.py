"""What runs in place of a layer whose weight stays in its stored form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from bitroute.backends.base import Backend, TensorSpec

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d,
}  # fmt: skip


class UndecodedWeight(Tensor):
    """Stands for the weight of a layer: its shape, dtype and device cost nothing, anything else decodes it."""

    free: ClassVar = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device")} | {
        Tensor.size,
        Tensor.dim,
    }
    layer: QuantizedLayer

    def __new__(cls, layer: QuantizedLayer) -> Self:
        make: Any = Tensor._make_wrapper_subclass
        device = next(iter(layer.stored.values())).device
        made: Self = make(cls, layer.spec.shape, dtype=layer.spec.dtype, device=device)
        made.layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parent: Any = super()
        decides = parent.__torch_function__ if func in cls.free else cls.__torch_dispatch__
        return decides(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        decoded = tree_map_only(cls, lambda weight: weight.layer.decoded(), (args, kwargs or {}))
        return func(*decoded[0], **decoded[1])


def is_convolution(layer: nn.Module) -> bool:
    """Of a class of torch's own, neither transposed nor in groups; one padded with anything but zeros is left alone."""
    plain = type(layer) in CONVOLUTIONS
    return plain and bool(layer.groups == 1) and layer.padding_mode == "zeros"


class QuantizedLayer(nn.Module):
    """A layer whose weight stays in its stored form; the buffers are exactly the stored tensors."""

    bias: nn.Parameter | None

    def __init__(self, backend: Backend, layer: Any, stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backend = backend
        self.spec = TensorSpec(tuple(layer.weight.shape), layer.weight.dtype)
        self.suffixes = tuple(stored)
        for suffix, tensor in stored.items():
            self.register_buffer(suffix, tensor)
        self.bias = layer.bias

    @property
    def stored(self) -> dict[str, Tensor]:
        return {suffix: self.get_buffer(suffix) for suffix in self.suffixes}

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that looks at a layer's weight or only at its dtype, on every forward."""
        compiled = torch.compiler.is_compiling()  # a compiler drops what nobody reads by itself
        return self.decoded() if compiled else UndecodedWeight(self)

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its own shape, in `dtype` or in that of the layer."""
        rows = self.backend.decode(self.stored, self.spec.rows)
        return rows.reshape(self.spec.shape).to(dtype or self.spec.dtype)

    def plain(self) -> nn.Module:
        """The layer as its class had it, without weights, on the meta device."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves with the model but keeps the stored dtypes: a scale cast to bf16 is another weight."""
        dtypes = {suffix: tensor.dtype for suffix, tensor in self.stored.items()}
        before = self.stored
        parent: Any = super()
        parent._apply(fn, recurse)
        for suffix, dtype in dtypes.items():
            if self.get_buffer(suffix).dtype != dtype:
                setattr(self, suffix, before[suffix].to(self.get_buffer(suffix).device))
        self.spec = TensorSpec(self.spec.shape, fn(torch.empty(0, dtype=self.spec.dtype)).dtype)
        return self

    def extra_repr(self) -> str:
        return f"{'×'.join(map(str, self.spec.shape))}, backend={self.backend.name}"


class QuantizedLinear(QuantizedLayer):
    def __init__(self, backend: Backend, layer: nn.Linear, stored: Mapping[str, Tensor]) -> None:
        super().__init__(backend, layer, stored)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.linear(x, self.stored, self.spec, self.bias)

    def plain(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")


class QuantizedConvolution(QuantizedLayer):
    """Decoded from its rows [out, in·kernel] at every call."""

    def __init__(self, backend: Backend, layer: Any, stored: Mapping[str, Tensor]) -> None:
        super().__init__(backend, layer, stored)
        self.kind: type[nn.Module] = type(layer)
        self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return CONVOLUTIONS[self.kind](x, self.decoded(x.dtype), bias, **self.geometry)

    def plain(self) -> nn.Module:
        make: Callable[..., nn.Module] = self.kind
        out_channels, in_channels, *kernel = self.spec.shape
        return make(in_channels, out_channels, tuple(kernel), bias=False, device="meta", **self.geometry)
