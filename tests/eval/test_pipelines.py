"""Every kind of pipeline from drawing to verdict: UNet, image to image, editing, without callbacks, video.

The models are tiny and random, but their pictures are not flat and they follow their prompts' noise: enough to tell a
copy from a perturbed one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    HeunDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel, UMT5Config, UMT5EncoderModel

import bitroute
from bitroute.eval.calling import check_call
from bitroute.eval.generate import draw, draw_apart
from bitroute.eval.inputs import parse_inputs
from bitroute.eval.recording import record, record_apart
from bitroute.eval.replay import replay, replay_apart
from bitroute.eval.report import describe
from bitroute.eval.sampling import Sampling
from bitroute.eval.scores import HIGHER_IS_BETTER, read_pictures, score
from bitroute.eval.tripwires import bad_pictures

PROMPTS = ("red apple, noto style", "fox, fluent style")
SMALL = {"height": 64, "width": 64, "num_inference_steps": 3}
STABLE = {**SMALL, "guidance_scale": 5.0}
FLUX = {**SMALL, "max_sequence_length": 16}


@dataclass(frozen=True)
class Kind:
    """steps: how many latents are kept. frames: of a video. noise: of the perturbed copy's matrices, relative."""

    folder: Path
    sampling: Sampling
    steps: int = 3
    frames: int | None = None
    denoiser: str = "transformer"
    noise: float = 0.05


