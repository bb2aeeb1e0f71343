"""Weights with a variant in their names: read from folders, and written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxPipeline
from huggingface_hub import constants
from safetensors.torch import load_file

from bitroute import plan, quantize, verify
from bitroute.cli import main
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.conversion import convert
from bitroute.convert.inspection import inspect
from bitroute.convert.reading import read_json
from bitroute.convert.record import read_record
from bitroute.convert.reload import Reload, reload
from bitroute.convert.snippet import recorded_code
from bitroute.errors import BitrouteError, RecipeError, SourceError

PARTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
STEM = "diffusion_pytorch_model"


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where links to weights are put."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture(scope="module")
def half(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled pipeline as diffusers and transformers write a variant, in shards; read-only by agreement."""
    folder = tmp_path_factory.mktemp("half") / "half"
    pipeline = FluxPipeline.from_pretrained(tiny, torch_dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="1MB")
    return folder


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with a variant in its names; read-only by agreement."""
    out = tmp_path_factory.mktemp("written") / "out"
    return convert(tiny, out, dtype="float16", shard_bytes=1_000_000, out_variant="fp16")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    before, after = weights(first), weights(second)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def command(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [*map(str, words)])
    return done.exit_code, done.stdout if done.exit_code == 0 else done.stderr


def executed(code: str) -> dict[str, Any]:
    """What the lines bind."""
    found: dict[str, Any] = {}
    exec(code, found)
    return found


# Reading


def test_every_part_of_a_variant_is_read_and_written_under_plain_names(half: Path, tmp_path: Path) -> None:
    out = convert(half, tmp_path / "out", variant="fp16")
    assert all(same(half / part, out / part) for part in PARTS)
    assert f"{STEM}.safetensors" in names(out / "transformer")
    assert not list(out.rglob("*fp16*"))
    assert json.loads((out / "bitroute.json").read_text())["source"]["variant"] == "fp16"
    found = verify(out, load=False)
    assert (found.problems, found.compared) == ([], True)


def test_a_recipe_names_the_variant_and_parts_that_it_leaves_out_are_copied_under_plain_names(
    half: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {json.dumps(str(half))}\nvariant: fp16\ncomponents:\n  vae: {{backend: keep}}\n")
    out = quantize(str(recipe), out=tmp_path / "out")
    assert all(same(half / part, out / part) for part in PARTS)
    assert f"{STEM}.safetensors" in names(out / "vae")
    assert FluxPipeline.from_pretrained(out).transformer.proj_out.weight.isfinite().all()
    assert quantize(str(recipe), out=out, resume=True) == out


def test_a_part_without_the_variant_gives_its_plain_weights(half: Path, tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(half, tmp_path / "source"))
    shutil.rmtree(source / "vae")
    shutil.copytree(tiny / "vae", source / "vae")
    components = open_pipeline(str(source), variant="fp16").components
    assert components["vae"].tensors.keys() == weights(tiny / "vae").keys()
    assert {tensor.spec.dtype for tensor in components["transformer"].tensors.values()} == {torch.float16}


@pytest.mark.parametrize("library", ["legacy", "pickle"])
def test_older_names_of_shards_and_pickles_are_known(library: str, half: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(half, tmp_path / "source"))
    part = source / "text_encoder_2"
    if library == "legacy":
        for file in part.glob("*.safetensors"):
            file.rename(part / f"{file.name.replace('.fp16', '').removesuffix('.safetensors')}.fp16.safetensors")
        index = part / "model.safetensors.index.fp16.json"
        text = index.read_text().replace("model.fp16-", "model-").replace('.safetensors"', '.fp16.safetensors"')
        index.unlink()
        (part / "model.safetensors.fp16.index.json").write_text(text)
    else:
        tensors = weights(part)
        for file in part.glob("model*"):
            file.unlink()
        torch.save(tensors, part / "pytorch_model.fp16.bin")
    opened = open_pipeline(str(source), variant="fp16", allow_pickle=True).components["text_encoder_2"]
    assert opened.tensors.keys() == weights(half / "text_encoder_2").keys()


def test_what_goes_from_a_folder_goes_from_its_links(half: Path, assets: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(half, tmp_path / "source"))
    (source / "tokenizer" / "extra.txt").write_text("x")
    assert (open_pipeline(str(source), variant="fp16").folder / "tokenizer" / "extra.txt").read_text() == "x"
    (source / "tokenizer" / "extra.txt").unlink()
    folder = open_pipeline(str(source), variant="fp16").folder
    assert assets in folder.parents
    assert "extra.txt" not in names(folder / "tokenizer")


def test_without_a_choice_the_plain_weights_are_read_and_no_other_is_copied(
    half: Path, tiny: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(half, tmp_path / "source"))
    for part in PARTS:
        shutil.copytree(tiny / part, source / part, dirs_exist_ok=True)
    out = quantize("tiny-flux-fp8", str(source), tmp_path / "out")
    assert not list(out.rglob("*fp16*"))
    assert same(tiny / "vae", out / "vae")


def test_variants_alone_are_named_with_the_option_that_chooses_one(half: Path) -> None:
    with pytest.raises(
        BitrouteError, match=r"fp16-00001-of(.|\n)*`variant: fp16` in the recipe, or give --variant fp16"
    ):
        plan("tiny-flux-fp8", str(half))
    with pytest.raises(BitrouteError, match=r"no weights of the variant 'bf16'(.|\n)*only fp16"):
        plan("tiny-flux-fp8", str(half), variant="bf16")


def test_a_single_file_has_no_variant_and_a_folder_no_revision(half: Path, tiny: Path) -> None:
    with pytest.raises(SourceError, match="a local file has no `variant`"):
        open_pipeline(str(tiny / "vae" / f"{STEM}.safetensors"), variant="fp16", config=str(tiny))
    with pytest.raises(SourceError, match="a local folder has no `revision`"):
        open_pipeline(str(half), "main", "fp16")


def test_links_that_cannot_be_made_are_no_traceback(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"cannot link the weights(.|\n)*set HF_HOME"):
        open_pipeline(str(half), variant="fp16")


def test_the_output_may_not_lie_in_the_source_behind_the_links(half: Path) -> None:
    with pytest.raises(RecipeError, match="the output folder lies in the source model"):
        convert(half, half / "out", variant="fp16")


def test_every_command_that_reads_a_model_takes_the_option(half: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words in (
        ("--recipe", "tiny-flux-fp8", "--model", half, "--out", out, "--dry-run"), ("profile", half),
        ("convert", half, "--out", out, "--dry-run"), ("recommend", half, "--vram", "12GB"),
    ):  # fmt: skip
        assert command(*words)[0] == (0 if words[0] == "profile" else 2)  # it reads configs only
        code, said = command(*words, "--variant", "fp16")
        assert (code, "transformer" in said) == (0, True)
    assert not out.exists()


def test_inspect_shows_the_variant_that_it_is_asked_for(half: Path, tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(half, tmp_path / "source"))
    shutil.copytree(tiny / "vae", source / "vae", dirs_exist_ok=True)
    found = inspect(source, "fp16")
    assert found["folder"] == str(source)
    assert found["components"]["vae"]["dtypes"].keys() == {"F16"}
    assert inspect(source)["components"]["vae"]["dtypes"].keys() == {"BF16", "F16"}


# Writing


def test_what_is_written_has_the_names_that_diffusers_and_transformers_give(written: Path, half: Path) -> None:
    for part, stem in (("transformer", STEM), ("text_encoder", "model")):
        found, expected = names(written / part), names(half / part)
        assert f"{stem}.safetensors.index.fp16.json" in expected or f"{stem}.fp16.safetensors" in expected
        assert {name.partition("-")[0] for name in found} == {name.partition("-")[0] for name in expected}
    assert same(half / "transformer", written / "transformer")


def test_the_lines_that_load_a_variant_say_so_and_load_it_in_a_fresh_process(written: Path) -> None:
    code = recorded_code(read_record(written), str(written))
    assert 'variant="fp16", dtype=torch.float16)' in code
    words = [sys.executable, "-c", f"{code}\nprint(pipe.transformer.dtype)"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1] == "torch.float16"


def test_a_written_variant_is_verified_inspected_and_resumed_as_it_began(written: Path, tiny: Path) -> None:
    found = verify(written, load=False)
    assert (found.problems, found.compared) == ([], True)
    assert len(inspect(written)["components"]["transformer"]["files"]) > 2
    said = {"dtype": "float16", "shard_bytes": 1_000_000}
    assert convert(tiny, written, **said, out_variant="fp16", resume=True) == written
    with pytest.raises(RecipeError, match=r"the plan has changed(.|\n)*got: +ema"):
        convert(tiny, written, **said, out_variant="ema", resume=True)


def test_verify_loads_a_component_of_a_variant(written: Path) -> None:
    recorded = next(recorded for recorded in read_record(written).components if recorded.name == "vae")
    assert reload([recorded]) == {"vae": Reload("loaded without bitroute; forward ok")}


def test_a_written_variant_is_a_source_again(written: Path, tmp_path: Path) -> None:
    out = convert(written, tmp_path / "out", variant="fp16", out_variant="half")
    assert same(written / "vae", out / "vae")
    assert f"{STEM}.half.safetensors" in names(out / "vae")


@pytest.mark.parametrize("name", ["", "../x", "fp16.x", "fp16-00001-of-00002", "safetensors", "a" * 99, "1\n"])
def test_a_variant_that_file_names_cannot_carry_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    code, said = command("convert", tiny, "--out", tmp_path / "out", "--out-variant", name)
    assert (code, "not a variant that file names can carry" in said) == (2, True)


def test_a_name_without_a_dot_beside_a_variant_is_refused_because_diffusers_fails_on_it(
    source: Path, tmp_path: Path
) -> None:
    (source / "tokenizer" / "LICENSE").write_text("x")
    with pytest.raises(RecipeError, match=r"no variant beside a name without a dot(.|\n)*tokenizer/LICENSE"):
        convert(source, tmp_path / "out", out_variant="fp16")


def test_a_bare_component_is_written_as_a_variant_too(tiny: Path, tmp_path: Path) -> None:
    code, said = command("convert", tiny / "vae", "--out", tmp_path / "vae", "--out-variant", "ema", "--no-verify")
    assert code == 0
    lines = "\n".join(line.removeprefix("    ") for line in said.splitlines()[2:])
    assert "AutoencoderKL.from_pretrained(" in lines
    assert executed(lines)["vae"].dtype == torch.bfloat16


# The dtype in configs and in the loading lines


def test_another_dtype_stands_in_the_configs_of_transformers_too(written: Path) -> None:
    configs = {part: read_json(written / part / "config.json") for part in PARTS}
    said = {part: config.get("dtype") for part, config in configs.items()}
    assert said == {"text_encoder": "float16", "text_encoder_2": "float16", "transformer": None, "vae": None}


def test_the_config_of_every_model_in_a_config_gets_the_dtype(source: Path, tmp_path: Path) -> None:
    file = source / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    config.pop("dtype")
    file.write_text(json.dumps({**config, "text_config": {"torch_dtype": "bfloat16", "hidden_size": 1}}))
    out = convert(source, tmp_path / "out", dtype="float32")
    found = read_json(out / "text_encoder" / "config.json")
    assert (found["dtype"], found["text_config"]) == ("float32", {"torch_dtype": "float32", "hidden_size": 1})


def test_dequantize_says_the_dtype_that_it_was_given(output: Path, tmp_path: Path) -> None:
    code, said = command("dequantize", output, "--out", tmp_path / "out", "--dtype", "fp32", "--no-verify")
    assert (code, "dtype=torch.float32)" in said) == (0, True)
    assert read_json(tmp_path / "out" / "text_encoder_2" / "config.json")["dtype"] == "float32"


# Dry runs and single files


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    words = ("convert", tiny, "--out", tmp_path / "out", "--dry-run")
    code, said = command(*words)
    assert (code, "whole pipeline: 13.13 MB → 13.13 MB" in said) == (0, True)
    content = json.loads(command(*words, "--json", "--out-variant", "fp16")[1])
    assert {entry["file"] for entry in content["components"]["vae"]["entries"]} == {f"{STEM}.fp16.safetensors"}
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "the output folder is not empty" in command(*words)[1]


def test_single_files_are_printed_with_the_lines_that_load_each(tiny: Path, tmp_path: Path) -> None:
    words = ("convert", tiny, "--out", tmp_path / "out", "--format", "single-file", "--dtype", "fp16")
    code, said = command(*words, "--out-variant", "fp16", "--no-verify", "--json")
    assert code == 0
    lines = json.loads(said)["load_files"]
    assert {Path(file).parent.name for file in lines} == set(PARTS)
    assert all(Path(file).is_file() for file in lines)
    assert sum("from_single_file" in code for code in lines.values()) == 2
    for file, code in lines.items():
        loaded = executed(code)[Path(file).parent.name]
        assert loaded.dtype == torch.float16
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in load_file(file).items())
