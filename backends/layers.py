"""What runs in place of a layer whose weight stays in its stored form.

PEFT and diffusers choose what they do with a layer by `isinstance(layer, nn.Linear)`, so the linear one is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from bitroute.backends.base import Backend, TensorSpec
from bitroute.errors import BackendError, Problem

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d,
}  # fmt: skip


class UndecodedWeight(Tensor):
    """Stands for the weight of a layer: what is known costs nothing, anything else decodes it, a write is refused.

    `.data` is known: diffusers takes it of every layer, for its dtype, when a LoRA is loaded.
    """

    known: ClassVar = {
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_meta", "is_cuda", "layout")
    } | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}
    layer: QuantizedLayer
    _is_hf_initialized = True  # or transformers would fill what it decodes with random numbers

    def __new__(cls, layer: QuantizedLayer) -> Self:
        make: Any = Tensor._make_wrapper_subclass
        device = next(iter(layer.stored.values())).device
        made: Self = make(cls, layer.spec.shape, dtype=layer.spec.dtype, device=device)
        made.layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in cls.known:
            parent: Any = super()
            return parent.__torch_function__(func, types, args, kwargs)
        first = next(iter((*args, *(kwargs or {}).values())), None)
        if func is DATA:
            return first
        if isinstance(first, cls) and _writes(func.__name__):
            raise _read_only(first.layer)
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        decoded = tree_map_only(cls, lambda weight: weight.layer.decoded(), (args, kwargs or {}))
        return func(*decoded[0], **decoded[1])


DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


def _writes(function: str) -> bool:
    """By its name: `add_`, `__iadd__`, an assignment to an entry or to `.data`; asking for a gradient is none."""
    inplace = function.endswith("_") and not function.endswith("__") and function != "requires_grad_"
    return inplace or function in ("__set__", "__setitem__") or function in INPLACE_OPERATORS


INPLACE_OPERATORS = tuple(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


def _read_only(layer: QuantizedLayer) -> BackendError:
    return BackendError(
        Problem(
            "a weight that is stored in a quantized form cannot be changed",
            got=f"a write to the weight of {layer}, which would be lost",
            next_step="leave a LoRA unfused; fuse it before the conversion, which rounds once (`fuse_loras:` in the "
            "recipe); or call dequantize() on the model first",
        )
    )


def is_convolution(layer: nn.Module) -> bool:
    """Of a class of torch's own, neither transposed nor in groups; one padded with anything but zeros is left alone."""
    plain = type(layer) in CONVOLUTIONS
    return plain and bool(layer.groups == 1) and layer.padding_mode == "zeros"


class QuantizedLayer(nn.Module):
    """A layer whose weight stays in its stored form: tensors under the names of the checkpoint.

    They are parameters, because the libraries do not offload the buffers of a layer, or not again. The bias stands
    before them, because diffusers takes the dtype of the first floating parameter for the dtype of the model.
    """

    bias: nn.Parameter | None

    def __init__(self, backend: Backend, layer: Any, stored: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)  # what the next class would make is a weight
        self.backend = backend
        self.spec = TensorSpec(tuple(layer.weight.shape), layer.weight.dtype)
        self.suffixes = tuple(stored)
        self.bias = layer.bias
        for suffix, tensor in stored.items():
            self.register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))

    def hide(self) -> None:
        """Makes buffers of the stored tensors: they no longer tell a dtype."""
        stored = self.stored
        for suffix, tensor in stored.items():
            delattr(self, suffix)
            self.register_buffer(suffix, tensor.detach())

    def put(self, suffix: str, tensor: Tensor) -> None:
        """Takes a tensor of the checkpoint, as it is."""
        hidden = suffix in self._buffers
        setattr(self, suffix, tensor if hidden else nn.Parameter(tensor, requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise _read_only(self)
        super().register_parameter(name, param)

    @property
    def stored(self) -> dict[str, Tensor]:
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that looks at a layer's weight or only at its dtype, on every forward."""
        compiled = torch.compiler.is_compiling()  # a compiler drops what nobody reads by itself
        return self.decoded() if compiled else UndecodedWeight(self)

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its own shape, in `dtype` or in that of the layer."""
        rows = self.backend.decode(self.stored, self.spec.rows, dtype or self.spec.dtype)
        return rows.reshape(self.spec.shape)

    def plain(self) -> nn.Module:
        """The layer as its class had it, without weights, on the meta device."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves with the model but keeps the stored dtypes: a scale cast to bf16 is another weight."""
        stored = {id(tensor) for tensor in self.stored.values()}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in stored:
                return cast(Tensor, fn(tensor))
            asked = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return cast(Tensor, fn(tensor)) if asked.dtype == tensor.dtype else tensor.to(asked.device)

        parent: Any = super()
        parent._apply(move, recurse)
        self.spec = TensorSpec(self.spec.shape, fn(torch.empty(0, dtype=self.spec.dtype)).dtype)
        return self

    def extra_repr(self) -> str:
        return f"{'×'.join(map(str, self.spec.shape))}, backend={self.backend.name}"


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc, override]  # its weight is made, not kept
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