def tokenizer(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip


def stable_diffusion(tiny: Path, scheduler: Any) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet, vae=small_vae(), text_encoder=CLIPTextModel.from_pretrained(tiny / "text_encoder"),
        tokenizer=tokenizer(tiny / "tokenizer"), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def pixart(tiny: Path) -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=128, use_additional_conditions=False,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    return PixArtSigmaPipeline(
        transformer=transformer, vae=small_vae(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=T5EncoderModel.from_pretrained(tiny / "text_encoder_2"),
        tokenizer=tokenizer(tiny / "tokenizer_2"),
    )  # fmt: skip


def wan(tiny: Path) -> WanPipeline:
    words = tokenizer(tiny / "tokenizer_2")
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text = UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return WanPipeline(
        tokenizer=words, text_encoder=UMT5EncoderModel(text), transformer=transformer, vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Kind]:
    root = tmp_path_factory.mktemp("kinds")
    Image.effect_noise((64, 64), 60).save(root / "noise.png")
    Image.linear_gradient("L").resize((64, 64)).save(root / "ramp.png")
    torch.manual_seed(0)
    plain = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    made = {
        "stable": stable_diffusion(tiny, plain),
        "heun": stable_diffusion(tiny, HeunDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)),
        "pixart": pixart(tiny), "wan": wan(tiny),
    }  # fmt: skip
    for name, pipe in made.items():  # in float32, as some VAEs are published
        pipe.save_pretrained(root / name)
    one, two = (parse_inputs([f"image={root / f'{name}.png'}" for name in names], 2)
                for names in (["ramp"], ["ramp", "noise"]))  # fmt: skip
    video = {**SMALL, "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    image, edit, stable = "FluxImg2ImgPipeline", "FluxKontextPipeline", "StableDiffusionImg2ImgPipeline"
    unscaled = {**FLUX, "max_area": 4096, "_auto_resize": False}
    bare = {"num_inference_steps": 4, "strength": 0.5}
    return {
        "UNet": Kind(root / "stable", Sampling(PROMPTS, (0,), STABLE), denoiser="unet"),
        "UNet, second order": Kind(root / "heun", Sampling(PROMPTS, (0,), STABLE), steps=5, denoiser="unet"),
        "UNet, image to image": Kind(
            root / "stable", Sampling(PROMPTS, (0,), bare, pipeline=stable, inputs=one), steps=2, denoiser="unet"
        ),
        "image to image": Kind(
            tiny, Sampling(PROMPTS, (0,), {**FLUX, "strength": 0.6}, pipeline=image, inputs=two), steps=2
        ),
        "editing": Kind(tiny, Sampling(PROMPTS, (0,), unscaled, pipeline=edit, inputs=one)),
        "no callback": Kind(root / "pixart", Sampling(PROMPTS, (0,), {**SMALL, "use_resolution_binning": False})),
        "video": Kind(root / "wan", Sampling(PROMPTS, (0,), video), frames=5, noise=0.3),
    }


NAMES = ["UNet", "UNet, second order", "UNet, image to image", "image to image", "editing", "no callback", "video"]


@pytest.fixture(scope="module")
def perturb(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """A copy whose denoiser's matrices have noise."""

    def perturb(kind: Kind) -> Path:
        copy = Path(shutil.copytree(kind.folder, tmp_path_factory.mktemp("perturbed") / "perturbed"))
        file = next((copy / kind.denoiser).glob("*.safetensors"))
        generator, tensors = torch.Generator().manual_seed(0), load_file(file)
        for name, weight in tensors.items():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
                tensors[name] = (weight + kind.noise * noise).to(weight.dtype)
        save_file(tensors, file, {"format": "pt"})
        return copy

    return perturb


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_draws_the_same_and_a_perturbed_one_measurably_other_pictures(
    kinds: Mapping[str, Kind], perturb: Callable[[Kind], Path], name: str, tmp_path: Path
) -> None:
    kind = kinds[name]
    check_call(kind.folder, kind.sampling)
    models = {"original": kind.folder, "twin": shutil.copytree(kind.folder, tmp_path / "copy"), "other": perturb(kind)}
    for role, model in models.items():
        draw(Path(model), kind.sampling, tmp_path / role)
    samples = list(kind.sampling.samples())
    original, twin, other = (read_pictures(tmp_path / role, samples) for role in models)
    side = 32 if kind.frames else 64
    assert original[0].shape == ((kind.frames, 3, side, side) if kind.frames else (3, side, side))
    assert list(bad_pictures(samples, original, tmp_path / "original")) == []
    assert score(samples, original, twin).identical
    best, found = score(samples, original, original), score(samples, original, other)
    for metric, higher in HIGHER_IS_BETTER.items():
        assert (found.mean(metric) < best.mean(metric)) is higher, metric
    assert 15 < found.mean("psnr") < 60


@pytest.mark.parametrize("name", NAMES)
def test_the_latents_of_every_step_are_kept_and_no_two_are_the_same(
    kinds: Mapping[str, Kind], name: str, tmp_path: Path
) -> None:
    kind = kinds[name]
    draw(kind.folder, kind.sampling, tmp_path)
    first, second = (load_file(tmp_path / f"000{index}-0.safetensors") for index in range(2))
    assert sorted(first) == sorted(second) == [f"latents/{step}" for step in range(kind.steps)]
    assert len({found.shape for found in first.values()}) == 1
    steps = list(first.values())
    assert not any(torch.equal(before, after) for before, after in pairwise(steps))
    assert all(not torch.equal(first[step], second[step]) for step in first)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_answers_the_originals_calls_without_error_and_a_perturbed_one_does_not(
    kinds: Mapping[str, Kind], perturb: Callable[[Kind], Path], name: str, tmp_path: Path
) -> None:
    kind = kinds[name]
    record(kind.folder, kind.sampling, tmp_path)
    same, other = (
        replay(model, kind.folder, tmp_path, kind.sampling).trajectory["timesteps"]
        for model in (kind.folder, perturb(kind))
    )
    assert len(same) == len(other) == kind.steps
    assert all(step["relative_error"] == 0 for step in same)
    assert all(0.001 < step["relative_error"] < 1 for step in other)


def test_input_pictures_reach_the_processes_that_draw_record_and_replay(
    kinds: Mapping[str, Kind], perturb: Callable[[Kind], Path], tmp_path: Path
) -> None:
    kind, other = kinds["image to image"], perturb(kinds["image to image"])
    assert draw_apart(kind.folder, kind.sampling, tmp_path / "apart")["pictures"] == 2
    draw(kind.folder, kind.sampling, tmp_path / "here")
    pictures = [[file.read_bytes() for file in sorted((tmp_path / f).glob("*.png"))] for f in ("apart", "here")]
    assert pictures[0] == pictures[1]
    record_apart(kind.folder, kind.sampling, tmp_path / "recorded")
    found = replay_apart(other, kind.folder, tmp_path / "recorded", kind.sampling, tmp_path / "replayed")
    assert found == replay(other, kind.folder, tmp_path / "recorded", kind.sampling)


@pytest.mark.parametrize("name", ["UNet", "editing", "video"])
def test_an_evaluation_tells_a_copy_from_a_perturbed_one(
    kinds: Mapping[str, Kind], perturb: Callable[[Kind], Path], fill: Callable[..., None], name: str, tmp_path: Path
) -> None:
    kind, other = kinds[name], perturb(kinds[name])
    twin = Path(shutil.copytree(kind.folder, tmp_path / "twin"))
    fill(tmp_path / "cache", kind.folder, [twin, other], kind.sampling)
    found = bitroute.evaluate(
        str(kind.folder), [str(twin), str(other)], kind.sampling, denoiser=name == "video", cache=tmp_path / "cache"
    )
    same, perturbed = found.candidates
    assert same.closeness == "identical" and "nothing is quantized" in same.tripwires[0]
    assert perturbed.closeness == "" and not perturbed.tripwires and perturbed.scores
    assert 15 < perturbed.scores.mean("psnr") < 60
    assert [0 < step["relative_error"] < 1 for step in perturbed.drift] == [True] * kind.steps
    if name == "video":
        assert perturbed.replay and len(perturbed.replay.trajectory["timesteps"]) == kind.steps
    described = describe(found)
    assert described["sampling"]["inputs"] == ({"image": ["ramp.png"]} if name == "editing" else {})
    assert any("means over its frames" in note for note in described["notes"]) is (name == "video")
