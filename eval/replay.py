"""Asks a quantized denoiser what the original's was asked: its error at every step, and that of every layer.

Each step starts from the original's latents, so errors of earlier steps do not add up: what is seen is the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import bitroute  # noqa: F401  registers the loader of bitroute's own container
from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.layout import StoredTensor
from bitroute.convert.loading import lift_gpu_check
from bitroute.convert.reading import read_json, read_tensor
from bitroute.convert.record import RecordedComponent, RecordedEntry, read_record
from bitroute.errors import JobError, Problem
from bitroute.eval.apart import answer, run_apart
from bitroute.eval.intervals import summarize
from bitroute.eval.recording import LAYER_SAMPLES, flat_output
from bitroute.eval.sampling import Sampling

Json = dict[str, Any]


@dataclass(frozen=True)
class Replay:
    """Both as the report has them (docs/report.md); layers is empty for checkpoints of other tools."""

    trajectory: Mapping[str, Sequence[Json]]
    layers: Sequence[Json]


def replay_apart(candidate: Path, original: Path, recorded: Path, sampling: Sampling) -> Replay:
    """Replays a folder that `record_apart` wrote, in a fresh process.

    Raises:
        JobError: the candidate's denoiser cannot be loaded or run, or answers NaN or infinite values.
    """
    paths = {"candidate": str(candidate), "original": str(original), "recorded": str(recorded)}
    request = {**paths, "sampling": sampling.describe()}
    found = run_apart("bitroute.eval.replay", request, "the denoiser cannot be replayed", candidate)
    return Replay(**json.loads(found))


def replay(candidate: Path, original: Path, recorded: Path, sampling: Sampling) -> Replay:
    """As `replay_apart`, in this process."""
    torch.set_num_threads(sampling.threads)
    run = read_json(recorded / "run.json")
    tapes = [Recorded(recorded / f"{stem}.safetensors") for stem in run["samples"]]
    errors = [error for name in run["denoisers"] for error in _call_errors(candidate, name, tapes, sampling.device)]
    layers = [layer for name in run["denoisers"] for layer in _layer_errors(candidate, original, name, tapes)]
    worst_first = sorted(layers, key=lambda layer: layer["relative_error"], reverse=True)
    return Replay({"timesteps": list(_steps(errors))}, worst_first)


class Recorded:
    """One sample's file; tensors are read when they are asked for."""

    def __init__(self, file: Path) -> None:
        opened: Any = safe_open
        self.file = opened(file, framework="pt")
        metadata = self.file.metadata()
        self.calls: list[Json] = json.loads(metadata["calls"])
        self.timesteps: list[float] = json.loads(metadata["timesteps"])
        self.names: list[str] = list(self.file.keys())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def unpack(self, packed: Json, device: str) -> Any:
        """The argument that `Tape.pack` was given; what was not on the CPU goes to `device`."""
        [(kind, content)] = [item for item in packed.items() if item[0] != "device"]
        if kind == "tensor":
            return self.read(content).to("cpu" if packed["device"] == "cpu" else device)
        if kind == "dict":
            return {key: self.unpack(item, device) for key, item in content.items()}
        if kind == "value":
            return content
        items = [self.unpack(item, device) for item in content]
        return items if kind == "list" else tuple(items)

    def layer_inputs(self, layer: str) -> Iterator[Tensor]:
        """Rows [n, in] of each recorded call."""
        yield from (self.read(name) for name in self.names if name.rpartition("/")[0] == layer)


