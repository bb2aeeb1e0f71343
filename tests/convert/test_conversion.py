"""`quantize convert`: the same weights in another dtype and in other files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bitroute import plan, verify
from bitroute.cli import main
from bitroute.convert.conversion import convert
from bitroute.convert.layout import read_header
from bitroute.convert.recipe import read_recipe
from bitroute.convert.shards import parse_size
from bitroute.errors import BitrouteError, RecipeError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FROM_SINGLE_FILE = """
import sys, torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
file, config = sys.argv[1:]
choices = {"config": config, "subfolder": "transformer", "torch_dtype": torch.bfloat16}
model = FluxTransformer2DModel.from_single_file(file, **choices)
stored = load_file(file)
same = all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
print(same and model.state_dict().keys() == stored.keys())
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def command(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["convert", *map(str, words)])
    return done.exit_code, done.stdout if done.exit_code == 0 else done.stderr


def test_another_shard_size_leaves_every_bit_as_it_is(tiny: Path, tmp_path: Path) -> None:
    out = convert(tiny, tmp_path / "out", shard_bytes=1_000_000)
    files = sorted((out / "transformer").glob("*.safetensors"))
    assert len(files) > 5
    before, after = weights(tiny / "transformer"), weights(out / "transformer")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    index = json.loads((out / "transformer" / f"{WEIGHTS}.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_the_shards_of_a_conversion_become_one_file_that_from_single_file_loads(tiny: Path, tmp_path: Path) -> None:
    shards = convert(tiny, tmp_path / "shards", shard_bytes=1_000_000)
    out = convert(shards, tmp_path / "out", format="single-file")
    assert read_header(out / "transformer" / WEIGHTS).tensors.keys() == weights(tiny / "transformer").keys()
    words = [sys.executable, "-c", FROM_SINGLE_FILE, str(out / "transformer" / WEIGHTS), str(out)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1] == "True"


def test_another_dtype_is_that_of_every_float_of_every_component(tiny: Path, tmp_path: Path) -> None:
    out = convert(tiny, tmp_path / "out", dtype="float16")
    for folder in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        before, after = weights(tiny / folder), weights(out / folder)
        assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float16}
        assert all(
            torch.equal(value.half(), after[name]) for name, value in before.items() if value.is_floating_point()
        )
    found = verify(out, load=False)
    assert found.compared
    assert found.problems == []


def test_a_conversion_is_a_job_that_resumes_only_as_it_began(tiny: Path, tmp_path: Path) -> None:
    out = convert(tiny, tmp_path / "out", shard_bytes=2_000_000)
    assert convert(tiny, out, shard_bytes=2_000_000, resume=True) == out
    with pytest.raises(BitrouteError, match="the recipe has changed since the job began"):
        convert(tiny, out, shard_bytes=3_000_000, resume=True)


def test_the_command_writes_verifies_and_says_where(tiny: Path, tmp_path: Path) -> None:
    code, said = command(
        tiny / "transformer" / WEIGHTS, "--config", tiny, "--out", tmp_path / "out", "--json", "--no-verify"
    )
    assert code == 0
    assert json.loads(said)["out"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "vae" / WEIGHTS).is_file()


def test_a_quantized_source_is_refused(output: Path, tmp_path: Path) -> None:
    code, said = command(output, "--out", tmp_path / "out")
    assert code == 2
    assert "already quantized" in said


def test_a_single_file_has_no_shard_size(tiny: Path, tmp_path: Path) -> None:
    code, said = command(tiny, "--out", tmp_path / "out", "--format", "single-file", "--shard-size", "2GB")
    assert code == 2
    assert "a single file is not split" in said


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("2000000", 2 * 10**6), ("1", None),
     ("-1GB", None), ("2XB", None), ("", None), ("9" * 400, None), ("2GB\n3", None)],
)  # fmt: skip
def test_sizes_have_units_and_a_least(text: str, size_bytes: int | None) -> None:
    assert parse_size(text) == size_bytes


def test_a_recipe_says_how_large_files_may_be_and_the_argument_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("extends: tiny-flux-fp8\nshard_size: 1MB\n")
    shards = plan(str(file)).components[0].shards
    assert len(shards) > 3
    assert all(sum(entry.size_bytes for entry in shard) <= 1_000_000 for shard in shards)
    assert len(plan(str(file), shard_bytes=10**9).components[0].shards) == 1


@pytest.mark.parametrize("value", ["0", "true", "[1GB]", "2 parsecs"])
def test_a_shard_size_that_is_none_is_refused_with_its_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"extends: tiny-flux-fp8\nshard_size: {value}\n")
    problems = read_recipe(str(file)).problems
    assert [problem.where for problem in problems] == [f"{file}:2"]
    with pytest.raises(RecipeError, match="at least 1MB"):
        plan(str(file))
