"""One way to call every kind of pipeline for one sample: its arguments, the latents of its steps, its frames.

The initial noise comes from a CPU generator, so it is the same on every device. torch draws it in the dtype that the
pipeline asks for, which is the float32 noise rounded to that dtype (for sizes that are multiples of 16, as those of
latents are), so it does not depend on the candidate either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitroute.convert.checkpoint import open_pipeline
from bitroute.errors import JobError, Problem, RecipeError, did_you_mean
from bitroute.eval.inputs import inputs_for
from bitroute.eval.sampling import Sample, Sampling

CALLBACK = "callback_on_step_end"
OWN = {"prompt", "generator", "output_type", "return_dict", CALLBACK, f"{CALLBACK}_tensor_inputs"}  # not the user's


def run_pipeline(pipe: Any, sampling: Sampling, sample: Sample, **options: Any) -> Any:
    """What the pipeline returns for one sample; options: further arguments, before all others.

    Raises:
        JobError: an input picture cannot be read.
    """
    torch.manual_seed(sample.noise_seed)  # some pipelines and schedulers take noise from the global generator too
    with attention(sampling.attention), torch.inference_mode():
        return pipe(**{**arguments(pipe, sampling, sample), **options})


def arguments(pipe: Any, sampling: Sampling, sample: Sample) -> dict[str, Any]:
    """Of the pipeline's call, all by name: prompt, pictures, settings, and a generator with the sample's noise."""
    takes = parameters(type(pipe))
    given: dict[str, Any] = {
        "prompt": sample.prompt, **sampling.call, **inputs_for(sampling.inputs, sample.prompt_index),
        "generator": torch.Generator().manual_seed(sample.noise_seed), "output_type": "pil",
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in takes or name not in OWN}


def parameters(pipeline_class: type) -> Mapping[str, inspect.Parameter]:
    """Of its call, by name; no *args and **kwargs: diffusers ignores what it does not know of the latter."""
    named = inspect.signature(pipeline_class.__call__).parameters.items()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: found for name, found in named if name != "self" and found.kind not in variadic}


def attention(name: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if name == "math" else nullcontext()


@contextmanager
def watch_latents(pipe: Any, keep: Callable[[Tensor], object]) -> Iterator[dict[str, Any]]:
    """Gives `keep` the latents after each step; yields the options that `run_pipeline` needs for it.

    By the pipeline's callback, or where it has none, from its scheduler.
    """
    if CALLBACK in parameters(type(pipe)) and _gives_latents(pipe):

        def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            keep(tensors["latents"])
            return {}

        yield {CALLBACK: after_step}
    elif (scheduler := getattr(pipe, "scheduler", None)) is not None:
        take = scheduler.step

        @wraps(take)  # pipelines look at the signature
        def step(*args: Any, **options: Any) -> Any:
            output = take(*args, **options)
            keep(output[0])
            return output

        scheduler.step = step
        try:
            yield {}
        finally:
            scheduler.step = take
    else:
        yield {}


def _gives_latents(pipe: Any) -> bool:
    """Pipelines that call others do not say what they give; it is the latents."""
    return "latents" in getattr(pipe, "_callback_tensor_inputs", ["latents"])


def frames_of(output: Any) -> list[Image.Image]:
    """The first sample of what a pipeline returned, as RGB; one frame for a picture.

    Raises:
        JobError: it holds neither pictures nor frames.
    """
    batch = getattr(output, "frames", None)
    batch = getattr(output, "images", None) if batch is None else batch
    if batch is None or not len(batch):
        got = type(output).__name__
        raise JobError(
            Problem("the pipeline answers neither pictures nor frames", got=got, expected=".images, .frames")
        )
    return [frame.convert("RGB") for frame in _pictures(batch[0])]


def _pictures(value: Any) -> list[Image.Image]:
    """Of a picture, a list of them, or an array [h, w, c] or [f, h, w, c], or a tensor [f, c, h, w] of 0 … 1."""
    from diffusers.image_processor import VaeImageProcessor

    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, Tensor):
        value = VaeImageProcessor.pt_to_numpy(value if value.ndim == 4 else value.unsqueeze(0))
    pictures = value if isinstance(value, list) else VaeImageProcessor.numpy_to_pil(value)
    return list(pictures)


def check_call(model: Path, sampling: Sampling) -> None:
    """Refuses what the pipeline's class cannot be called with, before anything is loaded.

    Raises:
        RecipeError: an unknown class, arguments that its call does not take, or one that it needs and does not get.
        SourceError: no such pipeline.
    """
    pipeline_class = _class_of(model, sampling)
    if pipeline_class is None:
        return
    takes = parameters(pipeline_class)
    given = {**dict.fromkeys(sampling.call, "--call"), **dict.fromkeys(sampling.inputs, "--input")}
    problems = [problem for name, where in given.items() if (problem := _refusal(pipeline_class, name, where))]
    for name in sampling.call.keys() & sampling.inputs.keys():
        problems.append(Problem(f"the argument {name!r} is given twice", "--input", got="also as --call"))
    if "prompt" not in takes:
        problems.append(Problem(f"{pipeline_class.__name__} takes no prompt", "--pipeline", expected="one that does"))
    needed = [name for name, found in takes.items() if found.default is found.empty]
    for name in sorted(set(needed) - given.keys() - OWN):
        what = f"{pipeline_class.__name__} needs {name!r}"
        problems.append(Problem(what, next_step=f"give --input {name}=FILE, or --call {name}=VALUE"))
    if problems:
        raise RecipeError(problems)


def _refusal(pipeline_class: type, name: str, where: str) -> Problem | None:
    if name in OWN:
        return Problem(f"the argument {name!r} is set by the evaluation itself", where)
    takes = sorted(parameters(pipeline_class).keys() - OWN)
    if name in takes:
        return None
    what, near = f"{pipeline_class.__name__} takes no {name!r}", did_you_mean(name, takes)
    return Problem(what, where, expected=f"one of {', '.join(takes)}", next_step=near)


def _class_of(model: Path, sampling: Sampling) -> type | None:
    """The class that will be called; None for a custom one that is not in diffusers."""
    if sampling.pipeline is not None:
        return find_class(sampling.pipeline)
    name = open_pipeline(str(model)).index.get("_class_name")
    try:
        return find_class(name) if isinstance(name, str) else None
    except RecipeError:
        return None


def find_class(name: str) -> type:
    """A pipeline class of diffusers.

    Raises:
        RecipeError: it has none of this name.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        return found
    known = [word for word in dir(diffusers) if word.endswith("Pipeline") and word != name]
    what, expected = f"diffusers has no pipeline {name[:100]!r} here", "a class such as FluxImg2ImgPipeline"
    raise RecipeError(Problem(what, "--pipeline", expected=expected, next_step=did_you_mean(name, known)))
