"""Calling pipelines of every kind: what their classes take, what they return, whose noise they get."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from bitroute.errors import JobError, RecipeError
from bitroute.eval.calling import check_call, frames_of, run_pipeline, watch_latents
from bitroute.eval.sampling import Sample, Sampling

PLAIN = Sampling(("a fox",), call={"height": 64, "num_inference_steps": 2})


def test_what_the_pipeline_takes_is_accepted(tiny: Path) -> None:
    check_call(tiny, PLAIN)
    check_call(tiny, replace(PLAIN, pipeline="FluxImg2ImgPipeline", inputs={"image": ["a.png"]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pipeline": "FluxImageToImagePipeline"}, "has no pipeline .*did you mean 'Flux.*Pipeline'"),
        ({"pipeline": "FluxTransformer2DModel"}, "has no pipeline"),
        ({"pipeline": ""}, "has no pipeline ''"),
        ({"call": {"guidance": 2.0}}, "FluxPipeline takes no 'guidance'.*did you mean 'guidance_scale'"),
        ({"call": {"prompt": "a cat"}}, "'prompt' is set by the evaluation itself"),
        ({"call": {"output_type": "np"}}, "'output_type' is set by the evaluation itself"),
        ({"inputs": {"image": ["a.png"]}}, "FluxPipeline takes no 'image'"),
        ({"pipeline": "StableDiffusionPipeline", "call": {"heigth": 64}}, "did you mean 'height'"),  # has **kwargs
        ({"pipeline": "WanImageToVideoPipeline"}, "needs 'image'.*--input image=FILE"),
        ({"pipeline": "DDPMPipeline", "call": {}}, "DDPMPipeline takes no prompt"),
        (
            {"pipeline": "FluxImg2ImgPipeline", "call": {"image": "a.png"}, "inputs": {"image": ["a.png"]}},
            "'image' is given twice",
        ),
    ],
)
def test_what_the_pipeline_cannot_be_called_with_is_refused_before_it_is_loaded(
    tiny: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        check_call(tiny, replace(PLAIN, **change))


def test_all_wrong_arguments_are_named_at_once(tiny: Path) -> None:
    wrong = replace(PLAIN, call={"hight": 64, "steps": 2}, inputs={"picture": ["a.png"]})
    with pytest.raises(RecipeError) as error:
        check_call(tiny, wrong)
    assert len(error.value.problems) == 3


def test_a_class_that_is_not_in_diffusers_is_left_to_itself(source: Path) -> None:
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    check_call(source, replace(PLAIN, call={"whatever": 1}))


class Plain(DiffusionPipeline):  # type: ignore[misc]
    """Takes neither a generator nor a callback, and reads its scheduler."""

    def __call__(self, prompt: str, size: int = 8) -> Any:
        latents = torch.randn(size, size, 3)
        for _ in range(2):
            latents = self.scheduler.step(latents)[0]
        return SimpleNamespace(images=latents.sigmoid().numpy()[None])


class Halving:
    def step(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (latents / 2,)


def drawn(sample: Sample) -> tuple[list[torch.Tensor], bytes]:
    pipe, latents = Plain(), list[torch.Tensor]()
    pipe.scheduler = Halving()
    with watch_latents(pipe, latents.append) as options:
        output = run_pipeline(pipe, Sampling(("a",), call={"size": 4}), sample, **options)
    pipe.scheduler.step(torch.zeros(1))  # nobody looks any more
    return latents, frames_of(output)[0].tobytes()


def test_a_pipeline_without_a_generator_repeats_its_noise_and_its_scheduler_shows_the_latents() -> None:
    first, again, other = (drawn(Sample(0, "a", seed)) for seed in (0, 0, 1))
    assert len(first[0]) == 2
    assert torch.equal(first[0][1], first[0][0] / 2)
    assert first[1] == again[1] != other[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 256, 64), (1, 16, 3, 6, 8)])
def test_the_noise_of_every_dtype_is_the_rounded_float32_noise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise, wanted = (
        randn_tensor(shape, generator=torch.Generator().manual_seed(5), dtype=kind) for kind in (dtype, torch.float32)
    )
    assert torch.equal(noise, wanted.to(dtype))


GREY = np.full((2, 3, 3), 128 / 255, dtype=np.float32)


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ({"images": [Image.new("L", (3, 2), 128)]}, 1),
        ({"images": GREY[None]}, 1),
        ({"images": torch.from_numpy(GREY).permute(2, 0, 1)[None]}, 1),
        ({"frames": [[Image.new("RGB", (3, 2), (128, 128, 128))] * 5]}, 5),
        ({"frames": np.stack([GREY] * 5)[None]}, 5),
        ({"frames": torch.from_numpy(np.stack([GREY] * 5)).permute(0, 3, 1, 2)[None]}, 5),
    ],
    ids=["picture", "array", "tensor", "frames", "array of frames", "tensor of frames"],
)
def test_whatever_a_pipeline_returns_becomes_rgb_frames(output: dict[str, Any], count: int) -> None:
    frames = frames_of(SimpleNamespace(**output))
    assert [(frame.size, frame.mode) for frame in frames] == [((3, 2), "RGB")] * count
    assert all(frame.getpixel((0, 0)) == (128, 128, 128) for frame in frames)


@pytest.mark.parametrize("output", [{"audios": np.zeros((1, 100))}, {"images": []}])
def test_a_pipeline_that_draws_nothing_is_refused(output: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="neither pictures nor frames"):
        frames_of(SimpleNamespace(**output))
