"""The bitroute container, written here by hand and loaded by diffusers and transformers themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

import bitroute  # noqa: F401 - registers the quantizers
from bitroute.backends import available, create
from bitroute.backends.base import Backend, TensorSpec
from bitroute.backends.layers import QuantizedLinear
from bitroute.errors import BackendError, SourceError

TINY_FLUX = Path(str(files("bitroute.recipes"))) / "tiny-flux"
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
CLASSES: dict[str, Any] = {
    "transformer": FluxTransformer2DModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}
PROVENANCE = {"recipe": "model: builtin:tiny-flux", "source": {"revision": "main"}, "note": "größer"}


def load(folder: Path, component: str = "transformer", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model, after making sure that the library had nothing to complain about."""
    model, info = CLASSES[component].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    complaints = {key: found for key, found in info.items() if found}
    assert not complaints
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    return model.eval()


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def spec_of(weight: Tensor) -> TensorSpec:
    return TensorSpec(tuple(weight.shape), weight.dtype)


def spread(weights: Mapping[str, Tensor], names: list[str]) -> dict[str, Backend]:
    """Every layer gets the next backend in turn, of those that can hold it."""
    backends = cycle([create(name) for name in available()])
    chosen = {}
    for name in names:
        fitting = (b for b in backends if b.refuse(spec_of(weights[f"{name}.weight"])) is None)
        chosen[name] = next(fitting)
    return chosen


def store(weights: Mapping[str, Tensor], backends: Mapping[str, Backend]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in backends:
            stored = backends[layer].quantize(tensor)
            tensors.update({f"{layer}.{suffix}": part.contiguous() for suffix, part in stored.items()})
        else:
            tensors[name] = tensor.contiguous()
    return tensors


def manifest(backends: Mapping[str, Backend]) -> dict[str, Any]:
    groups = [
        {"backend": backend.name, "options": backend.options, "layers": [name]} for name, backend in backends.items()
    ]
    return {
        "quant_method": "bitroute",
        "format_version": 1,
        "compute_dtype": "bfloat16",
        "groups": groups,
        "bitroute": PROVENANCE,
    }


def write(
    folder: Path, component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 3
) -> Path:
    """Tensor i goes to shard i modulo `shards`, so the parts of a layer are torn apart."""
    folder.mkdir()
    stem = STEMS[component]
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    architecture = json.loads((TINY_FLUX / component / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**architecture, "quantization_config": config}))
    return folder


