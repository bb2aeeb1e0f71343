"""Records what the original's denoiser and text encoders are given and answer, to ask quantized ones the same.

One safetensors file per sample: every call's inputs and output, and at three steps of the first two samples some rows
of the input of each linear layer and convolution. The header's metadata says which tensors make up which call.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitroute.backends.layers import is_convolution
from bitroute.convert.reading import read_json
from bitroute.errors import JobError, Problem, SourceError
from bitroute.eval.apart import Heard, answer, run_apart, tell
from bitroute.eval.calling import parameters, run_pipeline
from bitroute.eval.generate import load
from bitroute.eval.patches import patches
from bitroute.eval.sampling import Sample, Sampling

DENOISERS = ("transformer", "transformer_2", "unet")  # Wan has two transformers, for early and for late steps
PROMPTS = 16  # recorded by default
LAYER_SAMPLES = 2
LAYER_ROWS = 42  # of each call; with three calls of two samples about 256, 1.3 GB for FLUX.1-dev


def recording_of(model: Path, sampling: Sampling, store: Path, prompts: int = PROMPTS) -> Path:
    """The folder of a recording among the pictures that are kept in `store`."""
    return store / f"{sampling.key(model)}-recorded-{prompts}"


def record_apart(
    model: Path, sampling: Sampling, folder: Path, prompts: int = PROMPTS, heard: Heard | None = None
) -> None:
    """Records the first prompts, with the first seed, in a fresh process.

    Raises:
        JobError: diffusers cannot load or run the pipeline, or it has no denoiser of a known name.
    """
    if not _is_finished(sampling, folder, prompts):
        request = {"model": str(model), "folder": str(folder), "prompts": prompts, "sampling": sampling.request()}
        run_apart("bitroute.eval.recording", request, "the pipeline cannot be recorded", model, heard)


def record(model: Path, sampling: Sampling, folder: Path, prompts: int = PROMPTS) -> None:
    """Writes `<sample>.safetensors` for each sample, then run.json; an unfinished recording is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if _is_finished(sampling, folder, prompts):
            return
        torch.set_num_threads(sampling.threads)
        recorder = Recorder(load(model, sampling.device, pipeline=sampling.pipeline))
        samples = recorded_samples(sampling, prompts)
        for index, sample in enumerate(samples):
            tape = recorder.record(sampling, sample, layers=index < LAYER_SAMPLES)
            tape.save(folder / f"{sample.stem}.safetensors")
            tell(index + 1, len(samples))
        content = {
            "samples": [sample.stem for sample in samples], "denoisers": list(recorder.denoisers),
            "text_encoders": [name for name, whole in recorder.encoders.items() if whole],
        }  # fmt: skip
        partial_file = folder / "run.json.part"
        partial_file.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial_file, folder / "run.json")


def recorded_samples(sampling: Sampling, prompts: int) -> list[Sample]:
    first = sampling.seeds[0]
    return [sample for sample in sampling.samples() if sample.prompt_index < prompts and sample.seed == first]


def _is_finished(sampling: Sampling, folder: Path, prompts: int) -> bool:
    """Damaged files count as missing ones."""
    stems = [sample.stem for sample in recorded_samples(sampling, prompts)]
    try:
        run = read_json(folder / "run.json")
        for stem in stems:
            open_tensors(folder / f"{stem}.safetensors")
    except (SourceError, JobError):
        return False
    return run.get("samples") == stems and "text_encoders" in run