@dataclass(frozen=True)
class CallError:
    prompt: int
    step: int
    timestep: float | None
    relative_error: float


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||: 0 where they are equal, infinite where only `wanted` is all zeros."""
    noise = (found.double() - wanted.double()).norm().item()
    signal = wanted.double().norm().item()
    if noise == 0:
        return 0.0
    return noise / signal if signal else math.inf


def _call_errors(candidate: Path, name: str, tapes: Sequence[Recorded], device: str) -> Iterator[CallError]:
    model = _load(candidate, name, device)
    for prompt, tape in enumerate(tapes):
        for call in tape.calls:
            if call["denoiser"] != name:
                continue
            with torch.inference_mode():
                output = model(*tape.unpack(call["args"], device), **tape.unpack(call["kwargs"], device))
            step = call["step"]
            error = relative_error(flat_output(output).cpu(), tape.read(call["output"]))
            timestep = tape.timesteps[step] if step < len(tape.timesteps) else None
            yield CallError(prompt, step, timestep, _checked(error, f"{name}, step {step}"))


def _load(candidate: Path, name: str, device: str) -> Any:
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        lift_gpu_check()
    component = open_pipeline(str(candidate)).components.get(name)
    if component is None:
        raise JobError(Problem(f"the candidate has no {name!r}", str(candidate), expected="the original's components"))
    model_class = getattr(diffusers, component.class_name)
    model, info = model_class.from_pretrained(component.folder, dtype=torch.bfloat16, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):  # diffusers gives them random values and only warns
        got = ", ".join(missing[:3])
        raise JobError(Problem(f"{len(missing)} tensors of {name!r} are not in the checkpoint", str(candidate), got))
    return model if device == "cpu" else model.to(device)


def _checked(error: float, where: str) -> float:
    if math.isfinite(error):
        return error
    raise JobError(Problem("the output cannot be compared", where, got=f"relative error {error}", expected="a number"))


def _steps(errors: Iterable[CallError]) -> Iterator[Json]:
    by_step: dict[int, list[CallError]] = {}
    for error in errors:
        by_step.setdefault(error.step, []).append(error)
    for step, found in sorted(by_step.items()):
        prompts = [error.prompt for error in found]
        mean = summarize([error.relative_error for error in found], prompts, higher_is_better=False).mean
        where = {"step": step, "timestep": found[0].timestep}
        yield {**where, "relative_error": mean.value, "low": mean.low, "high": mean.high}


def _layer_errors(candidate: Path, original: Path, name: str, tapes: Sequence[Recorded]) -> Iterator[Json]:
    """One for each quantized layer that the original called; nothing for a component that is not bitroute's."""
    recorded = _recorded_component(candidate, name)
    if recorded is None:
        return
    sources = build(open_pipeline(str(original)).components[name]).sources
    several = len({call["denoiser"] for tape in tapes for call in tape.calls}) > 1
    for entry in recorded.entries:
        inputs = [x for tape in tapes[:LAYER_SAMPLES] for x in tape.layer_inputs(f"{name}/{entry.layer}")]
        if entry.quantized and inputs:
            layer = f"{name}.{entry.layer}" if several else entry.layer
            error = _checked(_layer_error(recorded, entry, sources[entry.name], inputs), layer)
            yield {"layer": layer, "backend": entry.backend.name, "relative_error": error}


def _recorded_component(candidate: Path, name: str) -> RecordedComponent | None:
    if not (candidate / "bitroute.json").is_file():
        return None
    return next((found for found in read_record(candidate).components if found.name == name), None)


def _layer_error(
    recorded: RecordedComponent, entry: RecordedEntry, source: StoredTensor, inputs: Sequence[Tensor]
) -> float:
    """||x(Ŵ - W)ᵀ|| / ||xWᵀ|| in float32, the mean over the calls; x [n, in], W and Ŵ [out, in]."""
    tensors = recorded.component.tensors
    stored = {suffix: read_tensor(tensors[place]) for suffix, (place, _) in entry.tensors.items()}
    weight = read_tensor(source).float()
    decoded = entry.backend.decode(stored, entry.weight)
    errors = [relative_error(x.float() @ decoded.T, x.float() @ weight.T) for x in inputs]
    return sum(errors) / len(errors)


def _work(request: Json) -> None:
    candidate, original, recorded = (Path(request[key]) for key in ("candidate", "original", "recorded"))
    print(json.dumps(asdict(replay(candidate, original, recorded, Sampling(**request["sampling"])))))


if __name__ == "__main__":
    answer(_work)
