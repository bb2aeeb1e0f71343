"""Quantized checkpoints of our own, back to floats: every backend, every container, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxTransformer2DModel
from hub import Hub
from safetensors.torch import load_file, save_file

from bitroute import backends, dequantize, plan, quantize, verify
from bitroute.cli import main
from bitroute.convert.dequantize import plan_dequantized
from bitroute.convert.describe import provenance
from bitroute.convert.reading import read_tensor
from bitroute.convert.record import RecordedEntry, read_record
from bitroute.errors import JobError, RecipeError, SourceError

NAME = "diffusion_pytorch_model.safetensors"
FORMATS = [name for name in backends.available() if name != "keep"]
Convert = Callable[[str], Path]


def recipe_of(backend: str) -> str:
    return f"model: builtin:tiny-flux\ncomponents:\n  transformer: {{backend: {backend}, otherwise: keep}}\n"


def weights(folder: Path, component: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(next((folder / component).glob("*.safetensors")))


def edit(file: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def quantized(tmp_path: Path, convert: Convert) -> Path:
    """A checkpoint of one's own, in the bitroute container."""
    return Path(shutil.copytree(convert(recipe_of("nf4")), tmp_path / "quantized"))


@pytest.mark.parametrize("backend", FORMATS)
def test_every_weight_is_what_its_backend_decodes_rounded_to_bf16(
    backend: str, convert: Convert, tmp_path: Path
) -> None:
    source = convert(recipe_of(backend))
    found = weights(dequantize(source, tmp_path / "out"))
    recorded = read_record(source).components[0]
    assert any(entry.quantized for entry in recorded.entries)
    assert found.keys() == {entry.name for entry in recorded.entries}
    for entry in recorded.entries:
        stored = {suffix: read_tensor(recorded.component.tensors[name]) for suffix, (name, _) in entry.tensors.items()}
        expected = entry.backend.decode(stored, entry.weight) if entry.quantized else stored["weight"]
        assert found[entry.name].dtype == torch.bfloat16
        assert torch.equal(found[entry.name], expected.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["float8", "int8", "nvfp4", "mxfp6"])
def test_the_weights_are_those_that_diffusers_dequantizes(backend: str, convert: Convert, tmp_path: Path) -> None:
    """By torchao's own tensors, and by the bitroute quantizer."""
    source = convert(recipe_of(backend))
    model = FluxTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    model.dequantize()
    expected = model.state_dict()
    for name, tensor in weights(dequantize(source, tmp_path / "out")).items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16))


def test_the_result_loads_without_any_quantization_and_is_verified(convert: Convert, tmp_path: Path) -> None:
    found = verify(dequantize(convert(recipe_of("nf4")), tmp_path / "out"))
    assert found.problems == []
    assert found.compared
    assert "loaded without bitroute; forward ok" in found.components["transformer"]


@pytest.mark.parametrize("recipe", ["tiny-flux-nf4", "tiny-flux-mixed"])
def test_every_container_of_a_pipeline_is_read_and_none_is_left(recipe: str, convert: Convert, tmp_path: Path) -> None:
    """bitsandbytes and torchao, bitroute and torchao."""
    out = dequantize(convert(recipe), tmp_path / "out")
    found = verify(out, load=False)
    assert found.problems == []
    assert found.components.keys() == {"transformer", "text_encoder_2"}
    assert list(out.rglob("*.part")) == []
    for config in out.rglob("config.json"):
        assert "quantization_config" not in json.loads(config.read_text())