def open_tensors(file: Path) -> Any:
    """A safetensors file of the cache, whose tensors are read when they are asked for.

    Raises:
        JobError: it is missing, cut off or no such file; names the folder to remove.
    """
    opened: Any = safe_open
    try:
        return opened(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise damaged(file, str(error)) from error


def damaged(file: Path, got: str) -> JobError:
    next_step = f"remove {file.parent} and evaluate again"
    return JobError(Problem("a file of the cache is damaged", str(file), got, next_step=next_step))


@dataclass
class Tape:
    """What was recorded of one sample; its tensors lie in main memory, equal ones once."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)  # the calls of the text encoders
    timesteps: list[float] = field(default_factory=list)  # of the steps that are finished
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: bool = False  # whether the layers' inputs are recorded

    def save(self, file: Path) -> None:
        lists = {"calls": self.calls, "texts": self.texts, "timesteps": self.timesteps}
        metadata = {name: json.dumps(content) for name, content in lists.items()}
        unfinished = file.with_name(f"{file.name}.part")
        save_file(self.tensors, unfinished, metadata)
        os.replace(unfinished, file)

    def add(self, tensor: Tensor) -> str:
        """Stores a copy, because pipelines change their latents in place; returns its name."""
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        content = copy.reshape(-1).view(torch.uint8).numpy()
        name = hashlib.sha256(f"{copy.dtype} {list(copy.shape)} ".encode() + content.tobytes()).hexdigest()[:32]
        self.tensors.setdefault(name, copy)
        return name

    def pack(self, value: Any) -> dict[str, Any]:
        """An argument as JSON, its tensors by name.

        Raises:
            JobError: the argument holds something else than tensors, numbers, texts, lists and mappings.
        """
        if isinstance(value, Tensor):
            return {"tensor": self.add(value), "device": value.device.type}
        if isinstance(value, Mapping):
            return {"dict": {str(key): self.pack(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [self.pack(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise JobError(Problem("a model is called with what cannot be recorded", got=type(value).__name__))


class Recorder:
    """A pipeline whose denoisers and text encoders write every call onto the current tape."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.tape = pipe, Tape()
        self.encoders: dict[str, bool] = {}  # those that were called → whether every call could be recorded
        self.denoisers = {name: model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None}
        if not self.denoisers:
            expected = f"one of {', '.join(DENOISERS)}"
            raise JobError(Problem("the pipeline has no known denoiser", got=type(pipe).__name__, expected=expected))
        for name, model in self.denoisers.items():
            model.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            model.register_forward_hook(self._after)
            for layer, module in model.named_modules():
                if isinstance(module, nn.Linear) or is_convolution(module):
                    module.register_forward_pre_hook(partial(self._layer, f"{name}/{layer}"))
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                part.register_forward_hook(partial(self._encoded, name), with_kwargs=True)
        self._count_steps()

    def record(self, sampling: Sampling, sample: Sample, layers: bool) -> Tape:
        """Draws one sample up to its latents; same noise as for its picture."""
        self.tape = Tape(layers=layers)
        latent = {"output_type": "latent"} if "output_type" in parameters(type(self.pipe)) else {}
        run_pipeline(self.pipe, sampling, sample, **latent)
        return self.tape

    def _count_steps(self) -> None:
        """A step ends with the scheduler's; guidance may call the denoiser several times before."""
        take = self.pipe.scheduler.step

        @wraps(take)  # pipelines look at the signature
        def step(output: Any, timestep: Any, *args: Any, **options: Any) -> Any:
            self.tape.timesteps.append(float(timestep))
            return take(output, timestep, *args, **options)

        self.pipe.scheduler.step = step

    def _before(self, name: str, _: nn.Module, args: Any, options: dict[str, Any]) -> None:
        inputs = {"args": self.tape.pack(list(args)), "kwargs": self.tape.pack(options)}
        self.tape.calls.append({"denoiser": name, "step": len(self.tape.timesteps), **inputs})

    def _after(self, _: nn.Module, args: Any, output: Any) -> None:
        self.tape.calls[-1]["output"] = self.tape.add(flat_output(output))

    def _encoded(self, name: str, model: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
        """An encoder of which one call cannot be recorded, such as one with a cache of keys, is left out."""
        if not self.encoders.setdefault(name, True):
            return
        mask = inspect.signature(model.forward).bind(*args, **options).arguments.get("attention_mask")
        packed = {"args": list(args), "kwargs": options, "mask": mask}
        try:
            call = {what: self.tape.pack(content) for what, content in packed.items()}
            outputs = {answer: self.tape.add(tensor) for answer, tensor in encodings(output).items()}
        except JobError:
            self.encoders[name] = False
        else:
            self.tape.texts.append({"encoder": name, **call, "outputs": outputs})

    def _layer(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        steps = len(self.pipe.scheduler.timesteps)
        if self.tape.layers and args and len(self.tape.timesteps) in (0, steps // 2, steps - 1):
            chosen = (_rows if isinstance(module, nn.Linear) else patches)(args[0].detach(), module, LAYER_ROWS)
            self.tape.tensors[f"{name}/{len(self.tape.calls)}"] = chosen.to("cpu", copy=True).contiguous()


def _rows(x: Tensor, layer: nn.Module, most: int) -> Tensor:
    """At most so many of the rows [n, in] of a linear layer's input, spread evenly."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[:: max(1, -(-len(rows) // most))]


def flat_output(output: Any) -> Tensor:
    """The first thing that a denoiser returns, as one vector: it is a tensor, or a list of one for each picture."""
    return torch.cat([tensor.reshape(-1) for tensor in _tensors(output if isinstance(output, Tensor) else output[0])])


def encodings(output: Any) -> dict[str, Tensor]:
    """What pipelines can take of a text encoder's answer, by name: the last hidden state first, then pooled ones.

    Of all layers' hidden states the last one's, though some pipelines take an earlier one; never logits, which are
    huge and which no pipeline takes.

    Raises:
        JobError: there is no tensor in the answer.
    """
    if isinstance(output, Mapping):
        answers = dict(output)
    else:
        answers = {str(n): item for n, item in enumerate(output if isinstance(output, list | tuple) else [output])}
    hidden = answers.pop("hidden_states", None)
    answers = {**({"hidden_states": hidden[-1]} if hidden else {}), **answers}
    found = {name: x for name, x in answers.items() if isinstance(x, Tensor) and name != "logits"}
    if not found:
        raise JobError(Problem("a text encoder's answer cannot be recorded", got=type(output).__name__))
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _work(request: dict[str, Any]) -> None:
    sampling = Sampling(**request["sampling"])
    record(Path(request["model"]), sampling, Path(request["folder"]), request["prompts"])


if __name__ == "__main__":
    answer(_work)
