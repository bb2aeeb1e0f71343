"""Asks a quantized denoiser what the original's was asked: its error at every step, and that of every layer.

Each step starts from the original's latents, so errors of earlier steps do not add up: what is seen is the format.
Text encoders whose weights differ are asked the same too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

import bitroute  # noqa: F401  registers the loader of bitroute's own container
from bitroute.convert.architecture import build
from bitroute.convert.checkpoint import Component, open_pipeline
from bitroute.convert.layout import StoredTensor
from bitroute.convert.loading import lift_gpu_check
from bitroute.convert.opening import open_recorded
from bitroute.convert.reading import read_json, read_tensor
from bitroute.convert.record import RecordedComponent, RecordedEntry, read_record
from bitroute.errors import JobError, Problem, SourceError
from bitroute.eval.apart import Heard, answer, run_apart, tell
from bitroute.eval.calling import attention
from bitroute.eval.intervals import summarize
from bitroute.eval.recording import LAYER_SAMPLES, damaged, encodings, flat_output, open_tensors
from bitroute.eval.sampling import Sampling
from bitroute.eval.tripwires import same_weights

Json = dict[str, Any]


@dataclass(frozen=True)
class Replay:
    """As the report has them (docs/report.md); layers is empty for checkpoints of other tools.

    text: of each text encoder whose weights are not the original's, whichever encoders the pictures were drawn with.
    """

    trajectory: Mapping[str, Sequence[Json]]
    layers: Sequence[Json]
    text: Mapping[str, Json] = field(default_factory=dict)


def replay_apart(
    candidate: Path, original: Path, recorded: Path, sampling: Sampling, cache: Path, heard: Heard | None = None
) -> Replay:
    """Replays a folder that `record_apart` wrote, in a fresh process, once: `cache` is the folder of its result.

    Raises:
        JobError: the candidate's models cannot be loaded or run, or answer NaN or infinite values.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "replay.json"
    with FileLock(cache / "lock"):
        if kept := read_kept(file):
            return kept
        paths = {"candidate": str(candidate), "original": str(original), "recorded": str(recorded), "file": str(file)}
        request = {**paths, "sampling": sampling.request()}
        run_apart("bitroute.eval.replay", request, "the candidate cannot be replayed", candidate, heard)
        if made := read_kept(file):
            return made
    raise damaged(file, "no result")


def keep(found: Replay, file: Path) -> None:
    """Writes the whole file or none."""
    content = asdict(found)
    partial_file = file.with_name(f"{file.name}.part")
    partial_file.write_text(json.dumps({"sha256": _digest(content), "replay": content}), encoding="utf-8")
    os.replace(partial_file, file)


def read_kept(file: Path) -> Replay | None:
    """What `keep` wrote; None where there is no such file, or one that was changed."""
    try:
        content = read_json(file)
        found = Replay(**content["replay"])
    except (SourceError, KeyError, TypeError):
        return None
    return found if content.get("sha256") == _digest(content["replay"]) else None


def _digest(content: Json) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def replay(candidate: Path, original: Path, recorded: Path, sampling: Sampling) -> Replay:
    """As `replay_apart`, in this process."""
    torch.set_num_threads(sampling.threads)
    run = read_json(recorded / "run.json")
    tapes = [Recorded(recorded / f"{stem}.safetensors") for stem in run["samples"]]
    errors = [error for name in run["denoisers"] for error in _call_errors(candidate, name, tapes, sampling)]
    text = dict(_text_errors(candidate, original, run["text_encoders"], tapes, sampling))
    layers = [layer for name in run["denoisers"] for layer in _layer_errors(candidate, original, name, tapes)]
    worst_first = sorted(layers, key=lambda layer: layer["relative_error"], reverse=True)
    return Replay({"timesteps": list(_steps(errors)), "prompts": list(_prompts(errors))}, worst_first, text)


