"""Containers: every kind of folder loads in a fresh process, and again after save_pretrained, to the same outputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import write_index

from bitroute import quantize, verify
from bitroute.convert import plan as planning
from bitroute.convert.layout import read_header
from bitroute.convert.verify import Verification

BITROUTE = """
    backend: float8
    rules:
      - {layers: "transformer_blocks.{0}.ff.*", backend: nf4}
      - {layers: "transformer_blocks.{1}.ff.*", backend: mxfp4}
      - {layers: "single_transformer_blocks.{0}.*", backend: quanto-int4, otherwise: keep}
      - {role: feed-forward, backend: bnb-int8}
      - {layers: "single_transformer_blocks.{-1}.attn.*", backend: mxfp6}
"""
TRANSFORMERS = {
    "torchao": """
    backend: float8
    rules:
      - {layers: "transformer_blocks.{0}.ff.*", backend: int8}
      - {layers: "single_transformer_blocks.{0-1}.proj_mlp", backend: nvfp4, options: {scale: mse}}
      - {layers: "transformer_blocks.{1}.attn.to_?", backend: float8, options: {granularity: tensor}}
      - {layers: "single_transformer_blocks.{2}.*", backend: mxfp8, options: {activations: mxfp8}}
      - {layers: "single_transformer_blocks.{3}.proj_mlp", backend: mxfp4, options: {activations: mxfp8}}
      - {layers: "transformer_blocks.{1}.ff.*", backend: int8, options: {activations: dynamic}}
""",
    "torchao-dynamic": """
    backend: float8
    options: {activations: dynamic}
    rules:
      - {role: modulation, backend: float8}
""",
    "bitsandbytes-4bit": """
    backend: nf4
    keep: [x_embedder, context_embedder, "time_text_embed.*", "norm_out.*"]
    rules:
      - {layers: "transformer_blocks.{0}.ff.*", backend: fp4}
      - {layers: "transformer_blocks.{1}.ff.*", backend: nf4, options: {double_quant: false}}
      - {layers: "transformer_blocks.{0}.attn.*", backend: nf4, options: {block: 64}}
      - {layers: proj_out, backend: nf4}
""",
    "bitsandbytes-int8": """
    backend: bnb-int8
    keep: [x_embedder, context_embedder, "time_text_embed.*", "norm_out.*"]
""",
    "quanto-int8": "{backend: quanto-int8, keep: none}\n",
    "quanto-float8": "{backend: quanto-float8, keep: none}\n",
    "bitroute": BITROUTE,
}
NATIVE = [name for name in TRANSFORMERS if name != "bitroute"]
BY_HAND = """
import json, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
request = json.load(sys.stdin)
import torch, diffusers, transformers
from bitroute_loading import lift_gpu_check

lift_gpu_check()

def forward(model, inputs):
    with torch.inference_mode():
        return model.eval()(**inputs, return_dict=False)[0]

def same(name, folder, model_class, inputs):
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16)
    saved = Path(request["out"]) / name
    # diffusers cuts the parts of a 4-bit weight apart, and then cannot load them
    model.save_pretrained(saved, max_shard_size="10GB" if name.startswith("bitsandbytes-4bit") else "100KB")
    again = model_class.from_pretrained(saved, dtype=torch.bfloat16)
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    types = {type(module.weight).__name__ for module in model.modules() if type(module) is torch.nn.Linear}
    shards = len(list(saved.glob("*.safetensors")))
    first = forward(model, inputs)
    finite = bool(first.isfinite().all())
    if config["quant_method"] == "quanto":  # torch's int8 kernel crashes on the unaligned files of save_pretrained
        layers = [n for n, m in model.named_modules() if hasattr(m, "qweight")]
        pairs = [[m.get_submodule(n).qweight.dequantize() for m in (model, again)] for n in layers]
        equal = len(pairs) > 50 and all(bool(one.equal(two)) for one, two in pairs)
    else:
        equal = bool(first.equal(forward(again, inputs)))
    return {"equal": equal, "finite": finite, "config": config, "types": sorted(types), "shards": shards}

