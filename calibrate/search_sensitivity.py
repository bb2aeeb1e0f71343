"""How much the denoiser's output changes when layers are quantized, on calls that the original was recorded with.

Every call starts from the original's own inputs (teacher forcing), and the answer is held against that of the same
model, unquantized, in the same dtype: the mean over the calls of ||y' - y||² / ||y||². In bfloat16 a change of one
layer, however small, changes how everything behind it is rounded, which costs more than a layer in 8 bits: float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bitroute.backends.base import NONE, Backend, Statistics
from bitroute.calibrate.search_candidates import KEEP
from bitroute.calibrate.search_space import Layer
from bitroute.convert.checkpoint import Component
from bitroute.convert.reading import read_json, read_tensor
from bitroute.convert.statistics import StatisticsFile, read_statistics, with_statistics
from bitroute.errors import JobError, Problem
from bitroute.eval.calling import attention
from bitroute.eval.recording import flat_output
from bitroute.eval.replay import Recorded, load_model
from bitroute.eval.sampling import Sampling

__all__ = ["Bench", "stratified"]


def stratified(calls: Sequence[int], count: int) -> list[tuple[int, int]]:
    """`count` of all calls as (sample, call), spread evenly over steps; samples take turns.

    calls: how many were recorded of each sample.
    """
    total = min(count, sum(calls))
    chosen = dict[tuple[int, int], None]()
    for number in range(total):
        sample = number % len(calls)
        chosen[sample, int((number + 0.5) / total * calls[sample])] = None
    everything = ((sample, call) for sample, found in enumerate(calls) for call in range(found))
    for place in everything:  # where two fell on one
        if len(chosen) >= total:
            break
        chosen[place] = None
    return list(chosen)


class Bench:
    """The original denoiser, its recorded calls, and its own answers to them."""

    def __init__(
        self, component: Component, recorded: Path, sampling: Sampling, samples: int, dtype: torch.dtype,
        statistics: StatisticsFile | None = None,
    ) -> None:  # fmt: skip
        """Raises JobError where it cannot be loaded, was never called, or does not answer with numbers."""
        torch.set_num_threads(sampling.threads)
        self.component, self.sampling, self.dtype, self.statistics = component, sampling, dtype, statistics
        self.calls = [self._in_dtype(call) for call in _recorded_calls(recorded, component.name, samples, sampling)]
        self.model = load_model(component, sampling.device, dtype)
        self.answers = [self._answer(call) for call in self.calls]
        for what, sound in (("not answer with numbers", Tensor.isfinite), ("answer with zeros alone", Tensor.any)):
            if not all(sound(answer).all() for answer in self.answers):
                raise JobError(Problem(f"the original does {what}", str(component.folder), f"{dtype}"))

    def error(self) -> float:
        """The mean squared relative error of the model as it is now; infinite where it answers no numbers."""
        total = 0.0
        for call, wanted in zip(self.calls, self.answers, strict=True):
            noise = (self._answer(call).double() - wanted.double()).square().sum()
            total += (noise / wanted.double().square().sum()).item()
        return total / len(self.calls) if math.isfinite(total) else math.inf

    def error_with(self, chosen: Sequence[tuple[Layer, Backend]]) -> float:
        """With these layers in these formats, the others as they are; the model is the same afterwards, bit for bit."""
        with self._quantized(chosen):
            return self.error()

    def used(self, layer: Layer, backend: Backend) -> Statistics:
        """What a job would give the backend."""
        entry = dataclasses.replace(layer.entry, backend=backend)
        [found], _ = with_statistics([entry], self.component, self.statistics)
        return read_statistics(found.statistics)

    def lost(self, layer: Layer, backend: Backend) -> float | None:
        """E ||x (Ŵ - W)ᵀ||² of the layer's output, by the statistics of its input x; None where there are none.

        Σ_o e_o H e_oᵀ over the rows e_o of Ŵ - W with H = E[xᵀ x] as far as it was measured: whole, in blocks on its
        diagonal, or that diagonal alone.
        """
        found = read_statistics(self.statistics.stored(self.component.name, layer.name)) if self.statistics else NONE
        weight = read_tensor(layer.source).to(self.sampling.device)
        error = self._decoded(layer, backend, weight).double() - weight.double()
        if found.hessian is not None:
            hessian = found.hessian.to(error)
            blocks = error.reshape(len(error), len(hessian), -1)
            return float(torch.einsum("onb,nbc,onc->", blocks, hessian, blocks))
        if found.second_moment is not None:
            return float((error.square() * found.second_moment.to(error)).sum())
        return None

    @contextmanager
    def _quantized(self, chosen: Sequence[tuple[Layer, Backend]]) -> Iterator[None]:
        """Weights are replaced in place and read again afterwards, so that never more than one is held twice."""
        plain = dict[str, nn.Module]()
        touched = list[Layer]()
        try:
            for layer, backend in chosen:
                if backend.name == KEEP:
                    continue
                module = self.model.get_submodule(layer.name)
                weight = read_tensor(layer.source).to(self.sampling.device)
                if backend.quantizes_activations:
                    plain[layer.name] = module
                    stored = backend.quantize(weight.flatten(1), self.used(layer, backend))
                    self.model.set_submodule(layer.name, _InDtype(backend.attach(module, stored), weight.dtype))
                else:
                    touched.append(layer)
                    module.weight.data.copy_(self._decoded(layer, backend, weight))
            yield
        finally:
            for name, module in plain.items():
                self.model.set_submodule(name, module)
            for layer in touched:
                self.model.get_submodule(layer.name).weight.data.copy_(read_tensor(layer.source))

    def _decoded(self, layer: Layer, backend: Backend, weight: Tensor) -> Tensor:
        """As the layer computes with it: rounded to the dtype of its source."""
        stored = backend.quantize(weight.flatten(1), self.used(layer, backend))
        decoded = backend.decode(stored, layer.source.spec.rows)
        return decoded.reshape(weight.shape).to(weight.dtype)

    def _answer(self, call: tuple[Any, Any]) -> Tensor:
        args, options = call
        with attention(self.sampling.attention), torch.inference_mode():
            return flat_output(self.model(*args, **options))

    def _in_dtype(self, call: Any) -> Any:
        """bf16 is what pipelines give in the dtype of the model; other tensors keep theirs."""
        return tree_map_only(Tensor, lambda x: x.to(self.dtype) if x.dtype == torch.bfloat16 else x, call)


class _InDtype(nn.Module):
    """Computes in the dtype that a deployed layer has, whatever that of the model is."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.to(self.dtype))
        return found.to(x.dtype)


def _recorded_calls(recorded: Path, denoiser: str, samples: int, sampling: Sampling) -> list[tuple[Any, Any]]:
    tapes = [Recorded(recorded / f"{stem}.safetensors") for stem in read_json(recorded / "run.json")["samples"]]
    own = [[call for call in tape.calls if call["denoiser"] == denoiser] for tape in tapes]
    if not own or not all(own):
        what, mend = f"{denoiser!r} is never called", "let the pipeline take more steps: --steps"
        raise JobError(Problem(what, str(recorded), next_step=mend))
    chosen = stratified([len(calls) for calls in own], samples)
    return [
        tuple(tapes[sample].unpack(own[sample][number][part], sampling.device) for part in ("args", "kwargs"))
        for sample, number in chosen
    ]