def test_what_was_not_quantized_goes_along_untouched(convert: Convert, tmp_path: Path) -> None:
    source = convert("tiny-flux-fp8")
    out = dequantize(source, tmp_path / "out")
    for name in ("model_index.json", "vae/config.json", f"vae/{NAME}", "scheduler/scheduler_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_dtype_is_that_of_all_floats(convert: Convert, tmp_path: Path) -> None:
    source = convert(recipe_of("float8"))
    plain = weights(dequantize(source, tmp_path / "plain"))
    half = weights(dequantize(source, tmp_path / "half", dtype="float16"))
    single = weights(dequantize(source, tmp_path / "single", dtype="float32"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert {tensor.dtype for tensor in single.values()} == {torch.float32}
    assert all(torch.equal(single[name].to(torch.bfloat16), tensor) for name, tensor in plain.items())
    assert verify(tmp_path / "half", load=False).problems == []


def test_a_value_that_the_dtype_cannot_hold_ends_the_job_with_its_name(quantized: Path, tmp_path: Path) -> None:
    file = quantized / "transformer" / NAME
    edit(file, "x_embedder.bias", lambda bias: torch.full_like(bias, 1e30))
    with pytest.raises(JobError, match=r"x_embedder\.bias: 1\.00026e\+30 does not fit float16\n.*\n.*--dtype fp32"):
        dequantize(quantized, tmp_path / "out", dtype="float16")
    assert list((tmp_path / "out").rglob("config.json")) == []


def test_an_interrupted_job_is_resumed_to_the_same_bytes(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitroute.convert.plan.SHARD_BYTES", 1_000_000)

    def interrupt(done_bytes: int, what: str) -> None:
        if list(tmp_path.glob("out/transformer/*-00001-of-*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantize(quantized, tmp_path / "out", progress=interrupt)
    with pytest.raises(RecipeError, match="an unfinished output of bitroute"):
        dequantize(quantized, tmp_path / "out")
    with pytest.raises(RecipeError, match="the source's dequantize has changed"):
        dequantize(quantized, tmp_path / "out", dtype="float32", resume=True)
    out, whole = dequantize(quantized, tmp_path / "out", resume=True), dequantize(quantized, tmp_path / "whole")
    for file in (file for file in whole.rglob("*") if file.is_file()):
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_a_model_without_quantized_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nothing is quantized in this model"):
        dequantize(tiny, tmp_path / "out")


def test_files_that_are_not_those_of_the_record_are_refused_before_the_job(quantized: Path, tmp_path: Path) -> None:
    file = quantized / "transformer" / NAME
    edit(file, "transformer_blocks.1.attn.to_q.codes", lambda codes: codes[:-1].clone())
    edit(file, "transformer_blocks.0.attn.to_q.absmax", lambda absmax: absmax.float())
    with pytest.raises(RecipeError) as refused:
        dequantize(quantized, tmp_path / "out")
    assert len(refused.value.problems) == 2
    assert "'transformer_blocks.1.attn.to_q.codes' is not as the record of this checkpoint says" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_weight_whose_parts_are_rubbish_ends_the_job_with_its_name(quantized: Path, tmp_path: Path) -> None:
    edit(quantized / "transformer" / NAME, "transformer_blocks.1.attn.to_q.quant_state", torch.zeros_like)
    with pytest.raises(SourceError, match=r"the weight 'transformer_blocks\.1\.attn\.to_q\.weight' cannot be decoded"):
        dequantize(quantized, tmp_path / "out")


def test_a_quantized_source_is_refused_unless_it_is_dequantized(
    convert: Convert, tmp_path: Path, write_recipe: Callable[[str], str]
) -> None:
    source = str(convert(recipe_of("float8")))
    with pytest.raises(RecipeError, match="already quantized") as refused:
        plan("tiny-flux-fp8", source)
    assert "--dequantize): the errors of both add up" in str(refused.value)
    by_recipe = plan(write_recipe(f"extends: tiny-flux-fp8\nmodel: {source}\ndequantize: true\n"))
    by_argument = plan("tiny-flux-fp8", source, dequantize=True)
    assert [provenance(made)["source"] for made in (by_recipe, by_argument)] == [
        {"model": source, "revision": None, "dequantize": True}
    ] * 2
    out = quantize("tiny-flux-fp8", source, tmp_path / "out", dequantize=True)
    found = verify(out, load=False)
    assert found.problems == []
    assert found.compared
    assert found.worst[0].sqnr_db > 30


def test_the_recipe_says_as_what_a_quantized_source_is_read(write_recipe: Callable[[str], str]) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: 'dequantize' is not valid"):
        plan(write_recipe("extends: tiny-flux-fp8\ndequantize: int8\n"))


def test_memory_grows_by_the_largest_layer_only(convert: Convert) -> None:
    planned = plan_dequantized(str(convert(recipe_of("float8"))))
    assert planned.source_bytes < 0.7 * planned.size_bytes, "before are the bytes in the files"
    largest = max(entry.weight.numel for component in planned.components for entry in component.entries)
    entries: list[RecordedEntry] = read_record(convert(recipe_of("float8"))).components[0].entries
    assert largest == max(entry.weight.numel for entry in entries)
    assert planned.job_peak_bytes >= 12 * largest


def test_a_component_that_is_not_quantized_stays_as_it_is(
    convert: Convert, tmp_path: Path, write_recipe: Callable[[str], str]
) -> None:
    source = convert(recipe_of("float8"))
    components = "  transformer: {backend: keep}\n  text_encoder: {backend: keep}\n"
    out = quantize(
        write_recipe(f"model: {source}\ndequantize: float32\ncomponents:\n{components}"), out=tmp_path / "out"
    )
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}
    found, original = weights(out, "text_encoder"), weights(source, "text_encoder")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in original.items()
    )
    assert verify(out, load=False).problems == []


def test_the_command_writes_a_folder_and_says_what_is_wrong(
    convert: Convert, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(convert(recipe_of("float8")), tmp_path / "flux-fp8")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["dequantize", str(source), "--no-verify", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "flux-fp8-dequantized"
    found = CliRunner().invoke(main, ["verify", "flux-fp8-dequantized", "--no-load"])
    assert found.exit_code == 0
    assert "verified: flux-fp8-dequantized" in found.stdout
    for words, code, said in (
        ([str(source)], 2, "an earlier output of bitroute"), ([str(tiny)], 2, "nothing is quantized in this model"),
        ([str(source), "--resume", "--overwrite"], 2, "give one of them"), (["no-such"], 2, "no such model folder"),
    ):  # fmt: skip
        refused = CliRunner().invoke(main, ["dequantize", *words])
        assert (refused.exit_code, said in refused.stderr) == (code, True), refused.stderr


@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_a_quantized_model_on_the_hub_is_planned_before_it_is_downloaded(
    backend: str, hub: Hub, convert: Convert, tmp_path: Path
) -> None:
    hub.add("me/quantized", convert(recipe_of(backend)))
    planned = plan("tiny-flux-fp8", "me/quantized", dequantize=True)
    assert planned.pipeline.is_outline
    out = quantize("tiny-flux-fp8", "me/quantized", tmp_path / "out", dequantize=True)
    found = verify(out, load=False)
    assert found.problems == []
    assert found.compared


def test_a_component_without_a_pipeline_is_decoded_too(convert: Convert, tiny: Path, tmp_path: Path) -> None:
    """One of a pipeline, whose record is elsewhere, and one that was quantized alone and has its own."""
    pipeline, recipe = convert(recipe_of("mxfp4")), tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of("mxfp4"))
    alone = quantize(str(recipe), str(tiny / "transformer"), tmp_path / "alone")
    expected = weights(dequantize(pipeline, tmp_path / "whole"))
    for number, source in enumerate((pipeline / "transformer", alone)):
        found = load_file(dequantize(source, tmp_path / f"out-{number}") / NAME)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert verify(tmp_path / "out-1", load=False).problems == []