generator = torch.Generator().manual_seed(0)
random = lambda *shape: torch.randn(shape, generator=generator).bfloat16()
flux = {"hidden_states": random(1, 16, 32), "encoder_hidden_states": random(1, 8, 128),
        "pooled_projections": random(1, 64), "timestep": torch.ones(1).bfloat16(),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
text = {"input_ids": torch.arange(2, 14)[None]}
for name, folder in request["folders"].items():
    if name == "bitroute":
        assert "bitroute" not in sys.modules
        import bitroute
    encoders = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel}
    model_class = encoders.get(name, diffusers.FluxTransformer2DModel)
    inputs = text if name in encoders else flux
    try:
        answer = same(name, folder, model_class, inputs)
    except Exception as error:
        import traceback
        answer = {"error": traceback.format_exc()}
    print(json.dumps({"name": name, **answer}))
"""


def recipe(transformer: str) -> str:
    return f"model: builtin:tiny-flux\ncomponents:\n  transformer: {transformer}"


ENCODERS = {
    "clip": "{backend: nf4, keep: none, container: bitroute}\n",
    "t5": "{backend: mxfp4, rules: [{role: attention, backend: float8}]}\n",
}
CLASSES = {"clip": ("text_encoder", "CLIPTextModel"), "t5": ("text_encoder_2", "T5EncoderModel")}


@pytest.fixture(scope="module")
def pipeline(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized, with a transformer in every container, and the text encoders in that of bitroute."""
    place, parts = tmp_path_factory.mktemp("pipeline"), {**TRANSFORMERS, **ENCODERS}
    classes = {name: CLASSES.get(name, ("transformer", "FluxTransformer2DModel")) for name in parts}
    for name, (component, _) in classes.items():
        shutil.copytree(tiny / component, place / "source" / name)
    write_index(place / "source", {name: class_name for name, (_, class_name) in classes.items()})
    text = "components:\n" + "".join(f"  {name}: {text}" for name, text in parts.items())
    (place / "recipe.yaml").write_text(text)
    return quantize(str(place / "recipe.yaml"), str(place / "source"), place / "out")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> dict[str, Path]:
    """Name → component folder; the native containers come before the first that needs `import bitroute`."""
    made = {name: pipeline / name for name in NATIVE}
    before, planning.SHARD_BYTES = planning.SHARD_BYTES, 400_000
    try:
        for name in ("torchao", "bitsandbytes-4bit"):
            file = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
            file.write_text(recipe(TRANSFORMERS[name]))
            out = quantize(str(file), out=tmp_path_factory.mktemp("sharded") / "out")
            made[f"{name}-shards"] = out / "transformer"
    finally:
        planning.SHARD_BYTES = before
    return made | {name: pipeline / name for name in ("bitroute", *ENCODERS)}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a fresh process, which imports bitroute only for the last three, found in each folder."""
    place = tmp_path_factory.mktemp("by-hand")
    script = Path(planning.__file__).with_name("loading.py").read_text()
    (place / "bitroute_loading.py").write_text(script)
    (place / "by_hand.py").write_text(BY_HAND)
    request = {"folders": {name: str(folder) for name, folder in folders.items()}, "out": str(place)}
    command = [sys.executable, str(place / "by_hand.py")]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {answer.pop("name"): answer for answer in answers}


@pytest.fixture(scope="module")
def verified(pipeline: Path) -> Verification:
    return verify(pipeline)


@pytest.mark.parametrize("name", [*TRANSFORMERS, "torchao-shards", "bitsandbytes-4bit-shards", "clip", "t5"])
def test_a_folder_loads_saves_and_loads_again_to_equal_outputs(name: str, loaded: dict[str, dict[str, Any]]) -> None:
    assert "error" not in loaded[name], loaded[name]["error"]
    assert (loaded[name]["equal"], loaded[name]["finite"]) == (True, True)
    assert (loaded[name]["shards"] > 1) != name.startswith("bitsandbytes-4bit")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_verify_loads_a_folder_in_a_process_of_its_own(name: str, verified: Verification) -> None:
    assert verified.problems == []
    how = "with bitroute" if name == "bitroute" else "without bitroute"
    assert verified.components[name].endswith(f"loaded {how}; forward ok")


def test_verify_loads_text_encoders_with_bitroute(verified: Verification) -> None:
    assert verified.problems == []
    assert all(verified.components[name].endswith("loaded with bitroute; forward ok") for name in ENCODERS)


def test_the_container_is_the_one_that_the_name_promises(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        expected = "bitroute" if name in ("clip", "t5") else name.split("-")[0]
        assert config["quant_method"] == expected


def test_torchao_weights_are_its_own_tensors(loaded: dict[str, dict[str, Any]]) -> None:
    wanted = {"Float8Tensor", "Int8Tensor", "NVFP4Tensor", "MXTensor", "Parameter"}
    assert set(loaded["torchao"]["types"]) == wanted


def test_a_torchao_folder_keeps_its_map_of_layers_through_save_pretrained(
    folders: dict[str, Path], loaded: dict[str, dict[str, Any]]
) -> None:
    written = json.loads((folders["torchao"] / "config.json").read_text())["quantization_config"]
    layers = written["quant_type"]["default"]["_data"]["fqn_to_config"]
    kept = loaded["torchao"]["config"]["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert kept == layers
    types = {config["_type"] for config in layers.values()}
    assert types >= {"Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "NVFP4WeightOnlyConfig"}


def test_the_map_of_layers_is_truthful(folders: dict[str, Path]) -> None:
    written = json.loads((folders["torchao"] / "config.json").read_text())["quantization_config"]
    layers = written["quant_type"]["default"]["_data"]["fqn_to_config"]
    record = json.loads((folders["torchao"].parent / "bitroute.json").read_text())
    entries = record["plan"]["components"]["torchao"]["entries"]
    families = {"float8": "Float8", "int8": "Int8", "nvfp4": "NVFP4", "mxfp8": "MX", "mxfp4": "MX"}
    for entry in entries:
        if not entry["name"].endswith(".weight"):
            continue
        found = [
            c["_type"] for pattern, c in layers.items() if re.fullmatch(pattern.removeprefix("re:"), entry["layer"])
        ]
        if entry["backend"] == "keep":
            assert found == []
        elif entry["backend"] != "mxfp4":  # torchao has no config for FP4 weights with FP8 activations
            assert len(found) == 1
            assert found[0].startswith(families[entry["backend"]])


@pytest.mark.parametrize("name", ["torchao-shards", "bitsandbytes-4bit-shards"])
def test_the_index_lists_every_tensor_and_no_layer_is_cut(name: str, folders: dict[str, Path]) -> None:
    index = json.loads((folders[name] / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(folders[name].glob("*.safetensors"))
    held = {tensor: file.name for file in files for tensor in read_header(file).tensors}
    assert held == index["weight_map"]
    sizes = [tensor.spec.size_bytes for file in files for tensor in read_header(file).tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert [file.name for file in files] == [
        f"diffusion_pytorch_model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    entries = json.loads((folders[name].parent / "bitroute.json").read_text())["plan"]["components"]["transformer"][
        "entries"
    ]
    homes: dict[str, set[str]] = {}
    for entry in entries:
        homes.setdefault(entry["layer"], set()).update(held[stored] for stored, _, _ in entry["tensors"].values())
    assert [layer for layer, found in homes.items() if len(found) > 1] == []


@pytest.mark.parametrize("name", [*TRANSFORMERS, "torchao-shards"])
def test_payloads_of_real_folders_are_aligned_for_memory_mapping(name: str, folders: dict[str, Path]) -> None:
    for file in folders[name].glob("*.safetensors"):
        for tensor in read_header(file).tensors.values():
            boundary = min(tensor.spec.size_bytes & -tensor.spec.size_bytes, 64)
            assert tensor.offset % boundary == 0
