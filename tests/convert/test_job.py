"""The job: what it refuses, what it copies, and what is left when something goes wrong half-way."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from full_disk import files_limited_to
from safetensors.torch import load_file, save_file

from bitroute import plan, quantize, verify
from bitroute.cli import main
from bitroute.convert.job import run
from bitroute.errors import BitrouteError, JobError, RecipeError, SourceError

NAME = "diffusion_pytorch_model.safetensors"
FP8 = "extends: tiny-flux-fp8\n"
CLIP = "model: builtin:tiny-flux\ncomponents:\n  text_encoder: {backend: int8, keep: none}\n"


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def loadable(folder: Path) -> list[str]:
    """The files by which a loader would take a folder for a model."""
    names = [*folder.rglob("config.json"), *folder.rglob("model_index.json"), *folder.rglob("bitroute.json")]
    return sorted(str(name.relative_to(folder)) for name in names)


def poison(source: Path, layer: str, value: float, component: str = "transformer") -> None:
    file = next((source / component).glob("*.safetensors"))
    tensors = load_file(file)
    tensors[f"{layer}.weight"].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(kind: type[BitrouteError], recipe: str, model: Path | str, out: Path, overwrite: bool = False) -> str:
    with pytest.raises(kind) as refused:
        quantize(recipe, str(model), out, overwrite=overwrite)
    return str(refused.value)


def test_everything_that_is_not_quantized_is_copied_byte_for_byte(tiny: Path, convert: Callable[[str], Path]) -> None:
    out = convert("tiny-flux-fp8")
    copied = plan("tiny-flux-fp8").copied
    folders = {name.partition("/")[0] for name in copied if "/" in name}
    assert folders == {"scheduler", "text_encoder", "tokenizer", "tokenizer_2", "vae"}
    for name in [*copied, "model_index.json"]:
        assert filecmp.cmp(tiny / name, out / name, shallow=False)


def test_a_source_with_licences_and_pickles_beside_the_weights(source: Path) -> None:
    (source / "LICENSE.md").write_text("a licence")
    (source / "notice.txt").write_text("a notice")
    (source / "flux1-dev.safetensors").write_bytes(b"the single-file twin")
    (source / "transformer" / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "transformer" / "README.md").write_text("words")
    out = quantize("tiny-flux-fp8", str(source), source.parent / "out")
    assert (out / "LICENSE.md").read_text() == "a licence"
    assert (out / "notice.txt").exists()
    assert (out / "transformer" / "README.md").exists()
    assert not (out / "flux1-dev.safetensors").exists()
    assert not (out / "transformer" / "pytorch_model.bin").exists()


def test_exactly_the_listed_files_are_written(convert: Callable[[str], Path]) -> None:
    out = convert("tiny-flux-mixed")
    assert sorted(files(out)) == sorted(json.loads((out / "bitroute.json").read_text())["files"])


@pytest.mark.parametrize("recipe", ["tiny-flux-fp8", "tiny-flux-mixed", "tiny-flux-nf4"])
def test_two_runs_write_the_same_bytes(recipe: str, tmp_path: Path, convert: Callable[[str], Path]) -> None:
    assert files(quantize(recipe, out=tmp_path / "again")) == files(convert(recipe))


def test_the_recipe_and_the_versions_travel_with_every_component(convert: Callable[[str], Path]) -> None:
    out = convert("extends: flux-fp8\nmodel: builtin:tiny-flux\n")
    carried = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]["bitroute"]
    whole = json.loads((out / "bitroute.json").read_text())
    for origin in (carried, whole):
        assert origin["source"]["model"] == "builtin:tiny-flux"
        assert "extends: flux-fp8" in origin["recipe"]["text"]
        assert "# model: black-forest-labs/FLUX.1-dev" in origin["recipe"]["text"]
        assert origin["libraries"]["torchao"] == version("torchao")
    assert "transformer_blocks.{0-1}.attn.to_q" in carried["layers"]["float8"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    words = refusal(RecipeError, "tiny-flux-fp8", "builtin:tiny-flux", tmp_path / "out", overwrite=overwrite)
    assert "not empty" in words
    assert "give another --out" in words
    assert files(tmp_path / "out") == {"mine.txt": b"mine"}


def test_an_earlier_output_is_replaced_only_when_asked(output: Path) -> None:
    words = refusal(RecipeError, "tiny-flux-fp8", "builtin:tiny-flux", output)
    assert "an earlier output of bitroute" in words
    assert "--overwrite" in words


def test_overwriting_removes_the_earlier_output_and_keeps_a_strangers_files(
    output: Path, write_recipe: Callable[[str], str]
) -> None:
    (output / "notes.txt").write_text("mine")
    (output / "transformer" / "lora.safetensors").write_bytes(b"mine too")
    (output / "vae" / f"{NAME}.part").write_bytes(b"half")
    quantize(write_recipe(CLIP), out=output, overwrite=True)
    found = files(output)
    assert found["notes.txt"] == b"mine"
    assert found["transformer/lora.safetensors"] == b"mine too"
    assert f"vae/{NAME}.part" not in found
    listed = json.loads(found["bitroute.json"])["files"]
    assert sorted(found) == sorted([*listed, "notes.txt", "transformer/lora.safetensors"])
    assert "quantization_config" not in json.loads(found["transformer/config.json"])


def test_overwriting_never_removes_what_lies_outside_the_folder(output: Path) -> None:
    outside = output.parent / "precious.txt"
    outside.write_text("precious")
    (output / "link.txt").symlink_to(outside)
    content = json.loads((output / "bitroute.json").read_text())
    content["files"] += ["../precious.txt", str(outside), "link.txt", ".", "", 3, None]
    (output / "bitroute.json").write_text(json.dumps(content))
    quantize("tiny-flux-fp8", out=output, overwrite=True)
    assert outside.read_text() == "precious"


def test_an_output_inside_the_source_or_that_is_a_file_is_refused(source: Path) -> None:
    for out in (source, source / "transformer", source / "a" / "b", source / ".." / source.name):
        assert "lies in the source" in refusal(RecipeError, "tiny-flux-fp8", source, out)
    assert "is a file" in refusal(RecipeError, "tiny-flux-fp8", "builtin:tiny-flux", source / "model_index.json")
    assert not (source / "a").exists()


@pytest.mark.parametrize("out", ["/bitroute-output", "/dev/null/output"])
def test_a_place_that_takes_no_folder_is_refused(out: str) -> None:
    planned = plan("tiny-flux-fp8")
    user = os.geteuid()
    try:
        if user == 0:  # root may write anywhere, nobody may not
            os.seteuid(65534)
        with pytest.raises(RecipeError, match="the output folder cannot be written"):
            run(planned, Path(out))
    finally:
        os.seteuid(user)
    assert not Path(out).exists()


def test_an_unknown_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for device in ("cuda:99", "warp", ""):
        with pytest.raises(RecipeError, match="no device"):
            quantize("tiny-flux-fp8", out=tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_the_current_folder_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert verify(quantize("tiny-flux-fp8", out="."), load=False).problems == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_two_jobs_do_not_write_one_folder_at_once(tmp_path: Path) -> None:
    planned = plan("tiny-flux-fp8")
    refusals: list[str] = []

    def start_another(done_bytes: int, what: str) -> None:
        if not refusals:
            refusals.append(
                refusal(RecipeError, "tiny-flux-fp8", "builtin:tiny-flux", tmp_path / "out", overwrite=True)
            )

    run(planned, tmp_path / "out", progress=start_another)
    assert "another job is writing this folder" in refusals[0]
    assert verify(tmp_path / "out", load=False).problems == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_stops_the_job_with_its_name(source: Path, value: float) -> None:
    layer = "single_transformer_blocks.3.proj_out"
    poison(source, layer, value)
    out = source.parent / "out"
    words = refusal(JobError, "tiny-flux-fp8", source, out)
    assert f"the weight of layer {layer!r} is not finite" in words
    assert loadable(out) == []
    assert not (out / "transformer" / NAME).exists()


def test_a_kept_weight_that_is_not_finite_is_copied_and_named_by_verify(
    source: Path, write_recipe: Callable[[str], str]
) -> None:
    poison(source, "x_embedder", float("nan"))
    recipe = write_recipe("components:\n  transformer: {backend: float8}\n")
    out = quantize(recipe, str(source), source.parent / "out")
    problems = verify(out).problems
    assert [problem.what for problem in problems] == ["a forward after loading fails"]


def test_a_source_that_shrinks_after_planning_is_a_source_error(source: Path) -> None:
    planned = plan("tiny-flux-fp8", str(source))
    file = source / "transformer" / NAME
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(SourceError, match="ends inside tensor"):
        run(planned, source.parent / "out")
    file.unlink()
    with pytest.raises(SourceError, match="cannot read tensor"):
        run(planned, source.parent / "out", overwrite=True)
    assert loadable(source.parent / "out") == []


def test_a_copied_file_that_vanishes_after_planning_is_named(source: Path) -> None:
    planned = plan("tiny-flux-fp8", str(source))
    (source / "vae" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"source/vae/config\.json: cannot read a file that is to be copied"):
        run(planned, source.parent / "out")
    assert not (source.parent / "out" / "bitroute.json").exists()
    assert not (source.parent / "out" / "model_index.json").exists()


def test_progress_adds_up_to_the_source(tmp_path: Path) -> None:
    planned = plan("tiny-flux-mixed")
    seen: list[tuple[int, str]] = []
    run(planned, tmp_path / "out", progress=lambda done, what: seen.append((done, what)))
    assert sum(done for done, _ in seen) == sum(component.source_bytes for component in planned.components)
    assert "transformer_blocks.0.attn.to_q" in {what for _, what in seen}


@pytest.mark.parametrize(("recipe", "size_bytes"), [(FP8, 100), (FP8, 60_000), (FP8, 3_456_789), (CLIP, 2_000_000)])
def test_a_write_that_fails_half_way_is_a_job_error_and_can_be_resumed(
    tmp_path: Path, write_recipe: Callable[[str], str], recipe: str, size_bytes: int
) -> None:
    """In the first file, in the journal's last bytes or the weights, and in a copy of what is not quantized."""
    out, file = tmp_path / "out", write_recipe(recipe)
    with files_limited_to(size_bytes):
        words = refusal(JobError, file, "builtin:tiny-flux", out)
    assert words.startswith(f"{out}")
    assert "there is no room for a file\n    got:      File too large" in words
    assert "make room (or allow larger files), then run the same command with --resume" in words
    assert "model_index.json" not in loadable(out)
    assert "bitroute.json" not in loadable(out)
    assert not (out / "transformer" / NAME).exists()
    assert files(quantize(file, out=out, resume=True)) == files(quantize(file, out=tmp_path / "whole"))


def test_a_failed_job_exits_with_1_and_without_a_traceback(tmp_path: Path) -> None:
    words = ["--recipe", "tiny-flux-fp8", "--out", str(tmp_path / "out"), "--no-verify"]
    with files_limited_to(100_000):
        done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "there is no room for a file" in done.stderr
    assert "Traceback" not in done.stderr
