"""One source tensor and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bitroute.backends.base import Backend, NativeRecord, TensorSpec
from bitroute.convert.layout import StoredTensor, total_bytes


@dataclass(frozen=True)
class Entry:
    name: str  # as the model class names the tensor: "x_embedder.weight"
    source: StoredTensor
    backend: Backend
    layer: str  # the layer whose weight or bias this is; "" for tensors outside layers
    kind: str  # the layer's module class; "" for anything but a weight
    role: str
    reason: str  # the rule that decided, in words
    where: str  # file:line of that rule

    @property
    def quantized(self) -> bool:
        return self.backend.name != "keep"

    @cached_property
    def weight(self) -> TensorSpec:
        """The source as backends see it: [out, in] when quantized, its own shape when kept."""
        return self.source.spec.rows if self.quantized else self.source.spec

    @cached_property
    def outputs(self) -> dict[str, TensorSpec]:
        return self.backend.outputs(self.weight)

    @cached_property
    def record(self) -> NativeRecord | None:
        return self.backend.record(self.weight)

    @property
    def size_bytes(self) -> int:
        return total_bytes(self.outputs.values())

    @property
    def bits_per_weight(self) -> float:
        """Scales, zero points and code books included."""
        return 8 * self.size_bytes / max(self.weight.numel, 1)
