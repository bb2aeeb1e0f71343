"""Convolutions count in the replay: their recorded patches times their weight are their output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

import bitroute
from bitroute.eval.patches import patches
from bitroute.eval.recording import LAYER_ROWS, record
from bitroute.eval.replay import replay
from bitroute.eval.sampling import Sampling
from bitroute.eval.weights import weigh

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {  # a convolution, and the size of a picture for it
    "1d": (lambda: nn.Conv1d(3, 4, 5, stride=2, padding=3), (17,)),
    "1×1": (lambda: nn.Conv2d(3, 4, 1), (5, 4)),
    "strided": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(0, 2)), (7, 8)),
    "dilated": (lambda: nn.Conv2d(3, 4, (2, 3), dilation=2, padding="same"), (7, 8)),
    "3d": (lambda: nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), (3, 5, 4)),
}
RECIPE = "components:\n  unet:\n    keep: none\n    rules: [{role: convolution, backend: int8}]\n"


@pytest.mark.parametrize("name", LAYERS)
def test_a_patch_times_the_weight_is_the_output_at_its_place(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](), torch.randn(2, 3, *LAYERS[name][1])
    output = layer(x).movedim(1, -1).flatten(0, -2)
    found = patches(x, layer, len(output))
    torch.testing.assert_close(found @ layer.weight.flatten(1).T + layer.bias, output)


@pytest.mark.parametrize(("most", "step"), [(10, 13), (128, 1), (1000, 1), (127, 2)])
def test_fewer_patches_are_spread_evenly(most: int, step: int) -> None:
    x = torch.arange(128.0).reshape(2, 1, 8, 8)
    found = patches(x, nn.Conv2d(1, 1, 1), most)
    assert found.flatten().tolist() == list(range(0, 128, step)) and len(found) <= most


@pytest.fixture(scope="module")
def stable_diffusion(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=64, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=8, block_out_channels=(16,))
    pipe = StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=CLIPTextModel.from_pretrained(tiny / "text_encoder"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tiny / "tokenizer"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stable-diffusion")
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def candidate(stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("candidate")
    (place / "recipe.yaml").write_text(RECIPE)
    return bitroute.quantize(str(place / "recipe.yaml"), model=str(stable_diffusion), out=place / "out")


def test_the_replay_has_the_error_of_every_convolution(stable_diffusion: Path, candidate: Path, tmp_path: Path) -> None:
    call = {"height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 5.0}
    sampling = Sampling(("red apple, noto style",), (0,), call)
    record(stable_diffusion, sampling, tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        rows = file.get_tensor("unet/down_blocks.0.resnets.0.conv1/1")
    assert rows.shape[1] == 16 * 9 and 20 < len(rows) <= LAYER_ROWS
    found = {layer["layer"]: layer for layer in replay(candidate, stable_diffusion, tmp_path, sampling).layers}
    assert {"conv_in", "conv_out", "up_blocks.0.upsamplers.0.conv"} <= found.keys()
    assert all(0 < layer["relative_error"] < 0.02 and len(layer["steps"]) == 3 for layer in found.values())


def test_the_weights_section_counts_them(stable_diffusion: Path, candidate: Path) -> None:
    found = weigh(candidate, stable_diffusion)["unet"]
    assert 8 < found["bits_per_weight"] < 8.4 and 0 < found["relative_error"] < 0.01
    assert "conv" in found["layers"][0]["layer"]
