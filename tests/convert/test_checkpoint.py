"""Sources: what is read, and what is refused with the place and the next step. Every case is a real folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitroute import plan, quantize, verify
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.layout import read_header
from bitroute.convert.reading import read_rows, read_tensor
from bitroute.errors import BitrouteError, RecipeError, SourceError

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
TRANSFORMER_RECIPE = "model: builtin:tiny-flux\ncomponents:\n  transformer: {backend: float8}\n"
CLIP_RECIPE = "model: builtin:tiny-flux\ncomponents:\n  text_encoder: {backend: float8, keep: none}\n"
Rewrite = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def edit_json(file: Path, **changes: Any) -> None:
    """Changes keys; a change to ... removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def rewrite(source: Path, component: str, change: Rewrite) -> None:
    file = source / component / WEIGHTS[component]
    changed = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file, metadata={"format": "pt"})


def shard(source: Path, component: str = "transformer") -> Path:
    """Cuts a component's single file into two shards with an index; returns the index."""
    file = source / component / WEIGHTS[component]
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard_name = f"{file.stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file.with_name(shard_name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard_name)
    file.unlink()
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def forward(model: FluxTransformer2DModel) -> Tensor:
    inputs = {
        "hidden_states": torch.randn(1, 16, 32), "img_ids": torch.zeros(16, 3), "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 8, 128), "txt_ids": torch.zeros(8, 3),
        "pooled_projections": torch.randn(1, 64),
    }  # fmt: skip
    with torch.inference_mode():
        sample: Tensor = model(**{name: tensor.bfloat16() for name, tensor in inputs.items()}).sample
    return sample


def refusal(source: Path, kind: type[BitrouteError] = RecipeError) -> str:
    with pytest.raises(kind) as refused:
        plan("tiny-flux-fp8", str(source))
    return str(refused.value)


def test_a_sharded_source_gives_the_same_layers_as_a_single_file(source: Path, convert: Callable[[str], Path]) -> None:
    shard(source)
    out = quantize("tiny-flux-fp8", str(source), source.parent / "out")
    name = f"transformer/{WEIGHTS['transformer']}"
    found, expected = load_file(out / name), load_file(convert("tiny-flux-fp8") / name)
    assert found.keys() == expected.keys()
    assert all(tensor.view(torch.uint8).equal(expected[key].view(torch.uint8)) for key, tensor in found.items())


def test_a_missing_shard_is_named_with_the_index(source: Path) -> None:
    index = shard(source)
    (source / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    words = refusal(source)
    assert str(index) in words
    assert "'diffusion_pytorch_model-00002-of-00002.safetensors' is missing" in words


OUTSIDE = ["../text_encoder/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_its_folder_is_refused(source: Path, name: str) -> None:
    index = shard(source)
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, next(iter(weight_map)): name})
    assert f"names a file outside its folder\n    got:      {name}" in refusal(source)


@pytest.mark.parametrize(
    ("name", "words"), [("n" * 5000, "n" * 80 + "\n"), ("a\x1b[31m", r"a\x1b[31m"), ("\0", r"\x00")]
)
def test_a_name_that_no_file_has_is_refused_and_not_painted(source: Path, name: str, words: str) -> None:
    index = shard(source)
    edit_json(index, weight_map={"x": name})
    assert f"{index}: the index names a file outside its folder\n    got:      {words}" in refusal(source)
    edit_json(source / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    assert f"names a part outside the pipeline folder\n    got:      {words}" in refusal(source)


def test_an_index_of_safetensors_leads_to_no_pickle(source: Path) -> None:
    index = shard(source)
    (index.parent / "x.bin").write_bytes(b"x")
    edit_json(index, weight_map={"x": "x.bin"})
    assert "the index names a file of another kind\n    got:      x.bin\n    expected: *.safetensors" in refusal(source)


@pytest.mark.parametrize("content", ["{]", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "\x00", "[" * 9999])
def test_an_index_that_is_none_is_refused_by_name(source: Path, content: str) -> None:
    index = shard(source)
    index.write_text(content)
    assert str(index) in refusal(source)


def test_a_tensor_in_two_shards_is_refused(source: Path) -> None:
    shard(source)
    first, second = sorted((source / "transformer").glob("*.safetensors"))
    shutil.copy(first, second)
    assert "stands in two files" in refusal(source)


def test_pickled_weights_are_refused_with_the_reason(source: Path) -> None:
    file = source / "transformer" / WEIGHTS["transformer"]
    file.rename(file.with_suffix(".bin"))
    words = refusal(source)
    assert "has no weights in safetensors" in words
    assert "diffusion_pytorch_model.bin" in words
    assert "can run code" in words


def test_files_are_read_through_links_as_the_cache_of_the_hub_has_them(
    source: Path, convert: Callable[[str], Path]
) -> None:
    shard(source)
    blobs = source.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    out = quantize("tiny-flux-fp8", str(source), source.parent / "out")
    expected = convert("tiny-flux-fp8")
    for name in json.loads((expected / "bitroute.json").read_text())["sha256"]:
        assert (out / name).read_bytes() == (expected / name).read_bytes() or name.endswith("config.json")
        assert not (out / name).is_symlink()


@pytest.mark.parametrize("name", [f"transformer/{WEIGHTS['transformer']}", "transformer/config.json"])
def test_what_is_no_file_is_named_and_not_waited_for(source: Path, name: str) -> None:
    for make in (os.mkfifo, os.mkdir, lambda file: file.symlink_to("nowhere"), lambda file: file.symlink_to(file)):
        shutil.rmtree(source / name) if (source / name).is_dir() else (source / name).unlink()
        make(source / name)
        assert f"{source / name}: " in refusal(source)


def test_a_missing_config_is_named(source: Path) -> None:
    (source / "transformer" / "config.json").unlink()
    assert f"{source / 'transformer' / 'config.json'}: the file is missing" in refusal(source)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "of that depth is not a config"),
        ('{"a": [' + "[]," * 5_400_000 + "[]]}", "of that size is not a config"),
    ],
    ids=["deep", "large"],
)
def test_a_config_deeper_or_larger_than_any_is_refused(source: Path, name: str, content: str, words: str) -> None:
    (source / name).write_text(content)
    assert f"{source / name}: a JSON file {words}" in refusal(source)


