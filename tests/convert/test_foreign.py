"""Pipelines that other tools quantized: what their own libraries decode is what we read, and damage is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, QuantoConfig, TorchAoConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import T5EncoderModel

from bitroute import dequantize, verify
from bitroute.convert.fourbit import decode_four_bit
from bitroute.convert.layout import read_header
from bitroute.convert.reading import read_tensor
from bitroute.errors import BitrouteError, RecipeError, SourceError

NAME = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q.weight"
TORCHAO = {
    "float8": Float8WeightOnlyConfig(),
    "int8": Int8WeightOnlyConfig(version=2),
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
    "int4-unpacked": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}
FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-in-bf16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
}
QUANTO_STEP = {"int8": 0.011, "float8": 0.03, "int4": 0.13, "int2": 0.65}  # error of such weights, relative
Make = Callable[[Any], tuple[Path, Any]]


@pytest.fixture
def make(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A pipeline whose transformer diffusers quantized and saved, and that model."""
    for quantizer in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        place = f"diffusers.quantizers.bitsandbytes.bnb_quantizer.{quantizer}"
        monkeypatch.setattr(f"{place}.validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(f"{place}.update_device_map", lambda self, device_map: {"": "cpu"})

    def make(config: Any) -> tuple[Path, Any]:
        folder = Path(shutil.copytree(tiny, tmp_path / "foreign"))
        model = FluxTransformer2DModel.from_pretrained(
            folder / "transformer", quantization_config=config, torch_dtype=torch.bfloat16
        )
        shutil.rmtree(folder / "transformer")
        model.save_pretrained(folder / "transformer")
        return folder, model

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / NAME)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "transformer" / NAME
    with safe_open(file, "pt") as header:
        metadata = header.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao_weights_are_those_that_diffusers_dequantizes(kind: str, make: Make, tmp_path: Path) -> None:
    source, model = make(TorchAoConfig(TORCHAO[kind]))
    model.dequantize()
    found = weights(dequantize(source, tmp_path / "out"))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_4_bit_weights_are_those_that_bitsandbytes_dequantizes(
    kind: str, make: Make, tmp_path: Path, tiny: Path
) -> None:
    source, model = make(BitsAndBytesConfig(load_in_4bit=True, **FOUR_BIT[kind]))
    found, original = weights(dequantize(source, tmp_path / "out")), weights(tiny)
    quantized = {name: p for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(quantized) > 50
    for name, parameter in quantized.items():
        parameter.quant_state.dtype = torch.float32
        expected = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        if expected.shape[1] % 64 == 0:  # bitsandbytes misreads other rows on a CPU
            assert torch.equal(found[name], expected.to(torch.bfloat16))
        assert relative_error(found[name], original[name]) < 0.15


def test_8_bit_weights_are_those_that_bitsandbytes_dequantizes(make: Make, tmp_path: Path) -> None:
    source, model = make(BitsAndBytesConfig(load_in_8bit=True))
    model.dequantize()
    found = weights(dequantize(source, tmp_path / "out"))
    expected = model.state_dict()
    assert all(torch.equal(found[name], expected[name].to(torch.bfloat16)) for name in found)


@pytest.mark.parametrize("kind", QUANTO_STEP)
def test_quanto_weights_are_those_of_quanto_to_one_bf16_step(kind: str, make: Make, tmp_path: Path, tiny: Path) -> None:
    """quanto computes in bf16, so its own values are rounded twice."""
    source, model = make(QuantoConfig(weights_dtype=kind))
    found, original = weights(dequantize(source, tmp_path / "out")), weights(tiny)
    quantized = {name: p for name, p in model.named_parameters() if hasattr(p, "qtype")}
    assert len(quantized) > 50
    for name, parameter in quantized.items():
        torch.testing.assert_close(found[name], parameter.dequantize(), rtol=2**-6, atol=2**-8)
        assert relative_error(found[name], original[name]) < QUANTO_STEP[kind]
    assert found.keys() == original.keys()


def test_a_text_encoder_that_transformers_quantized_gets_its_plain_config_back(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig, quantizers

    quantizer = quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    source = Path(shutil.copytree(tiny, tmp_path / "foreign"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    encoder = T5EncoderModel.from_pretrained(
        source / "text_encoder_2", quantization_config=config, dtype=torch.bfloat16
    )
    encoder.save_pretrained(source / "text_encoder_2")
    out = dequantize(source, tmp_path / "out", dtype="float32")
    assert verify(out, load=False).problems == []
    config = json.loads((out / "text_encoder_2" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    found, original = (load_file(place / "text_encoder_2" / "model.safetensors") for place in (out, tiny))
    assert all(relative_error(found[name], original[name]) < 0.15 for name in original)


def test_our_own_container_is_read_without_its_record(convert: Callable[[str], Path], tmp_path: Path) -> None:
    made = convert("model: builtin:tiny-flux\ncomponents:\n  transformer: {backend: mxfp4, otherwise: keep}\n")
    lost = Path(shutil.copytree(made, tmp_path / "lost"))
    (lost / "bitroute.json").unlink()
    first, second = weights(dequantize(made, tmp_path / "first")), weights(dequantize(lost, tmp_path / "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_that_rows_break_are_decoded_across_rows(tmp_path: Path) -> None:
    """[3, 40] in blocks of 64: the second block begins in the middle of the second row."""
    table, codes = torch.linspace(-1, 1, 16), torch.arange(120, dtype=torch.uint8) % 16
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 40]}).encode()
    tensors = {
        "w": (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1), "w.absmax": torch.tensor([2.0, 4.0]),
        "w.quant_map": table, "w.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "w.safetensors")
    found = decode_four_bit(read_header(tmp_path / "w.safetensors").tensors, torch.float32)
    scales = torch.tensor([2.0] * 64 + [4.0] * 56)
    assert list(found) == ["w"]
    assert torch.equal(read_tensor(found["w"]), (table[codes.int()] * scales).reshape(3, 40))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{LAYER}.absmax": t[f"{LAYER}.absmax"][:-1].clone()}), "cannot be decoded"),
        (lambda t: t.pop(f"{LAYER}.quant_map"), "cannot be decoded"),
        (lambda t: t.update({LAYER: t[LAYER].repeat(2, 1)}), "cannot be decoded"),
        (lambda t: t[f"{LAYER}.quant_state.bitsandbytes__nf4"].zero_(), "download it first"),
        (lambda t: t[f"{LAYER}.quant_state.bitsandbytes__nf4"].fill_(123), "cannot be decoded"),
        (lambda t: t.pop(f"{LAYER}.quant_state.bitsandbytes__nf4"), "in a form that nothing explains"),
    ],
)
def test_4_bit_weights_with_damaged_parts_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, make: Make, tmp_path: Path
) -> None:
    source, _ = make(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    edit(source, change)
    with pytest.raises(RecipeError, match=words) as refused:
        dequantize(source, tmp_path / "out")
    assert LAYER in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["_data._data", "_scale", "_shift"])
def test_quanto_parts_of_other_sizes_are_refused(part: str, make: Make, tmp_path: Path) -> None:
    source, _ = make(QuantoConfig(weights_dtype="int4"))
    edit(source, lambda tensors: tensors.update({f"{LAYER}.{part}": tensors[f"{LAYER}.{part}"][1:].clone()}))
    with pytest.raises(RecipeError, match="codes, scales and shifts that make no") as refused:
        dequantize(source, tmp_path / "out")
    assert LAYER in str(refused.value)


def test_torchao_records_that_lie_are_refused(make: Make, tmp_path: Path) -> None:
    source, _ = make(TorchAoConfig(TORCHAO["int8"]))
    file = source / "transformer" / NAME
    with safe_open(file, "pt") as header:
        metadata = header.metadata()
    record = json.loads(metadata[LAYER])
    for lie in ({"_type": "Int4Tensor"}, {"_type": "os.system"}, {"_tensor_data_names": ["codes"]}, {"_data": 3}):
        save_file(load_file(file), file, metadata=metadata | {LAYER: json.dumps(record | lie)})
        with pytest.raises(RecipeError, match="is not stored as its record says"):
            dequantize(source, tmp_path / "out")
    save_file(load_file(file), file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="does not say how torchao stored it"):
        dequantize(source, tmp_path / "out")


@pytest.mark.parametrize("config", [{"quant_method": "sdnq"}, {"quant_method": ["nf4"]}, {"bits": 4}, [1], "awq"])
def test_an_unknown_method_is_refused_with_what_helps(config: object, source: Path, tmp_path: Path) -> None:
    file = source / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    with pytest.raises(RecipeError, match="quantized in a way that is not known here") as refused:
        dequantize(source, tmp_path / "out")
    assert "torchao, bitsandbytes, quanto, bitroute" in str(refused.value)
    assert "model.dequantize()" in str(refused.value)


def test_a_type_of_quanto_that_is_no_text_is_refused(source: Path, tmp_path: Path) -> None:
    file = source / "transformer" / "config.json"
    config = {"quant_method": "quanto", "weights_dtype": ["int8"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    with pytest.raises(RecipeError, match="weights of an unknown type"):
        dequantize(source, tmp_path / "out")


def test_any_changed_byte_of_a_header_ends_in_an_error_or_in_finite_time(make: Make, tmp_path: Path) -> None:
    source, _ = make(TorchAoConfig(TORCHAO["int4-unpacked"]))
    file = source / "transformer" / NAME
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for _ in range(12):
        damaged = bytearray(whole)
        damaged[draw.randrange(8, 8 + length)] ^= 1 << draw.randrange(7)
        file.write_bytes(damaged)
        try:
            dequantize(source, tmp_path / "out", overwrite=True)
        except BitrouteError as error:
            assert error.problems


def test_codes_without_any_config_are_refused(source: Path, tmp_path: Path) -> None:
    edit(source, lambda tensors: tensors.update({LAYER: tensors[LAYER].to(torch.int8)}))
    with pytest.raises((RecipeError, SourceError), match="in a form that nothing explains"):
        dequantize(source, tmp_path / "out")