class Written:
    """A component in the bitroute container: its source weights, its backends and what was stored."""

    def __init__(self, folder: Path, component: str) -> None:
        self.component = component
        self.weights = load_file(next((TINY_FLUX / component).glob("*.safetensors")))
        layers = [name for name in linear_layers(load(TINY_FLUX / component, component))]
        self.backends = spread(self.weights, layers)
        self.tensors = store(self.weights, self.backends)
        self.config = manifest(self.backends)
        self.folder = write(folder, component, self.tensors, self.config)

    def load(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return load(self.folder, self.component, dtype)


@pytest.fixture(scope="module", params=list(STEMS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("container") / request.param, request.param)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("container") / "transformer", "transformer")


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of expected tensors that are not there with the same dtype, shape and bits."""
    return [name for name in expected if name not in found or not same(found[name], expected[name])]


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def forward(model: nn.Module, component: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype: Any = model.dtype
    with torch.no_grad():
        if component != "transformer":
            output: Tensor = model(torch.arange(2, 16).reshape(1, 14)).last_hidden_state
            return output
        config: Any = model.config

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        result: Tensor = model(
            hidden_states=noise(1, 16, config.in_channels),
            encoder_hidden_states=noise(1, 8, config.joint_attention_dim),
            pooled_projections=noise(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]
        return result


def with_decoded_weights(written: Written, dtype: torch.dtype) -> Any:
    """The plain model, each quantized layer's weight replaced by what its stored form stands for."""
    model = load(TINY_FLUX / written.component, written.component, dtype)
    for name, backend in written.backends.items():
        weight = model.get_submodule(name).weight
        stored = {suffix: written.tensors[f"{name}.{suffix}"] for suffix in backend.outputs(spec_of(weight))}
        weight.data = backend.decode(stored, spec_of(weight)).to(weight.dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_backend_runs_as_its_decoded_weights_would(written: Written, dtype: torch.dtype) -> None:
    expected = forward(with_decoded_weights(written, dtype), written.component)
    output = forward(written.load(dtype), written.component)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stored_tensors_are_never_cast(written: Written, dtype: torch.dtype) -> None:
    stored = {name: tensor for name, tensor in written.tensors.items() if name not in written.weights}
    assert len(stored) > len(written.backends)
    assert differing(written.load(dtype).state_dict(), stored) == []


def test_a_model_without_a_wished_dtype_gets_the_compute_dtype(written: Written) -> None:
    model = CLASSES[written.component].from_pretrained(written.folder)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("shard_size", ["20KB", "10GB"])
def test_a_saved_model_is_the_checkpoint_it_came_from(written: Written, shard_size: str, tmp_path: Path) -> None:
    model = written.load()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert differing(tensors_in(tmp_path), tensors_in(written.folder)) == []
    assert config_in(tmp_path) == written.config
    again = load(tmp_path, written.component)
    assert torch.equal(forward(again, written.component), forward(model, written.component))


def test_a_dequantized_model_is_plain_and_saves_as_such(written: Written, tmp_path: Path) -> None:
    model = written.load()
    expected = forward(model, written.component)
    model.dequantize()
    assert not [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {model.get_submodule(name).weight.dtype for name in written.backends} == {torch.bfloat16}
    assert torch.equal(forward(model, written.component), expected)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(forward(load(tmp_path, written.component), written.component), expected)


def test_a_text_encoder_can_be_dequantized_to_another_dtype(tmp_path: Path) -> None:
    written = Written(tmp_path / "text_encoder_2", "text_encoder_2")
    model = written.load()
    model.dequantize(dtype=torch.float32)
    expected = with_decoded_weights(written, torch.float32)
    layers = {f"{name}.weight" for name in written.backends if name in model.state_dict()}
    assert differing(model.state_dict(), {name: expected.state_dict()[name] for name in layers}) == []


def test_a_device_map_and_a_move_leave_the_stored_tensors_alone(written: Written) -> None:
    model = CLASSES[written.component].from_pretrained(written.folder, dtype=torch.float16, device_map={"": "cpu"})
    model.to("cpu")
    stored = {name: tensor for name, tensor in written.tensors.items() if name not in written.weights}
    assert differing(model.state_dict(), stored) == []
    expected = forward(written.load(torch.float16), written.component)
    assert torch.equal(forward(model, written.component), expected)


def test_loading_draws_no_random_numbers(written: Written) -> None:
    """transformers fills what it takes for uninitialized, after decoding it."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    written.load()
    assert torch.equal(torch.get_rng_state(), before)


def test_older_names_of_a_text_encoder_still_load(tmp_path: Path) -> None:
    """Files of transformers 4 carry the prefix of the base model, which transformers 5 strips."""
    written = Written(tmp_path / "text_encoder", "text_encoder")
    tensors = {f"text_model.{name}": tensor for name, tensor in written.tensors.items()}
    folder = write(tmp_path / "older", "text_encoder", tensors, written.config)
    model = load(folder, "text_encoder")
    assert torch.equal(forward(model, "text_encoder"), forward(written.load(), "text_encoder"))
    model.save_pretrained(tmp_path / "saved")
    assert differing(tensors_in(tmp_path / "saved"), tensors) == []
    load(tmp_path / "saved", "text_encoder")


def refusal(folder: Path, written: Written, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    write(folder, written.component, tensors, config)
    with pytest.raises((SourceError, BackendError)) as error:
        load(folder, written.component)
    return str(error.value)


def test_a_newer_checkpoint_says_that_bitroute_must_be_upgraded(written: Written, tmp_path: Path) -> None:
    text = refusal(tmp_path / "newer", written, written.tensors, {**written.config, "format_version": 2})
    assert "format_version 2" in text
    assert "pip install -U bitroute" in text


def test_a_layer_that_the_model_lacks_is_named(written: Written, tmp_path: Path) -> None:
    config = copy.deepcopy(written.config)
    config["groups"][0]["layers"] = ["blocks.99.attn"]
    text = refusal(tmp_path / "lacking", written, written.tensors, config)
    assert f"{CLASSES[written.component].__name__} has no layer 'blocks.99.attn'" in text


def test_a_layer_that_is_not_linear_is_named(flux: Written, tmp_path: Path) -> None:
    config = copy.deepcopy(flux.config)
    config["groups"][0]["layers"] = ["transformer_blocks.0.norm1.norm"]
    text = refusal(tmp_path / "norm", flux, flux.tensors, config)
    assert "layer 'transformer_blocks.0.norm1.norm' is not linear" in text
    assert "LayerNorm" in text


def test_an_unknown_backend_is_named(flux: Written, tmp_path: Path) -> None:
    config = copy.deepcopy(flux.config)
    config["groups"][0]["backend"] = "float9"
    assert "unknown backend 'float9'" in refusal(tmp_path / "float9", flux, flux.tensors, config)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": [{"layers": ["proj_out"]}]},
        {"groups": ["float8"]},
        {"groups": [{"backend": "int8", "options": {}, "layers": ["proj_out", "proj_out"]}]},
        {"groups": [{"backend": "int8", "options": {}, "layers": [["proj_out"]]}]},
        {"groups": [{"backend": "int8", "options": None, "layers": ["proj_out"]}]},
        {"groups": [{"backend": 8, "options": {}, "layers": ["proj_out"]}]},
        {"groups": 5},
        {"groups": None},
        {"compute_dtype": "bfloat"},
        {"compute_dtype": "int8"},
        {"compute_dtype": ["bfloat16"]},
        {"to_dict": 1},
        {"backends": []},
    ],
    ids=str,
)
def test_a_malformed_config_is_refused(written: Written, tmp_path: Path, change: dict[str, Any]) -> None:
    text = refusal(tmp_path / "malformed", written, written.tensors, {**written.config, **change})
    assert "the quantization config is malformed" in text


def forget_a_group(config: dict[str, Any]) -> str:
    """Removes the first group of a quantized layer from the config and returns the layer."""
    forgotten = next(group for group in config["groups"] if group["backend"] != "keep")
    config["groups"].remove(forgotten)
    layer: str = forgotten["layers"][0]
    return layer


def test_a_quantized_layer_that_no_group_names_is_refused(written: Written, tmp_path: Path) -> None:
    config = copy.deepcopy(written.config)
    layer = forget_a_group(config)
    text = refusal(tmp_path / "forgotten", written, written.tensors, config)
    assert f"layer {layer!r} is stored in a form that no group explains" in text
    assert all(
        f"{layer}.{suffix}" in text for suffix in written.backends[layer].outputs(TensorSpec((64, 64), torch.bfloat16))
    )


def test_a_quantized_layer_with_an_older_name_that_no_group_names_is_refused(tmp_path: Path) -> None:
    written = Written(tmp_path / "text_encoder", "text_encoder")
    layer = forget_a_group(written.config)
    tensors = {f"text_model.{name}": tensor for name, tensor in written.tensors.items()}
    text = refusal(tmp_path / "older", written, tensors, written.config)
    assert f"layer {layer!r} is stored in a form that no group explains" in text


def test_every_tensor_that_does_not_fit_is_listed_with_its_layer(written: Written, tmp_path: Path) -> None:
    stored = [name for name in written.tensors if name not in written.weights and written.tensors[name].dim()]
    missing, short, cast = damaged = stored[:3]
    tensors = dict(written.tensors)
    expected = tensors.pop(missing)
    tensors[short] = tensors[short].flatten()[:-1].clone()
    tensors[cast] = tensors[cast].to(torch.float64)
    text = refusal(tmp_path / "damaged", written, tensors, written.config)
    assert all(f"tensor {name!r} of layer {name.rpartition('.')[0]!r}" in text for name in damaged)
    assert "no such tensor" in text
    assert str(list(expected.shape)) in text
    assert "F64" in text


def test_disk_offload_by_device_map_is_refused_because_it_casts(flux: Written, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="disk"):
        FluxTransformer2DModel.from_pretrained(flux.folder, device_map={"": "disk"}, offload_folder=tmp_path)


@pytest.mark.parametrize("component", STEMS)
def test_a_plain_model_is_not_quantized_while_loading(flux: Written, component: str) -> None:
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as DIFFUSERS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as TRANSFORMERS

    configs = DIFFUSERS if component == "transformer" else TRANSFORMERS
    with pytest.raises(SourceError, match="does not quantize while loading"):
        CLASSES[component].from_pretrained(
            TINY_FLUX / component, quantization_config=configs["bitroute"].from_dict(flux.config)
        )


def test_group_offloading_runs_the_same_numbers(flux: Written) -> None:
    expected = forward(flux.load(), "transformer")
    model = flux.load()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(forward(model, "transformer"), expected)
