"""Verification: sound outputs pass, and every kind of damage is named with its layer."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute import quantize, verify
from bitroute.backends import available
from bitroute.convert.files import write_json
from bitroute.convert.seal import sealed
from bitroute.convert.verify import Verification
from bitroute.errors import BackendError, SourceError

TINY_RECIPES = [f"tiny-flux-{name}" for name in ("fp8", "int8", "nf4", "nvfp4", "mxfp4", "mixed")]
LAYER = "transformer_blocks.1.attn.to_q"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
NVFP4_LAYER = "single_transformer_blocks.2.proj_mlp"
Memory = namedtuple("Memory", "available")
Damage = Callable[[dict[str, Tensor]], None]
Convert = Callable[[str], Path]


def damaged(out: Path, change: Damage, component: str = "transformer") -> Verification:
    """Verifies (without loading) after a change to the stored tensors of a component."""
    file = next((out / component).glob("*.safetensors"))
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return verify(out, load=False)


def fill(tensor: Tensor, value: float) -> None:
    tensor.fill_(value)


def edit(out: Path, **changes: Any) -> None:
    content = json.loads((out / "bitroute.json").read_text())
    write_json(out / "bitroute.json", sealed({**content, **changes}))


def misread(found: Verification) -> list[str]:
    """What is said of weights; every damage is also a changed file."""
    return [str(problem) for problem in found.problems if "does not hold its weight" in problem.what]


def words(found: Verification) -> str:
    return "\n".join(str(problem) for problem in found.problems)


@pytest.fixture
def nvfp4(tmp_path: Path, convert: Convert) -> Path:
    return Path(shutil.copytree(convert("tiny-flux-nvfp4"), tmp_path / "nvfp4"))


@pytest.mark.parametrize("recipe", TINY_RECIPES)
def test_what_a_job_wrote_passes_and_every_layer_was_compared(recipe: str, convert: Convert) -> None:
    found = verify(convert(recipe), load=False)
    assert found.problems == []
    assert found.notes == []
    quantized = json.loads((convert(recipe) / "bitroute.json").read_text())["plan"]["components"]
    layers = {(name, e["layer"]) for name, c in quantized.items() for e in c["entries"] if e["backend"] != "keep"}
    assert {(layer.component, layer.layer) for layer in found.layers} == layers
    assert all(10 < layer.sqnr_db < 60 for layer in found.layers)
    assert found.worst[0].sqnr_db == min(layer.sqnr_db for layer in found.layers)


def test_a_zeroed_layer_is_named(output: Path) -> None:
    found = damaged(output, lambda tensors: fill(tensors[f"{LAYER}._weight_qdata"].view(torch.uint8), 0))
    assert f"tensor '{LAYER}.weight' does not hold its weight" in words(found)
    assert "SQNR 0.0 dB" in words(found)
    assert len(misread(found)) == 1


def test_swapped_nibbles_are_named(nvfp4: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"{NVFP4_LAYER}._weight_qdata"]
        tensors[f"{NVFP4_LAYER}._weight_qdata"] = (codes >> 4) | (codes << 4)

    assert [NVFP4_LAYER in problem for problem in misread(damaged(nvfp4, swap))] == [True]


def test_reversed_scales_are_named(output: Path, nvfp4: Path) -> None:
    for out, layer in ((output, LAYER), (nvfp4, NVFP4_LAYER)):

        def reverse(tensors: dict[str, Tensor], name: str = f"{layer}._weight_scale") -> None:
            tensors[name] = tensors[name].view(torch.uint8).flip(-1).contiguous().view(tensors[name].dtype) \
                if tensors[name].shape[-1] > 4 else tensors[name].flip(0)  # fmt: skip

        assert [layer in problem for problem in misread(damaged(out, reverse))] == [True]


def test_the_layers_of_two_blocks_exchanged_are_both_named(output: Path) -> None:
    def exchange(tensors: dict[str, Tensor]) -> None:
        for part in ("_weight_qdata", "_weight_scale"):
            one, two = f"transformer_blocks.0.attn.to_k.{part}", f"transformer_blocks.1.attn.to_k.{part}"
            tensors[one], tensors[two] = tensors[two], tensors[one]

    assert len(misread(damaged(output, exchange))) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_named(output: Path, value: float) -> None:
    found = damaged(output, lambda tensors: fill(tensors[f"{LAYER}._weight_scale"][:1], value))
    assert f"'{LAYER}.weight'" in words(found)
    assert "NaN or infinite values" in words(found)


def test_one_changed_bit_of_a_kept_tensor_is_named(output: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["x_embedder.weight"].view(torch.uint8).view(-1)[-2] ^= 1

    found = damaged(output, flip)
    assert len(misread(found)) == 1
    assert "tensor 'x_embedder.weight'" in misread(found)[0]
    assert "other values than the source" in misread(found)[0]


def test_missing_extra_and_recast_tensors_are_named(output: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["norm_out.linear.bias"]
        tensors["proj_in.weight"] = torch.zeros(2)
        tensors[f"{LAYER}._weight_scale"] = tensors[f"{LAYER}._weight_scale"].bfloat16()
        tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1].contiguous()

    found = words(damaged(output, change))
    assert "tensor 'norm_out.linear.bias' is missing" in found
    assert "tensor 'proj_in.weight' was not planned" in found
    assert f"tensor '{LAYER}._weight_scale' is not as planned" in found
    assert "tensor 'proj_out.bias' is not as planned" in found


def test_missing_and_changed_copies_are_named(output: Path) -> None:
    (output / "tokenizer" / "tokenizer.json").unlink()
    (output / "scheduler" / "scheduler_config.json").write_text("{}")
    file = output / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = words(verify(output, load=False))
    assert "the file tokenizer/tokenizer.json is missing" in found
    assert "the file scheduler/scheduler_config.json was changed after the job" in found
    assert "the copied file vae/diffusion_pytorch_model.safetensors differs from its source" in found


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_a_missing_index_or_config_is_named(output: Path, name: str) -> None:
    (output / name).unlink()
    assert f"the file {name} is missing" in words(verify(output, load=False))


def test_missing_weights_are_named(output: Path) -> None:
    (output / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "component 'transformer' has no weights" in words(verify(output, load=False))


def test_a_truncated_weight_file_is_named(output: Path) -> None:
    file = output / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file}: not a sound safetensors file" in words(verify(output, load=False))


def test_an_edited_config_that_no_longer_loads_is_named(output: Path) -> None:
    for component in ("transformer", "text_encoder_2"):
        config = json.loads((output / component / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "torchoa"
        (output / component / "config.json").write_text(json.dumps(config))
    found = verify(output)
    assert "output/transformer: FluxTransformer2DModel does not load" in words(found)
    assert found.components["transformer"].endswith("does not load without bitroute")
    assert "output/text_encoder_2: 24 tensors are unknown to the model after loading" in words(found)


def test_a_component_that_ends_its_process_does_not_take_the_next_one_along(output: Path) -> None:
    others = set(psutil.Process().children())
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(verify, output)
        while not (children := set(psutil.Process().children()) - others) and not done.done():
            time.sleep(0.01)
        children.pop().kill()
        found = done.result()
    assert "the loading process ended with -9" in words(found)
    assert found.components["transformer"].endswith("does not load without bitroute")
    assert found.components["text_encoder_2"].endswith("loaded without bitroute; forward ok")


def test_an_unfinished_folder_and_a_strange_one_are_refused(tmp_path: Path, output: Path) -> None:
    with pytest.raises(SourceError, match=r"no bitroute\.json"):
        verify(tmp_path)
    (output / "bitroute.json").rename(output / "bitroute.json.part")
    with pytest.raises(SourceError, match=r"(?s)an unfinished one.*--overwrite"):
        verify(output)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"plan": None},
        {"plan": {}},
        {"plan": {"components": {"transformer": {}}, "copied": {}}},
        {
            "plan": {
                "components": {"transformer": {"library": "os", "class": 3, "entries": [{}]}},
                "copied": {},
            }
        },
        {"plan": {"components": [], "copied": []}},
        {"source": None},
        {"files": 3},
    ],
    ids=str,
)
def test_an_edited_record_is_refused_by_name(output: Path, changes: dict[str, Any]) -> None:
    edit(output, **changes)
    with pytest.raises(SourceError, match=r"bitroute\.json"):
        verify(output, load=False)


def test_a_backend_that_is_not_installed_here_is_named(output: Path) -> None:
    text = (output / "bitroute.json").read_text().replace('"backend": "float8"', '"backend": "float9"')
    write_json(output / "bitroute.json", sealed(json.loads(text)))
    with pytest.raises(BackendError, match="unknown backend 'float9'"):
        verify(output, load=False)


def test_without_its_source_a_checkpoint_is_decoded_but_not_compared(output: Path) -> None:
    edit(output, source={"model": "black-forest-labs/FLUX.1-dev", "revision": None})
    found = verify(output, load=False)
    assert found.problems == []
    assert found.layers == []
    assert "source black-forest-labs/FLUX.1-dev is not here" in found.notes[0]
    broken = damaged(output, lambda tensors: fill(tensors[f"{LAYER}._weight_scale"], float("nan")))
    assert "NaN or infinite values" in words(broken)


def test_the_source_may_be_given(output: Path, source: Path) -> None:
    edit(output, source={"model": "gone", "revision": None})
    found = verify(output, str(source), load=False)
    assert (found.problems, found.notes) == ([], [])
    assert len(found.layers) == 64


def test_another_model_than_the_source_is_a_problem_and_no_crash(output: Path, source: Path) -> None:
    index = json.loads((source / "model_index.json").read_text())
    text_encoder = index.pop("text_encoder_2")
    (source / "model_index.json").write_text(json.dumps(index))
    assert "the source has no component 'text_encoder_2'" in words(verify(output, str(source), load=False))
    (source / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": text_encoder}))
    config = json.loads((source / "text_encoder_2" / "config.json").read_text())
    (source / "text_encoder_2" / "config.json").write_text(json.dumps({**config, "d_ff": 128}))
    file = source / "text_encoder_2" / "model.safetensors"
    cut = {"wi_0": (slice(128),), "wi_1": (slice(128),), "wo": (slice(None), slice(128))}
    tensors = load_file(file)
    for name in tensors:
        last = name.split(".")[-2]
        tensors[name] = tensors[name][cut[last]].contiguous() if last in cut else tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    found = words(verify(output, str(source), load=False))
    assert "DenseReluDense.wi_0.weight' does not hold its weight" in found
    assert "[256, 128]" in found
    assert "the source has [128, 128]" in found


def test_a_component_too_large_for_the_free_memory_is_not_loaded(
    convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(400_000_000))
    found = verify(convert("tiny-flux-fp8"))
    assert found.problems == []
    assert found.components["transformer"].endswith("not loaded (needs 0.5 GB of memory, 0.4 are free)")


def test_a_layer_of_zeros_is_exact_in_every_format(source: Path, write_recipe: Callable[[str], str]) -> None:
    names = [name for name in available() if name != "keep"]
    layers = [f"transformer_blocks.{n // 8}.attn.{ATTENTION[n % 8]}" for n in range(len(names))]
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for layer in layers:
        tensors[f"{layer}.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    options = {"int8-group": {"group": 64}}  # the layers have 192 inputs
    rules = "".join(
        f"      - {{layers: {layer}, backend: {name}, options: {options.get(name, {})}}}\n"
        for layer, name in zip(layers, names, strict=True)
    )
    recipe = write_recipe(f"components:\n  transformer:\n    rules:\n{rules}")
    found = verify(quantize(recipe, str(source), source.parent / "out"), load=False)
    assert found.problems == []
    assert {layer.layer: layer.sqnr_db for layer in found.layers} == dict.fromkeys(layers, float("inf"))
