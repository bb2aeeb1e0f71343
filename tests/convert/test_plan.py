"""The plan: exact before a weight is read, and every refusal with its place."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from bitroute import plan, quantize
from bitroute.cli import main
from bitroute.convert import plan as planning
from bitroute.convert.describe import describe
from bitroute.convert.entry import Entry
from bitroute.convert.layout import read_header
from bitroute.errors import RecipeError

TINY_RECIPES = [f"tiny-flux-{name}" for name in ("fp8", "int8", "nf4", "nvfp4", "mxfp4", "mixed")]
Usage = namedtuple("Usage", "total used free")
Write = Callable[[str], str]


def recipe(transformer: str, *, model: str = "builtin:tiny-flux") -> str:
    return f"model: {model}\ncomponents:\n  transformer: {transformer}\n"


def refusal(name: str, model: Path | None = None) -> str:
    with pytest.raises(RecipeError) as refused:
        plan(name, str(model) if model else None)
    return str(refused.value)


def hollow(source: Path) -> None:
    """Leaves only the headers of all weight files; the payloads become holes."""
    for file in source.rglob("*.safetensors"):
        size_bytes = file.stat().st_size
        with open(file, "r+b") as stream:
            stream.truncate(8 + int.from_bytes(stream.read(8), "little"))
            stream.truncate(size_bytes)


def narrow(source: Path) -> Path:
    """The transformer with 24 latent channels, which are no whole block of any 4-bit format."""
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"][:, :24].contiguous()
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:24].contiguous()
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:24].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    config = source / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 24}))
    return source


@pytest.mark.parametrize("name", TINY_RECIPES)
def test_the_planned_sizes_are_the_sizes_on_disk(name: str, convert: Callable[[str], Path]) -> None:
    planned, out = plan(name), convert(name)
    for component in planned.components:
        files = sorted((out / component.name).glob("*.safetensors"))
        stored = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
        assert {name: tensor.spec for name, tensor in stored.items()} == component.specs(component.entries)
        assert sum(tensor.spec.size_bytes for tensor in stored.values()) == component.size_bytes
    copied = sum((out / name).stat().st_size for name in planned.copied)
    assert planned.size_bytes == copied + sum(component.size_bytes for component in planned.components)


def test_a_plan_reads_only_headers_and_configs(source: Path) -> None:
    complete = describe(plan("tiny-flux-mixed", str(source)))
    hollow(source)
    before = _bytes_read()
    assert describe(plan("tiny-flux-mixed", str(source))) == complete
    assert _bytes_read() - before < 500_000 < complete["source_bytes"] / 20


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


@pytest.mark.parametrize(
    ("backend", "bits"),
    [
        ("float8", 8 + 32 / 192),
        ("int8", 8 + 40 / 192),
        ("nvfp4", 4.5 + 32 / 192**2),
        ("mxfp4", 4.25),
        ("keep", 16),
    ],
)
def test_bits_per_weight_count_the_scales(backend: str, bits: float, write_recipe: Write) -> None:
    planned = plan(write_recipe(recipe(f"{{backend: {backend}, keep: none}}")))
    entries = {entry.name: entry for entry in planned.components[0].entries}
    assert entries["transformer_blocks.0.attn.to_q.weight"].bits_per_weight == pytest.approx(bits)


def test_every_source_tensor_has_one_entry_with_its_rule_and_line(source: Path, write_recipe: Write) -> None:
    file = write_recipe(
        "model: builtin:tiny-flux\ncomponents:\n  transformer:\n    backend: float8\n    rules:\n"
        '      - layers: "transformer_blocks.{0}.*"\n        backend: int8\n'
        "      - {role: modulation, backend: nvfp4}\n"
    )
    entries = plan(file).components[0].entries
    tensors = read_header(source / "transformer" / "diffusion_pytorch_model.safetensors").tensors
    assert sorted(entry.name for entry in entries) == sorted(tensors)
    by_name = {entry.name: (entry.backend.name, entry.reason, entry.where) for entry in entries}
    assert by_name["transformer_blocks.0.norm1.linear.weight"] == ("int8", "rule 1", f"{file}:6")
    assert by_name["transformer_blocks.1.norm1.linear.weight"] == ("nvfp4", "rule 2", f"{file}:8")
    assert by_name["transformer_blocks.1.attn.to_q.weight"] == ("float8", "default", f"{file}:3")
    assert by_name["x_embedder.weight"][:2] == ("keep", "keep (profile)")
    assert by_name["transformer_blocks.0.norm1.linear.bias"][0] == "keep"


@pytest.mark.parametrize(("backend", "why"), [("nvfp4", "24 input features"), ("nf4", "rows of 24"), ("mxfp4", "24")])
def test_a_shape_that_a_format_cannot_hold_is_refused_with_the_layer_and_the_line(
    source: Path, write_recipe: Write, backend: str, why: str
) -> None:
    words = refusal(write_recipe(recipe(f"{{backend: {backend}, keep: none}}")), narrow(source))
    assert f"recipe.yaml:3: {backend} cannot hold layer 'x_embedder'" in words
    assert why in words
    assert "otherwise: keep" in words
    assert words.count("cannot hold") == 1


def test_otherwise_keep_keeps_the_refused_layer_and_says_so(source: Path, write_recipe: Write) -> None:
    planned = plan(write_recipe(recipe("{backend: nvfp4, keep: none, otherwise: keep}")), str(narrow(source)))
    kept = [entry.layer for entry in planned.components[0].entries if entry.kind == "Linear" and not entry.quantized]
    assert kept == ["x_embedder"]
    assert any("x_embedder is kept: 24 input features" in note for note in planned.components[0].notes)


def test_the_report_lists_every_problem_of_a_recipe_with_its_line(write_recipe: Write) -> None:
    file = write_recipe(
        "model: builtin:tiny-flux\n"
        "components:\n"
        "  transformer:\n"
        "    backend: flaot8\n"
        "    keeep: none\n"
        "    rules:\n"
        '      - layers: "transformer_blocks.{0-9}.*"\n'
        "        backend: int8\n"
        '      - layers: "single_transformer_blocks.*"\n'
        "        backend: int8\n"
        '      - layers: "single_transformer_blocks.*.proj_mlp"\n'
        "        backend: nf4\n"
    )
    done = CliRunner().invoke(main, ["--recipe", file, "--dry-run"])
    assert done.exit_code == 2
    assert done.stdout == ""
    for line, words in {
        4: "unknown backend 'flaot8'",
        5: "unknown key 'keeep'",
        7: "'transformer_blocks.{0-9}.*' reaches outside the model",
        11: "'single_transformer_blocks.*.proj_mlp' can never win",
    }.items():
        assert f"{file}:{line}: {words}" in done.stderr
    assert "did you mean 'float8'?" in done.stderr
    assert "did you mean 'keep'?" in done.stderr
    assert "0-1 in transformer_blocks" in done.stderr
    assert done.stderr.count(f"{file}:") >= 4


def test_bad_options_are_reported_once_with_the_line_of_the_options(write_recipe: Write) -> None:
    file = write_recipe(
        "model: builtin:tiny-flux\ncomponents:\n  transformer:\n    backend: nvfp4\n"
        "    options: {scael: mse, scale: 3}\n"
    )
    words = refusal(file)
    assert words.count(f"{file}:5: ") == 2
    assert "did you mean 'scale'?" in words


def test_a_component_that_the_pipeline_lacks_is_refused_with_the_nearest_name(write_recipe: Write) -> None:
    words = refusal(write_recipe("model: builtin:tiny-flux\ncomponents:\n  transfomer: {backend: int8}\n"))
    assert "recipe.yaml:3: the pipeline has no component 'transfomer'" in words
    assert "did you mean 'transformer'?" in words


def test_a_class_without_a_profile_needs_an_explicit_keep(write_recipe: Write, source: Path) -> None:
    AutoencoderTiny().save_pretrained(source / "vae")
    index = source / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("AutoencoderKL", "AutoencoderTiny"), encoding="utf-8")
    text = f"model: {source}\ncomponents:\n  vae: {{backend: float8}}\n"
    assert "no profile is known for AutoencoderTiny" in refusal(write_recipe(text))
    words = refusal(write_recipe(text.replace("float8", "float8, keep: none")))
    assert "the recipe quantizes no layer of 'vae'" in words
    assert "convolutions are quantized by a rule only (role: convolution), embeddings are not" in words


@pytest.mark.parametrize(
    ("transformer", "why"),
    [
        (
            "{backend: float8, container: native, rules: [{role: feed-forward, backend: nf4}]}",
            "mixes the families",
        ),
        ("{backend: mxfp4, container: native}", "no library runs mxfp4"),
        ("{backend: nf4, container: native}", "cannot keep 'proj_out'"),
        ("{backend: quanto-int8, container: native}", "'linear'"),
    ],
)
def test_a_native_container_that_cannot_be_is_refused_with_the_reason(
    write_recipe: Write, transformer: str, why: str
) -> None:
    words = refusal(write_recipe(recipe(transformer)))
    assert "recipe.yaml:3: component 'transformer' has no native container" in words
    assert why in words
    planned = plan(write_recipe(recipe(transformer.replace("native", "auto"))))
    assert planned.components[0].container.name == "bitroute"
    assert why in planned.components[0].notes[-1]


def test_what_loading_needs_is_said_before_the_job(write_recipe: Write) -> None:
    planned = plan("tiny-flux-nf4")
    assert planned.packages == ["accelerate", "bitsandbytes", "diffusers", "torchao", "transformers"]
    assert [device.partition(":")[0] for device in planned.devices] == ["to load transformer"]
    dynamic = plan(write_recipe(recipe("{backend: float8, options: {activations: dynamic}}")))
    assert "compute capability 8.9" in dynamic.devices[0]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(RecipeError, match=r"(?s)disk is too full.*0\.00 GB free.*expected: 0\.02 GB"):
        quantize("tiny-flux-fp8", out=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_replacing_an_output_counts_its_own_room_and_keeps_it_when_there_is_none(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(output.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(RecipeError, match="disk is too full"):
        quantize("tiny-flux-fp8", out=output, overwrite=True)
    assert sorted(output.rglob("*")) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 18 * 10**6, 18 * 10**6))
    quantize("tiny-flux-fp8", out=output, overwrite=True)
    assert sorted(output.rglob("*")) == before


def test_shards_stay_below_the_limit_and_a_layer_stays_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHARD_BYTES", 400_000)
    for component in plan("tiny-flux-mixed").components:
        homes: dict[str, set[int]] = {}
        for number, shard in enumerate(component.shards):
            assert sum(entry.size_bytes for entry in shard) <= 400_000
            for entry in shard:
                homes.setdefault(entry.layer, set()).add(number)
        assert len(component.shards) > 1
        assert [layer for layer, found in homes.items() if layer and len(found) > 1] == []


def test_a_layer_that_is_larger_than_a_shard_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHARD_BYTES", 1000)
    component = plan("tiny-flux-fp8").components[0]
    assert all(len({entry.layer for entry in shard}) == 1 for shard in component.shards if _size(shard) > 1000)
    assert len(set(component.shard_names)) == len(component.shards) > 50


def _size(shard: list[Entry]) -> int:
    return sum(entry.size_bytes for entry in shard)


def test_the_memory_of_a_job_grows_with_its_workers_and_what_they_hold_of_a_layer(
    monkeypatch: pytest.MonkeyPatch, write_recipe: Write
) -> None:
    monkeypatch.setattr(planning, "cores", lambda: 3)
    scales = 4 * 1152  # float8: a scale per row of the tallest layer, in float32
    assert plan("tiny-flux-fp8").job_peak_bytes == 256 * 2**20 + 3 * (32 * 2**20 + 8 * scales)
    recipe = "model: builtin:tiny-flux\ncomponents: {transformer: {backend: float8, method: {low_rank: 4}}}\n"
    assert plan(write_recipe(recipe)).job_peak_bytes == 352 * 2**20 + 3 * 22 * 1152 * 192


def test_a_recipe_without_a_model_says_how_to_give_one(write_recipe: Write) -> None:
    assert "give --model DIR" in refusal(write_recipe("components:\n  transformer: {backend: int8}\n"))


def test_an_unknown_recipe_names_the_nearest_built_in_one() -> None:
    assert "did you mean 'tiny-flux-fp8'?" in refusal("tiny-flux-pf8")


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="file"):
        quantize("tiny-flux-fp8", out=tmp_path / "file" / "out")
    assert os.listdir(tmp_path) == ["file"]
