"""What goes along untouched: all of it, or a reason why not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bitroute import plan, quantize
from bitroute.convert.checkpoint import open_pipeline
from bitroute.convert.copies import copies
from bitroute.errors import RecipeError

VAE = "vae/diffusion_pytorch_model.safetensors"


def refusal(source: Path) -> str:
    with pytest.raises(RecipeError) as refused:
        plan("tiny-flux-fp8", str(source))
    return str(refused.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "tokenizer"])
def test_the_folders_inside_a_part_go_along_whole(source: Path, part: str) -> None:
    names = [f"{part}/extra/config.json", f"{part}/extra/deep/model.bin", f"{part}/{part}/words.txt"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out = quantize("tiny-flux-fp8", str(source), source.parent / "out")
    assert [(out / name).read_text() for name in names] == names


def test_what_tools_hide_in_a_part_stays_behind(source: Path) -> None:
    before = plan("tiny-flux-fp8", str(source)).copied
    for name in ("vae/.gitattributes", "transformer/.cache/huggingface/lock", "tokenizer/.DS_Store"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    assert plan("tiny-flux-fp8", str(source)).copied == before


@pytest.mark.parametrize("name", ["transformer/extra", "vae/a/extra", "tokenizer/extra"])
@pytest.mark.parametrize("target", ["scheduler", "."])
def test_a_link_to_a_folder_is_refused_by_name(source: Path, name: str, target: str) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(source / target)
    assert f"{source / name}: a link to a folder is not copied\n    got:      a link to {source}" in refusal(source)


def test_a_part_may_be_a_link_to_the_folder_that_pipelines_share(source: Path) -> None:
    shared = Path(shutil.move(source / "vae", source.parent / "shared"))
    (source / "vae").symlink_to(shared)
    assert VAE in plan("tiny-flux-fp8", str(source)).copied


def test_a_folder_that_cannot_be_read_is_named(
    source: Path, locked: Callable[[Path], AbstractContextManager[None]]
) -> None:
    for part in ("transformer", "vae"):
        (source / part / "extra").mkdir()
        pipeline = open_pipeline(str(source))
        with locked(source / part / "extra"):
            problems = copies(pipeline, ["transformer"])[1]
        assert [problem.where for problem in problems] == [str(source / part / "extra")]


@pytest.mark.parametrize(("kept", "got"), [(0, "a file of 0 bytes"), (5, "a file of 5 bytes"), (-1, "truncated")])
def test_weights_that_are_copied_are_refused_where_they_are_not_whole(source: Path, kept: int, got: str) -> None:
    file = source / VAE
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    words = refusal(source)
    assert f"{file}: not a sound safetensors file" in words
    assert got in words


def test_an_empty_pickle_is_refused(source: Path) -> None:
    (source / VAE).unlink()
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "diffusion_pytorch_model.bin: a weight file is empty" in refusal(source)


def test_damaged_weights_of_a_part_to_convert_are_reported_once(source: Path) -> None:
    os.truncate(source / "transformer" / "diffusion_pytorch_model.safetensors", 1000)
    assert refusal(source).count("not a sound safetensors file") == 1
