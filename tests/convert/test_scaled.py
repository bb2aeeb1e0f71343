"""Weights beside their scales: the formats of ComfyUI in both spellings, BFL's, plain FP8, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.utils import to_blocked

from bitroute import backends, dequantize
from bitroute.backends.base import TensorSpec
from bitroute.cli import main
from bitroute.convert.layout import DerivedTensor, read_header
from bitroute.convert.reading import read_tensor
from bitroute.convert.scaled import decode_scaled
from bitroute.errors import SourceError

Tensors = dict[str, torch.Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALE = torch.tensor(0.25)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(160, 320, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decode(tmp_path: Path) -> Callable[..., Tensors]:
    """Writes the tensors to a file and reads it back decoded to float32."""

    def decode(tensors: Tensors, metadata: dict[str, str] | None = None) -> Tensors:
        file = tmp_path / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
        found = decode_scaled(read_header(file).tensors, torch.float32)
        return {name: read_tensor(tensor) for name, tensor in found.items()}

    return decode


def comfy(kind: object, **options: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": kind, **options}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("spelling", ["old", "new", "metadata"])
def test_scaled_fp8_is_read_in_every_spelling(
    dtype: torch.dtype, spelling: str, decode: Callable[..., Tensors], weight: torch.Tensor
) -> None:
    codes = (weight / SCALE).to(dtype)
    format_name = str(dtype).removeprefix("torch.")
    tensors = {"a.b.weight": codes, "a.b.bias": weight[0].to(torch.bfloat16)}
    metadata = None
    if spelling == "old":
        tensors |= {
            "a.b.scale_weight": SCALE, "a.b.scale_input": torch.tensor(3.0), "scaled_fp8": torch.zeros(2).to(dtype),
        }  # fmt: skip
    else:
        tensors |= {"a.b.weight_scale": SCALE, "a.b.input_scale": torch.tensor(3.0)}
    if spelling == "new":
        tensors["a.b.comfy_quant"] = comfy(format_name, full_precision_matrix_mult=True)
    elif spelling == "metadata":
        layers = {"format_version": "1.0", "layers": {"a.b": {"format": format_name}}}
        metadata = {"_quantization_metadata": json.dumps(layers)}
    found = decode(tensors, metadata)
    assert found.keys() == {"a.b.weight", "a.b.bias"}
    assert torch.equal(found["a.b.weight"], codes.float() * 0.25)
    assert found["a.b.bias"].dtype == torch.bfloat16


def test_plain_fp8_casts_become_the_same_values(decode: Callable[..., Tensors], weight: torch.Tensor) -> None:
    tensors = {"a.weight": weight.to(E4M3), "a.bias": weight[0].to(E4M3), "table": weight.to(E5M2)}
    tensors |= {"logit_scale": torch.tensor(4.0), "scale_shift_table": weight}  # weights, not scales of codes
    found = decode(tensors)
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)


def test_a_scale_for_each_row_also_of_a_convolution(decode: Callable[..., Tensors], weight: torch.Tensor) -> None:
    codes, scales = weight.to(E4M3).reshape(160, 20, 4, 4), torch.rand(160)
    found = decode({"a.weight": codes, "a.weight_scale": scales})
    assert torch.equal(found["a.weight"], codes.float() * scales[:, None, None, None])


@pytest.mark.parametrize("scales", [torch.tensor(0.5), torch.rand(160, 1)])
def test_int8_has_a_scale_for_the_tensor_or_for_each_row(
    scales: torch.Tensor, decode: Callable[..., Tensors], weight: torch.Tensor
) -> None:
    codes = (weight * 30).to(torch.int8)
    found = decode({"a.weight": codes, "a.weight_scale": scales, "a.comfy_quant": comfy("int8_tensorwise")})
    assert torch.equal(found["a.weight"], codes.float() * scales)


def test_a_rotated_weight_is_rotated_back(decode: Callable[..., Tensors], weight: torch.Tensor) -> None:
    """Groups of 16 columns times the regular Hadamard matrix of that size."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.kron(four, four) / 4
    assert torch.equal(matrix @ matrix.T, torch.eye(16))
    rotated = (weight.reshape(-1, 16) @ matrix.T).reshape(weight.shape)
    scale = rotated.abs().amax() / 127
    tensors = {"a.weight": (rotated / scale).round().to(torch.int8), "a.weight_scale": scale}
    found = decode({**tensors, "a.comfy_quant": comfy("int8_tensorwise", convrot=True, convrot_groupsize=16)})
    assert (found["a.weight"] - weight).abs().max() < 4 * scale
    assert (found["a.weight"] - weight).norm() / weight.norm() < 0.02


def test_nvfp4_in_tiles_with_the_first_code_in_the_high_half(
    decode: Callable[..., Tensors], weight: torch.Tensor
) -> None:
    backend, stored = backends.create("nvfp4"), backends.create("nvfp4").quantize(weight)
    tensors = {
        "a.weight": stored["qdata"] << 4 | stored["qdata"] >> 4,
        "a.weight_scale": to_blocked(stored["scale"].view(torch.uint8)).reshape(256, 20).view(E4M3),
        "a.weight_scale_2": stored["per_tensor_scale"], "a.comfy_quant": comfy("nvfp4"),
    }  # fmt: skip
    expected = backend.decode(stored, TensorSpec((160, 320), torch.float32))
    assert torch.equal(decode(tensors)["a.weight"], expected)