class Recorded:
    """One sample's file; tensors are read when they are asked for."""

    def __init__(self, file: Path) -> None:
        self.file = open_tensors(file)
        metadata = self.file.metadata() or {}
        if missing := {"calls", "texts", "timesteps"} - metadata.keys():
            raise damaged(file, f"no {', '.join(sorted(missing))} in its header")
        self.calls: list[Json] = json.loads(metadata["calls"])
        self.texts: list[Json] = json.loads(metadata["texts"])
        self.timesteps: list[float] = json.loads(metadata["timesteps"])
        self.names: list[str] = list(self.file.keys())

    @cached_property
    def given(self) -> set[str]:
        """The names of the tensors that a denoiser was given."""
        return {name for call in self.calls for part in ("args", "kwargs") for name in _tensor_names(call[part])}

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

    def layer_inputs(self, layer: str) -> Iterator[tuple[int, Tensor]]:
        """The step and rows [n, in] of each recorded call."""
        for name in self.names:
            recorded, _, call = name.rpartition("/")
            if recorded == layer:
                yield self.calls[int(call) - 1]["step"], self.read(name)


def _tensor_names(packed: Json) -> Iterator[str]:
    [(kind, content)] = [item for item in packed.items() if item[0] != "device"]
    if kind == "tensor":
        yield content
    elif kind != "value":
        for item in content.values() if kind == "dict" else content:
            yield from _tensor_names(item)


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


def checked_error(found: Tensor, wanted: Tensor, where: str) -> float:
    """As `relative_error`. Raises JobError where it is not finite, or the shapes differ."""
    if found.shape != wanted.shape:
        got, expected = str(list(found.shape)), f"{list(wanted.shape)}, as the original's"
        raise JobError(Problem("the output has another shape", where, got, expected))
    error = relative_error(found, wanted)
    if math.isfinite(error):
        return error
    raise JobError(Problem("the output cannot be compared", where, got=f"relative error {error}", expected="a number"))


def _ask(model: Any, tape: Recorded, call: Json, sampling: Sampling) -> Any:
    args, options = (tape.unpack(call[part], sampling.device) for part in ("args", "kwargs"))
    with attention(sampling.attention), torch.inference_mode():
        return model(*args, **options)


def _call_errors(candidate: Path, name: str, tapes: Sequence[Recorded], sampling: Sampling) -> Iterator[CallError]:
    component = open_pipeline(str(candidate)).components.get(name)
    if component is None:
        raise JobError(Problem(f"the candidate has no {name!r}", str(candidate), expected="the original's components"))
    model = load_model(component, sampling.device)
    for prompt, tape in enumerate(tapes):
        for call in tape.calls:
            if call["denoiser"] != name:
                continue
            step, output = call["step"], flat_output(_ask(model, tape, call, sampling))
            error = checked_error(output.cpu(), tape.read(call["output"]), f"{name}, step {step}")
            timestep = tape.timesteps[step] if step < len(tape.timesteps) else None
            yield CallError(prompt, step, timestep, error)
        tell(prompt + 1, len(tapes))


