"""The journal: what a resumed job keeps, what it makes again, and every change that it refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

import bitroute.convert.plan as planning
from bitroute import plan, quantize, verify
from bitroute.cli import main
from bitroute.convert.download import HubSource
from bitroute.convert.hub import HubModel
from bitroute.convert.job import run
from bitroute.convert.journal import journal_of
from bitroute.errors import RecipeError, SourceError

FP8 = "tiny-flux-fp8"
JOURNAL, DRAFT = "bitroute.json.part", "bitroute.json.new"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of each component."""
    monkeypatch.setattr(planning, "SHARD_BYTES", 1_000_000)


def contents(folder: Path) -> dict[str, bytes]:
    """Folders too, with nothing in them."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


class Interrupt:
    """A progress that interrupts the job after so many source bytes, and remembers what was done."""

    def __init__(self, after_bytes: int) -> None:
        self.left, self.done = after_bytes, list[tuple[int, str]]()

    def __call__(self, done_bytes: int, what: str) -> None:
        self.done.append((done_bytes, what))
        self.left -= done_bytes
        if self.left < 0:
            raise KeyboardInterrupt


class InterruptWithShards(Interrupt):
    """One that waits for so many finished shards: files are finished beside the work."""

    def __init__(self, after_bytes: int, out: Path, shards: int) -> None:
        super().__init__(after_bytes)
        self.out, self.shards = out, shards

    def __call__(self, done_bytes: int, what: str) -> None:
        deadline = time.monotonic() + 60  # a busy disk may take seconds to write a file
        while self.left < done_bytes and len(list(self.out.rglob("*.safetensors"))) < self.shards:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        super().__call__(done_bytes, what)


def interrupt(recipe: str, out: Path, after_bytes: int, model: str | None = None, shards: int = 0) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, model, out, progress=InterruptWithShards(after_bytes, out, shards))


def test_what_is_finished_is_neither_encoded_nor_copied_again(tmp_path: Path, small_shards: None) -> None:
    planned, out = plan(FP8), tmp_path / "out"
    total = sum(component.source_bytes for component in planned.components)
    interrupt(FP8, out, total - 500_000, shards=6)
    shards = sorted(out.rglob("*.safetensors"))
    assert len(shards) > 5
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in shards}
    done = Interrupt(10**9)
    assert run(planned, out, resume=True, progress=done)
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in shards} == before
    stored = {name for file in shards for name in load_file(file)}
    entries = [(component, entry) for component in planned.components for entry in component.entries]
    written = [entry for component, entry in entries if stored.issuperset(component.container.names(entry).values())]
    assert done.done[0] == (sum(entry.source.spec.size_bytes for entry in written), "done before")
    assert sum(done_bytes for done_bytes, _ in done.done) == total
    assert {what for _, what in done.done}.isdisjoint(entry.layer for entry in written if entry.kind)


def test_a_copy_that_is_there_stays_and_a_shorter_one_is_made_again(tmp_path: Path, tiny: Path) -> None:
    """A job that had written everything but its record."""
    planned, out, other = plan(FP8), tmp_path / "out", tmp_path / "other"
    run(planned, out)
    interrupt(FP8, other, 1000)
    (other / JOURNAL).rename(out / JOURNAL)
    record = (out / "bitroute.json").read_bytes()
    (out / "bitroute.json").unlink()
    copies = [out / name for name in planned.copied]
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in copies}
    os.truncate(copies[0], 5)
    run(planned, out, resume=True)
    assert [file for file in copies if (file.stat().st_ino, file.stat().st_mtime_ns) != before[file]] == copies[:1]
    assert copies[0].read_bytes() == (tiny / copies[0].relative_to(out)).read_bytes()
    assert (out / "bitroute.json").read_bytes() == record


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def change_a_byte_of_the_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"F8_E4M3") + 3] ^= 1
    file.write_bytes(content)


def replace_by_a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


@pytest.mark.parametrize("damage", [cut, change_a_byte_of_the_header, replace_by_a_link])
def test_a_shard_that_is_not_what_was_planned_is_written_again(
    tmp_path: Path, small_shards: None, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    interrupt(FP8, out, 4_000_000, shards=1)
    damage(min((out / "transformer").glob("*.safetensors")))
    quantize(FP8, out=out, resume=True)
    assert verify(out, load=False).problems == []
    assert not any(file.is_symlink() or file.suffix == ".part" for file in out.rglob("*"))


def edit_journal(out: Path, *keys: str, value: Any) -> None:
    content = json.loads((out / JOURNAL).read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (out / JOURNAL).write_text(json.dumps(content))


def of_another_bitroute(out: Path, source: Path, recipe: Path) -> None:
    edit_journal(out, "bitroute", value="0.0.9")


def of_another_torchao(out: Path, source: Path, recipe: Path) -> None:
    edit_journal(out, "libraries", "torchao", value="0.17.1")


def on_another_device(out: Path, source: Path, recipe: Path) -> None:
    edit_journal(out, "resume", "device", value="cuda")


def planned_otherwise(out: Path, source: Path, recipe: Path) -> None:
    edit_journal(out, "plan", "components", "text_encoder", "container", value="bitroute")


def with_another_recipe(out: Path, source: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("int8", "float8"))


def with_a_longer_source_file(out: Path, source: Path, recipe: Path) -> None:
    with open(source / "vae" / "config.json", "a") as stream:
        stream.write(" ")


def with_a_younger_source_file(out: Path, source: Path, recipe: Path) -> None:
    os.utime(source / "text_encoder" / "model.safetensors", ns=(0, 1_700_000_000_000_000_001))


def with_a_missing_source_file(out: Path, source: Path, recipe: Path) -> None:
    (source / "LICENSE").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_bitroute, ["the version of bitroute has changed since the job began", "expected: 0.0.9"]),
        (of_another_torchao, ["the version of torchao has changed", "expected: 0.17.1"]),
        (on_another_device, ["the device has changed since the job began", "got:      cpu", "expected: cuda"]),
        (planned_otherwise, ["components.text_encoder.container: the plan has changed", "expected: bitroute"]),
        (with_another_recipe, ["recipe.yaml:2: the recipe has changed", "got:      text_encoder: {backend: float8",
                               "expected: text_encoder: {backend: int8"]),
        (with_a_longer_source_file, ["source/vae/config.json: the source file has changed", "bytes, written"]),
        (with_a_younger_source_file, ["model.safetensors: the source file has changed", "00000001\n"]),
        (with_a_missing_source_file, ["source/LICENSE: the source file has changed", "got:      no such file"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_a_job_that_would_write_other_bytes_is_refused_with_the_difference(
    source: Path, tmp_path: Path, change: Callable[[Path, Path, Path], None], said: list[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("components:\n  text_encoder: {backend: int8, keep: none}\n")
    (source / "LICENSE").write_text("a licence")
    interrupt(str(recipe), out, 200_000, str(source))
    change(out, source, recipe)
    before = contents(out)
    with pytest.raises(RecipeError) as refused:
        quantize(str(recipe), str(source), out, resume=True)
    words = str(refused.value)
    assert [part for part in said if part not in words] == []
    assert "undo that, or give --overwrite" in words
    assert contents(out) == before
    assert verify(quantize(str(recipe), str(source), out, overwrite=True), load=False).problems == []


def test_another_number_of_cores_is_no_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(FP8, out, 1_000_000)
    edit_journal(out, "plan", "job_peak_bytes", value=1)
    quantize(FP8, out=out, resume=True)
    assert json.loads((out / "bitroute.json").read_text())["plan"]["job_peak_bytes"] == 1


def test_a_model_of_the_hub_may_be_downloaded_again_but_must_be_the_same_commit(source: Path) -> None:
    local = plan(FP8, str(source))
    hub = HubSource(HubModel("owner/model", "0" * 40, {}), None, {})
    planned = replace(local, pipeline=replace(local.pipeline, hub=hub))
    began = journal_of(planned, "cpu")
    os.utime(source / "model_index.json", (0, 0))
    assert began.changes(journal_of(planned, "cpu")) == []
    outlined = replace(planned, pipeline=replace(planned.pipeline, is_outline=True))
    assert began.changes(journal_of(outlined, "cpu")) == []
    moved = replace(hub, model=replace(hub.model, commit="1" * 40))
    changes = began.changes(journal_of(replace(local, pipeline=replace(local.pipeline, hub=moved)), "cpu"))
    assert [(change.what, change.got) for change in changes] == [
        ("the source's revision has changed since the job began", "1" * 40)
    ]


def test_a_job_that_is_still_running_is_not_resumed(tmp_path: Path) -> None:
    planned, refusals = plan(FP8), list[str]()

    def resume_meanwhile(done_bytes: int, what: str) -> None:
        if not refusals:
            with pytest.raises(RecipeError) as refused:
                run(planned, tmp_path / "out", resume=True)
            refusals.append(str(refused.value))

    run(planned, tmp_path / "out", progress=resume_meanwhile)
    assert "another job is writing this folder" in refusals[0]


def test_resume_starts_where_there_is_nothing_yet_or_only_the_draft_of_a_journal(
    tmp_path: Path, convert: Callable[[str], Path]
) -> None:
    out, expected = tmp_path / "out", contents(convert(FP8))
    quantize(FP8, out=out, resume=True)
    assert contents(out) == expected
    (tmp_path / "drafted").mkdir()
    (tmp_path / "drafted" / DRAFT).write_text("{")
    quantize(FP8, out=tmp_path / "drafted", resume=True)
    assert contents(tmp_path / "drafted") == expected


def test_a_finished_output_is_left_alone_and_verified(output: Path) -> None:
    (output / JOURNAL).write_text((output / "bitroute.json").read_text())  # killed before its last change
    (output / DRAFT).write_text("{")
    assert verify(output, load=False).problems == []
    for shard in (output / "transformer", output / "text_encoder_2"):
        next(shard.glob("*.safetensors")).unlink()
    before = {name: content for name, content in contents(output).items() if name not in (JOURNAL, DRAFT)}
    done = CliRunner().invoke(main, ["-r", FP8, "-o", str(output), "--resume"])
    assert f"{output} is finished: there is nothing to convert" in done.stderr
    assert done.exit_code == 1
    assert "diffusion_pytorch_model.safetensors is missing" in done.stdout
    assert contents(output) == before


def test_a_finished_output_of_another_recipe_is_not_resumed(output: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)the recipe's name has changed.*got: +tiny-flux-nf4.*--overwrite"):
        quantize("tiny-flux-nf4", out=output, resume=True)


@pytest.mark.parametrize("journal", ["", "{", "[]", "{}", '{"files": ["x"], "resume": 3}', '{"resume": {"source": 3}}'])
def test_a_damaged_journal_is_refused_and_what_lies_beside_it_is_not_believed(
    tmp_path: Path, small_shards: None, convert: Callable[[str], Path], journal: str
) -> None:
    out = tmp_path / "out"
    interrupt(FP8, out, 4_000_000, shards=1)
    (out / JOURNAL).write_text(journal)
    shard = min((out / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(RecipeError, match=r"(?s)cannot be resumed.*no journal.*--overwrite"):
        quantize(FP8, out=out, resume=True)
    quantize(FP8, out=out, overwrite=True)
    assert verify(out, load=False).problems == []


def test_an_unfinished_output_names_resume_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(FP8, out, 1_000_000)
    with pytest.raises(RecipeError, match=r"(?s)an unfinished output of bitroute.*give --resume .* or --overwrite"):
        quantize(FP8, out=out)
    with pytest.raises(SourceError, match=r"(?s)an unfinished one: its job was interrupted.*--resume"):
        verify(out)
    with pytest.raises(RecipeError, match="resume and overwrite exclude each other"):
        quantize(FP8, out=out, resume=True, overwrite=True)
    done = CliRunner().invoke(main, ["-r", FP8, "-o", str(out), "--resume", "--overwrite"])
    assert done.exit_code == 2
    assert "give one of them" in done.stderr


def test_a_folder_with_other_files_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"(?s)not empty.*other files.*give another --out"):
        quantize(FP8, out=tmp_path, resume=True)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_what_is_there_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, out = plan(FP8), tmp_path / "out"
    interrupt(FP8, out, 5_000_000)
    there_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.suffix in (".safetensors", ".part"))
    needed = planned.size_bytes + planning.WORKSPACE_BYTES // 16
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - there_bytes // 2))
    with pytest.raises(RecipeError, match="the disk is too full"):
        quantize(FP8, out=tmp_path / "other")
    quantize(FP8, out=out, resume=True)
    assert verify(out, load=False).problems == []