def test_nvfp4_as_bfl_stores_it(decode: Callable[..., Tensors], weight: torch.Tensor) -> None:
    backend, stored = backends.create("nvfp4"), backends.create("nvfp4").quantize(weight)
    tensors = {
        "a.weight": stored["qdata"], "a.weight_scale": stored["scale"], "a.input_scale": torch.tensor(1.0),
        "a.weight_scale_2": stored["per_tensor_scale"],
    }  # fmt: skip
    expected = backend.decode(stored, TensorSpec((160, 320), torch.float32))
    assert torch.equal(decode(tensors)["a.weight"], expected)


def test_mxfp8_in_tiles(decode: Callable[..., Tensors], weight: torch.Tensor) -> None:
    backend, stored = backends.create("mxfp8"), backends.create("mxfp8").quantize(weight)
    scales = to_blocked(stored["scale"].view(torch.uint8)).reshape(256, 12)
    tensors = {"a.weight": stored["qdata"], "a.weight_scale": scales, "a.comfy_quant": comfy("mxfp8")}
    expected = backend.decode(stored, TensorSpec((160, 320), torch.float32))
    assert torch.equal(decode(tensors)["a.weight"], expected)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.comfy_quant": comfy("awq_w4a16")}, "format 'awq_w4a16', expected one of float8_e4m3fn"),
        ({"a.comfy_quant": comfy(["nvfp4"])}, r"format \['nvfp4'\]"),
        ({"a.comfy_quant": comfy("nvfp4")}, "without scales, or not as this format packs them"),
        ({"a.comfy_quant": comfy("mxfp8"), "a.weight_scale": torch.ones(3)}, "expected 2048"),
        ({"a.comfy_quant": comfy("int8_tensorwise", convrot=True, convrot_groupsize=7)}, "a rotation of 7 columns"),
        ({"a.weight_scale": torch.ones(7)}, "with 7 scales"),
        ({"a.weight_scale": torch.ones(1, 160)}, r"with 160 scales \[1, 160\]"),  # of columns, were it square
        ({"a.weight_scale": torch.ones(160, dtype=torch.int32)}, "scales of torch.int32"),
        ({"a.weight_scale_inv": torch.ones(2, 2)}, r"a scale 'a\.weight_scale_inv' whose meaning is not known"),
        ({"a.weight.scale": torch.ones(2, 2)}, r"a scale 'a\.weight\.scale' whose meaning is not known"),
        ({"b._data": SCALE.to(E4M3), "b._scale": SCALE}, r"'b\._data' cannot be decoded"),
        ({"a.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, "is not JSON"),
        ({"a.comfy_quant": torch.tensor([91, 93], dtype=torch.uint8)}, "is not a JSON mapping"),
    ],
)
def test_what_does_not_fit_its_format_is_refused(
    tensors: Tensors, words: str, decode: Callable[..., Tensors], weight: torch.Tensor
) -> None:
    with pytest.raises(SourceError, match=words):
        decode({"a.weight": weight[:, :256].to(E4M3), **tensors})


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"a": "nvfp4"}}'])
def test_metadata_that_maps_no_layers_is_refused(
    text: str, decode: Callable[..., Tensors], weight: torch.Tensor
) -> None:
    with pytest.raises(SourceError, match="_quantization_metadata"):
        decode({"a.weight": weight.to(E4M3)}, {"_quantization_metadata": text})


def test_codes_that_nothing_explains_are_left_and_then_refused(tmp_path: Path, weight: torch.Tensor) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": weight.to(torch.int8), "b.weight": weight.to(E4M3)}, file)
    found = decode_scaled(read_header(file).tensors, torch.bfloat16)
    assert found["a.weight"].spec.dtype == torch.int8
    assert isinstance(found["b.weight"], DerivedTensor)
    with pytest.raises(SourceError, match=r"tensor 'a\.weight' is quantized in a form that nothing explains"):
        dequantize(file, tmp_path / "out.safetensors")


def test_a_file_is_streamed_to_a_file(tmp_path: Path, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = (weight / SCALE).to(E4M3)
    save_file({"a.weight": codes, "a.weight_scale": SCALE, "b.weight": weight}, tmp_path / "model.safetensors")
    done = CliRunner().invoke(main, ["dequantize", "model.safetensors", "--dtype", "fp16"])
    assert done.exit_code == 0, done.stderr
    assert "wrote model-dequantized.safetensors: 204.80 kB" in done.stdout
    found = load_file(tmp_path / "model-dequantized.safetensors")
    assert found.keys() == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"], (codes.float() * 0.25).half())
    assert torch.equal(found["b.weight"], weight.half())
    assert list(tmp_path.glob("*.part")) == []


def test_an_fp8_transformer_in_a_pipeline_is_decoded(tiny: Path, tmp_path: Path) -> None:
    """As layerwise casting saves it: FP8 without scales and without a word in the config."""
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    before = {name: t.to(E4M3) if t.dim() == 2 else t for name, t in load_file(file).items()}
    save_file(before, file, metadata={"format": "pt"})
    out = dequantize(source, tmp_path / "out")
    after = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], tensor.to(after[name].dtype)) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