def test_no_module_that_a_model_brings_is_imported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it could be: in the working folder, on the path, beside the weights, and named by every config."""
    canary = source.parent / "ran"
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\nFluxTransformer2DModel = T5EncoderModel = Evil\n"
    for name in ("evil.py", "transformer/evil.py", "transformer/transformer.py", "text_encoder_2/evil.py"):
        (source / name).write_text(code)
    monkeypatch.chdir(source)
    monkeypatch.syspath_prepend(source)
    custom = {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}, "trust_remote_code": True}
    edit_json(source / "transformer" / "config.json", **custom, _class_name=["evil", "Evil"])
    edit_json(source / "text_encoder_2" / "config.json", **custom, architectures=["evil.Evil"])
    out = quantize("tiny-flux-fp8", str(source), source.parent / "out")
    assert verify(out, load=False).problems == []
    for library, name in (("evil", "Evil"), ("diffusers", "evil.Evil"), ("transformers", "evil")):
        edit_json(source / "model_index.json", transformer=[library, name])
        assert "transformer" in refusal(source)
    assert not canary.exists()


def test_a_variant_under_another_name_is_listed(source: Path) -> None:
    file = source / "transformer" / WEIGHTS["transformer"]
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "diffusion_pytorch_model.fp16.safetensors" in refusal(source)


def test_a_checkpoint_that_bitroute_wrote_is_refused_as_a_source(convert: Callable[[str], Path]) -> None:
    words = refusal(convert("tiny-flux-fp8"))
    assert "'transformer' is already quantized" in words
    assert "'text_encoder_2' is already quantized" in words
    assert "quant_method 'torchao'" in words


def test_float8_tensors_without_a_config_are_refused(source: Path) -> None:
    rewrite(
        source,
        "transformer",
        lambda tensors: {
            **tensors,
            "x_embedder.weight": tensors["x_embedder.weight"].to(torch.float8_e4m3fn),
        },
    )
    assert "got:      float8_e4m3fn tensors" in refusal(source)


def test_a_missing_tensor_is_named(source: Path) -> None:
    rewrite(source, "transformer", lambda tensors: {n: t for n, t in tensors.items() if n != "proj_out.weight"})
    assert "lacks tensor 'proj_out.weight'" in refusal(source)


def test_a_tensor_of_another_shape_than_the_config_says_is_named_with_both_shapes(source: Path) -> None:
    edit_json(source / "transformer" / "config.json", in_channels=64)
    words = refusal(source)
    assert "tensor 'x_embedder.weight' has another shape" in words
    assert "got:      [192, 32]" in words
    assert "expected: [192, 64]" in words


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": "three"}, {"num_layers": None}, {"attention_head_dim": -1}]
)
def test_a_config_that_the_class_refuses_is_named(source: Path, changes: dict[str, Any]) -> None:
    edit_json(source / "transformer" / "config.json", **changes)
    words = refusal(source)
    assert "FluxTransformer2DModel refuses its config" in words
    assert str(source / "transformer" / "config.json") in words


@pytest.mark.parametrize(
    "name", ["FluxTransformer9DModel", "os", "DiffusionPipeline", "FluxPipeline", "__doc__", "", "ModelMixin"]
)
def test_a_class_that_is_no_model_is_refused(source: Path, name: str) -> None:
    edit_json(source / "model_index.json", transformer=["diffusers", name])
    words = refusal(source)
    assert repr(name) in words or f"{name} refuses" in words


@pytest.mark.parametrize(
    "entry", [["diffusers"], ["diffusers", None], [["diffusers"], "X"], [None, None], "x", 3, None, {}]
)
def test_a_malformed_entry_of_the_pipeline_index_is_no_component(source: Path, entry: object) -> None:
    edit_json(source / "model_index.json", transformer=entry)
    assert "the pipeline has no component 'transformer'" in refusal(source)


@pytest.mark.parametrize("name", ["..", "../elsewhere", ".", "a/b", "/etc"])
def test_a_pipeline_index_that_leaves_its_folder_is_refused(source: Path, name: str) -> None:
    (source / name).mkdir(exist_ok=True, parents=True)
    edit_json(source / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    assert f"names a part outside the pipeline folder\n    got:      {name}\n" in refusal(source)


@pytest.mark.parametrize("content", ["", "{]", "[1]", "\x00\x01", "[" * 9999, "9" * 5000])
def test_a_pipeline_index_that_is_no_mapping_is_refused_by_name(source: Path, content: str) -> None:
    (source / "model_index.json").write_text(content)
    assert str(source / "model_index.json") in refusal(source)


def test_a_folder_that_is_no_pipeline_is_refused(source: Path) -> None:
    words = refusal(source / "tokenizer")
    assert "not a diffusers pipeline folder" in words
    assert "got:      no model_index.json" in words


def test_a_file_and_a_missing_folder_are_refused(source: Path) -> None:
    assert "a file" in refusal(source / "model_index.json")
    assert "no folder of that name" in refusal(source / "none")
    with pytest.raises(SourceError, match="no such model folder"):
        open_pipeline("builtin:../tiny-flux-none")


def test_a_truncated_weight_file_is_refused_before_the_job(source: Path) -> None:
    file = source / "transformer" / WEIGHTS["transformer"]
    file.write_bytes(file.read_bytes()[:-2])
    assert f"{file}: not a sound safetensors file" in refusal(source)


def test_all_components_report_their_problems_at_once(source: Path) -> None:
    edit_json(source / "transformer" / "config.json", in_channels=64)
    (source / "text_encoder_2" / "model.safetensors").unlink()
    words = refusal(source)
    assert "x_embedder.weight" in words
    assert "'text_encoder_2' has no weights" in words


def test_rows_are_the_bytes_of_the_tensor(tiny: Path) -> None:
    file = tiny / "transformer" / WEIGHTS["transformer"]
    name = "transformer_blocks.0.attn.to_q.weight"
    stored, expected = read_header(file).tensors[name], load_file(file)[name]
    assert read_tensor(stored).equal(expected)
    assert read_rows(stored, 5, 9).equal(expected[5:9])
    assert read_rows(stored, 9, 9).shape == (0, 192)


def test_a_file_that_shrinks_after_its_header_was_read_is_a_source_error(source: Path) -> None:
    file = source / "transformer" / WEIGHTS["transformer"]
    stored = max(read_header(file).tensors.values(), key=lambda tensor: tensor.offset)
    file.write_bytes(file.read_bytes()[: stored.offset + 1])
    with pytest.raises(SourceError, match=rf"ends inside tensor '{stored.name}'"):
        read_tensor(stored)
    file.unlink()
    with pytest.raises(SourceError, match=rf"cannot read tensor '{stored.name}'"):
        read_tensor(stored)


def test_older_clip_files_with_a_prefix_convert_and_load(source: Path, write_recipe: Callable[[str], str]) -> None:
    """transformers 4 wrote `text_model.` before every name, and position_ids beside the weights."""
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    rewrite(
        source, "text_encoder",
        lambda tensors: {**{f"text_model.{name}": tensor for name, tensor in tensors.items()}, **positions},
    )  # fmt: skip
    out = quantize(write_recipe(CLIP_RECIPE), str(source), source.parent / "out")
    found = verify(out)
    assert found.problems == []
    assert found.components["text_encoder"].endswith("loaded without bitroute; forward ok")
    assert {layer.layer for layer in found.layers} >= {"encoder.layers.0.self_attn.q_proj"}


def test_spaces_and_unicode_in_the_path_do_no_harm(source: Path, write_recipe: Callable[[str], str]) -> None:
    moved = source.rename(source.with_name("mödel 模型 [v1] {0-3} 100%"))
    found = verify(quantize(write_recipe(TRANSFORMER_RECIPE), str(moved), moved.parent / "öut put [x]"))
    assert found.problems == []
    assert found.components["transformer"].endswith("loaded without bitroute; forward ok")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recipe", ["tiny-flux-fp8", "tiny-flux-int8", "tiny-flux-mixed", "tiny-flux-nf4"])
def test_sources_in_other_dtypes_convert_load_and_keep_theirs(source: Path, dtype: torch.dtype, recipe: str) -> None:
    for component in ("transformer", "text_encoder_2"):
        rewrite(source, component, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    out = quantize(recipe, str(source), source.parent / "out")
    assert verify(out, load=False).problems == []
    kept = read_header(out / "transformer" / WEIGHTS["transformer"]).tensors["x_embedder.weight"]
    assert kept.spec.dtype == dtype
    if recipe != "tiny-flux-nf4":  # its loader wants a GPU
        assert (
            forward(FluxTransformer2DModel.from_pretrained(out / "transformer", dtype=torch.bfloat16)).isfinite().all()
        )
