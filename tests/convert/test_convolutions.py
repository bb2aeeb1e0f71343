"""A trained U-Net and a trained text encoder in int8, float8 and nf4, with their convolutions: errors, and loading.

tests/data/unet/train.py made the U-Net; the text encoder is the T5 of the bundled pipeline. Measured relative errors of
the predicted noise: int8 0.6 %, float8 1.1 %, nf4 with int8 convolutions 0.9 %.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from families import write_index
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from bitroute import dequantize, quantize, verify
from bitroute.backends.layers import QuantizedConvolution
from bitroute.convert.fidelity import LayerQuality

UNET = Path(__file__).parents[1] / "data" / "unet"
MIXES = {"int8": "int8", "float8": "float8", "nf4": "int8"}  # backend of linear layers → of convolutions
# relative error of all linear layers of a model, as Gaussian weights have it in rows of 3072, and of one layer, as
# Laplace weights do. float8: half a step of E4M3; nf4: with searched scales
ERRORS = {"int8": (0.0085, 0.0140), "float8": (0.0265, 0.0265), "nf4": (0.0860, 0.0974)}
FORWARD = {"int8": 0.01, "float8": 0.02, "nf4": 0.02}  # relative error of the predicted noise
RECIPE = """
components:
  unet:
    backend: {linear}
    options: {options}
    rules: [{{role: convolution, backend: {convolution}}}]
  text_encoder: {{backend: {linear}, options: {options}}}
"""
FRESH = """
import sys, torch
import bitroute
from diffusers import UNet2DConditionModel
inputs, *models = sys.argv[1:]
given = torch.load(inputs)
for model in models:
    unet = UNet2DConditionModel.from_pretrained(model, torch_dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.save(unet(**given).sample, f"{model}.pt")
"""


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(UNET, folder / "unet", ignore=shutil.ignore_patterns("*.py"))
    shutil.copytree(tiny / "text_encoder_2", folder / "text_encoder")
    write_index(folder, {"unet": "UNet2DConditionModel", "text_encoder": "T5EncoderModel"})
    return folder


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("made")
    for linear, convolution in MIXES.items():
        options = "{scale: mse}" if linear == "nf4" else "{}"
        text = RECIPE.format(linear=linear, convolution=convolution, options=options)
        (place / f"{linear}.yaml").write_text(text)
    return {name: quantize(str(place / f"{name}.yaml"), model=str(trained), out=place / name) for name in MIXES}


def relative(layers: list[LayerQuality]) -> float:
    """||ŵ-w|| / ||w|| of all of them together."""
    return math.sqrt(sum(layer.noise for layer in layers) / sum(layer.signal for layer in layers))


@pytest.mark.parametrize("mix", MIXES)
def test_every_layer_of_trained_models_stays_under_the_error_of_its_format(mix: str, made: dict[str, Path]) -> None:
    found = verify(made[mix], load=False)
    assert found.problems == [] and found.compared
    assert {(layer.component, layer.backend) for layer in found.layers} == {
        ("unet", mix), ("unet", MIXES[mix]), ("text_encoder", mix),
    }  # fmt: skip
    assert sum("conv" in layer.layer for layer in found.layers) == 14
    assert [layer for layer in found.layers if relative([layer]) > ERRORS[layer.backend][1]] == []
    for component in ("unet", "text_encoder"):
        linear = [layer for layer in found.layers if layer.component == component and "conv" not in layer.layer]
        assert relative(linear) <= ERRORS[mix][0]


def test_verify_loads_both_models_and_runs_them(made: dict[str, Path]) -> None:
    found = verify(made["float8"])
    assert found.verdict == "verified"
    assert "loaded with bitroute; forward ok" in found.components["unet"]
    assert "loaded without bitroute; forward ok" in found.components["text_encoder"]


def inputs(trained: Path, tiny: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    words = ["red circle", "green square", "blue cross", "yellow circle"]
    tokens = AutoTokenizer.from_pretrained(tiny / "tokenizer_2")(
        words, padding="max_length", max_length=16, return_tensors="pt"
    )
    encoder = T5EncoderModel.from_pretrained(trained / "text_encoder", dtype=torch.bfloat16)
    with torch.inference_mode():
        encoded = encoder(tokens.input_ids).last_hidden_state.clone()
    sample = torch.randn(4, 3, 16, 16, dtype=torch.bfloat16)
    return {"sample": sample, "timestep": torch.tensor([10, 250, 500, 900]), "encoder_hidden_states": encoded}


def test_the_noise_predicted_in_a_fresh_process_is_nearly_the_originals(
    made: dict[str, Path], trained: Path, tiny: Path, tmp_path: Path
) -> None:
    given = inputs(trained, tiny)
    torch.save(given, tmp_path / "given.pt")
    folders = {mix: folder / "unet" for mix, folder in made.items()}
    words = [sys.executable, "-c", FRESH, str(tmp_path / "given.pt"), *map(str, folders.values())]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    original = UNet2DConditionModel.from_pretrained(trained / "unet", torch_dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = original(**given).sample.float()
    noise = {mix: torch.load(f"{folder}.pt").float() - wanted for mix, folder in folders.items()}
    errors = {mix: (found.norm() / wanted.norm()).item() for mix, found in noise.items()}
    assert {mix: error for mix, error in errors.items() if not 0 < error < FORWARD[mix]} == {}


def test_a_loaded_model_runs_its_convolutions_from_their_codes(made: dict[str, Path]) -> None:
    model = UNet2DConditionModel.from_pretrained(made["nf4"] / "unet", torch_dtype=torch.bfloat16)
    found = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedConvolution)}
    plain = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    assert found["down_blocks.0.downsamplers.0.conv"].stored["qdata"].dtype == torch.int8
    assert plain == {"conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out"}  # as the profile keeps them


def test_convolutions_are_dequantized_to_the_shape_that_they_had(made: dict[str, Path], tmp_path: Path) -> None:
    out = dequantize(made["int8"], tmp_path / "out")
    before, after = (UNet2DConditionModel.from_pretrained(folder / "unet") for folder in (UNET.parent, out))
    changed = {name: tensor for name, tensor in after.state_dict().items() if tensor.ndim == 4}
    assert changed
    for name, tensor in changed.items():
        source = before.state_dict()[name]
        assert tensor.shape == source.shape and (tensor - source).norm() < 0.02 * source.norm()
