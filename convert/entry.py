"""One source tensor and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bitroute.backends.base import Backend, NativeRecord, TensorSpec
from bitroute.convert.layout import DerivedTensor, StoredTensor, stored_bytes, total_bytes

DERIVING_BYTES = 12  # a weight: what it is derived from, that in float32, the result


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
    statistics: Mapping[str, StoredTensor] = field(default_factory=dict)  # of the layer's input, those that are used

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
    def held_bytes(self) -> int:
        """What a worker of a job holds of it beside blocks: its scales, and the whole of what is derived.

        Statistics are held as they are, as they are inside the method, and factorized, which takes three of them more.
        """
        own = self.backend.working_bytes(self.weight) if self.quantized else 0
        return own + 6 * stored_bytes(self.statistics.values()) + self._deriving_bytes

    @property
    def compared_bytes(self) -> int:
        """What it takes to hold the stored layer, block by block, against its source."""
        return (self.size_bytes if self.quantized else 0) + self._deriving_bytes

    @property
    def _deriving_bytes(self) -> int:
        return DERIVING_BYTES * self.weight.numel if isinstance(self.source, DerivedTensor) else 0

    @property
    def bits_per_weight(self) -> float:
        """Scales, zero points and code books included."""
        return 8 * self.size_bytes / max(self.weight.numel, 1)