def load_model(component: Component, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        lift_gpu_check()
    model_class = getattr(diffusers if component.library == "diffusers" else transformers, component.class_name)
    model, info = model_class.from_pretrained(component.folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):  # the libraries give them random values and only warn
        what = f"{len(missing)} tensors of {component.name!r} are not in the checkpoint"
        raise JobError(Problem(what, str(component.folder.parent), got=", ".join(missing[:3])))
    return model if device == "cpu" else model.to(device)


def mean_error(errors: Sequence[float], prompts: Sequence[int]) -> Json:
    """The mean of finite errors of these prompts with its interval, as the report has it."""
    mean = summarize(errors, prompts, higher_is_better=False).mean
    return {"relative_error": mean.value, "low": mean.low, "high": mean.high}


def _steps(errors: Iterable[CallError]) -> Iterator[Json]:
    by_step: dict[int, list[CallError]] = {}
    for error in errors:
        by_step.setdefault(error.step, []).append(error)
    for step, found in sorted(by_step.items()):
        where = {"step": step, "timestep": found[0].timestep}
        yield {**where, **mean_error([error.relative_error for error in found], [error.prompt for error in found])}


def _prompts(errors: Iterable[CallError]) -> Iterator[Json]:
    """Every step counts alike, however often guidance calls the denoiser in it."""
    by_prompt: dict[int, dict[int, list[float]]] = {}
    for error in errors:
        by_prompt.setdefault(error.prompt, {}).setdefault(error.step, []).append(error.relative_error)
    for prompt, steps in sorted(by_prompt.items()):
        yield {"prompt": prompt, "relative_error": fmean(fmean(found) for found in steps.values())}


def _text_errors(
    candidate: Path, original: Path, names: Iterable[str], tapes: Sequence[Recorded], sampling: Sampling
) -> Iterator[tuple[str, Json]]:
    """Of each text encoder whose weights are not the original's; one that the candidate lacks is none of its own."""
    first, second = open_pipeline(str(original)).components, open_pipeline(str(candidate)).components
    for name in names:
        if name in first and name in second and not same_weights(first[name], second[name]):
            yield name, _text_error(second[name], tapes, sampling)


def _text_error(component: Component, tapes: Sequence[Recorded], sampling: Sampling) -> Json:
    model, errors, prompts = load_model(component, sampling.device), [], []
    for prompt, tape in enumerate(tapes):
        for call in tape.texts:
            if call["encoder"] == component.name:
                found, wanted = _answers(model, tape, call, sampling)
                errors.append(checked_error(found, wanted, f"{component.name}, prompt {prompt}"))
                prompts.append(prompt)
    return {**mean_error(errors, prompts), "prompts": len(set(prompts))}


def _answers(model: Any, tape: Recorded, call: Json, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Found and wanted: the encoding that the denoiser was given as it is (Flux: T5's of every token, CLIP's pooled).

    Where pipelines cut, pad or join encodings before, it is the encoder's first one: the last hidden state. Tokens
    that the encoder's attention mask hides do not count.
    """
    names: Json = call["outputs"]
    answer = next((answer for answer, name in names.items() if name in tape.given), next(iter(names)))
    answers = encodings(_ask(model, tape, call, sampling))
    if answer not in answers:
        raise JobError(Problem("the text encoder answers in another form", got=", ".join(answers), expected=answer))
    mask = tape.unpack(call["mask"], "cpu")
    return _seen(answers[answer].cpu(), mask), _seen(tape.read(names[answer]), mask)


def _seen(encoding: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that a mask [batch, tokens] shows of an encoding [batch, tokens, width]; other encodings whole."""
    if mask is None or encoding.ndim != 3 or mask.shape != encoding.shape[:2]:
        return encoding
    return encoding[mask.bool()]


def _layer_errors(candidate: Path, original: Path, name: str, tapes: Sequence[Recorded]) -> Iterator[Json]:
    """One for each quantized layer that the original called; nothing for a component that is not bitroute's."""
    recorded = _recorded_component(candidate, name)
    if recorded is None:
        return
    source = open_recorded(read_record(candidate), str(original))
    sources = build(source.components[name]).sources
    several = len({call["denoiser"] for tape in tapes for call in tape.calls}) > 1
    for entry in recorded.entries:
        inputs = [x for tape in tapes[:LAYER_SAMPLES] for x in tape.layer_inputs(f"{name}/{entry.layer}")]
        if entry.quantized and inputs:
            layer = f"{name}.{entry.layer}" if several else entry.layer
            steps = _layer_error(recorded, entry, sources[entry.name], inputs, layer)
            yield {
                "layer": layer, "backend": entry.backend.name, "relative_error": fmean(steps.values()),
                "steps": [{"step": step, "relative_error": error} for step, error in sorted(steps.items())],
            }  # fmt: skip


def _recorded_component(candidate: Path, name: str) -> RecordedComponent | None:
    if not (candidate / "bitroute.json").is_file():
        return None
    return next((found for found in read_record(candidate).components if found.name == name), None)


def _layer_error(
    recorded: RecordedComponent, entry: RecordedEntry, source: StoredTensor, inputs: Sequence[tuple[int, Tensor]],
    where: str,
) -> dict[int, float]:  # fmt: skip
    """Step → ||x(Ŵ - W)ᵀ|| / ||xWᵀ|| in float32, the mean over its calls; x [n, in], W and Ŵ [out, in].

    Of a convolution, x is patches and `in` counts the kernel too.
    """
    tensors = recorded.component.tensors
    stored = {suffix: read_tensor(tensors[place]) for suffix, (place, _) in entry.tensors.items()}
    weight = read_tensor(source).float().flatten(1)
    decoded = entry.backend.decode(stored, entry.weight)
    errors: dict[int, list[float]] = {}
    for step, x in inputs:
        errors.setdefault(step, []).append(checked_error(x.float() @ decoded.T, x.float() @ weight.T, where))
    return {step: fmean(found) for step, found in errors.items()}


def _work(request: Json) -> None:
    candidate, original, recorded, file = (Path(request[key]) for key in ("candidate", "original", "recorded", "file"))
    keep(replay(candidate, original, recorded, Sampling(**request["sampling"])), file)


if __name__ == "__main__":
    answer(_work)
