"""`--resume`: whatever ended a job, at whatever moment, the same command finishes it, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import bitroute.convert.files as files_module
import bitroute.convert.plan as planning
from bitroute import plan
from bitroute.convert.files import copy
from bitroute.convert.job import run
from bitroute.errors import JobError

RECIPES = [f"tiny-flux-{name}" for name in ("fp8", "int8", "mixed", "mxfp4", "nf4", "nvfp4")]
FP8 = "tiny-flux-fp8"
KILLS = 7  # for each recipe
SHARD_BYTES = 1_000_000
JOURNAL = "bitroute.json.part"
NO_VERIFY = "--no-verify"
Answer = dict[str, Any]


class Stage:
    """A warm process that runs commands in forks of itself and kills them at chosen moments; see stage.py."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, str(Path(__file__).with_name("stage.py")), str(folder / "said.txt"), *RECIPES]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def __call__(self, *words: str | Path, **moment: Any) -> Answer:
        assert self.process.stdin and self.process.stdout
        request = {"words": [str(word) for word in words], **moment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: Answer = json.loads(self.process.stdout.readline())
        return answer

    @cache  # noqa: B019 - one stage lives as long as its tests
    def whole(self, recipe: str) -> tuple[dict[str, bytes], Answer]:
        """What an uninterrupted job writes and answers."""
        out = self.folder / recipe
        answer = self("-r", recipe, "-o", out, NO_VERIFY)
        assert answer["code"] == 0, answer["said"]
        return contents(out), answer


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    yield stage
    stage.process.communicate()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHARD_BYTES", SHARD_BYTES)


def contents(folder: Path) -> dict[str, bytes]:
    """Folders too, with nothing in them."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def moments(recipe: str, changes: int, blocks: int, seconds: float) -> Iterator[list[Any]]:
    """One of the first and of the last changes, another for each recipe; then any, of each kind in turn."""
    numbers, number = random.Random(recipe), RECIPES.index(recipe)
    yield ["change", 1 + number]
    yield ["change", changes - number]
    while True:
        yield ["block", numbers.randint(1, blocks)]
        yield ["time", numbers.uniform(0, seconds)]
        yield ["change", numbers.randint(1, changes)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_job_killed_at_any_moment_and_killed_again_is_finished_to_the_same_bytes(recipe: str, stage: Stage) -> None:
    expected, first = stage.whole(recipe)
    out = stage.folder / "out"
    words = ["-r", recipe, "-o", out, NO_VERIFY, "--json"]
    counts = json.loads(first["said"].splitlines()[-1])
    chosen = moments(recipe, counts["change"], counts["block"], first["seconds"])
    for number in range(KILLS):
        moment = next(chosen)
        killed = stage(*words, moment=moment)["code"] == -signal.SIGKILL
        assert killed or moment[0] == "time"  # the clock may come too late
        if number % 2:
            stage(*words, "--resume", moment=next(chosen))
        done = stage(*words, "--resume")
        assert done["code"] == 0, done["said"]
        assert contents(out) == expected
        shutil.rmtree(out)


def test_an_output_that_is_being_replaced_leaves_nothing_of_itself_behind(stage: Stage, source: Path) -> None:
    """The old shards have the same names, headers and sizes, and other values."""
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    old, out = stage.folder / "old", stage.folder / "replaced"
    assert stage("-r", FP8, "-m", source, "-o", old, NO_VERIFY)["code"] == 0
    words = ["-r", FP8, "-o", out, NO_VERIFY, "--json"]
    begun = []
    for change in (1, 2, 3, 4, 5, 9, 20, 36, 38, 42, 45):
        shutil.copytree(old, out)
        assert stage(*words, "--overwrite", moment=["change", change])["code"] == -signal.SIGKILL
        begun.append((out / JOURNAL).exists())
        done = stage(*words, "--resume")
        if begun[-1]:
            assert done["code"] == 0, done["said"]
            assert contents(out) == stage.whole(FP8)[0]
        else:
            assert "the source's model has changed since the job began" in done["said"]
            (out / "bitroute.json.new").unlink(missing_ok=True)
            assert contents(out) == contents(old)
        shutil.rmtree(out)
    assert set(begun) == {False, True}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_code_and_the_command_that_goes_on(stage: Stage, number: int, code: int) -> None:
    out = stage.folder / f"o'ut {code}"
    words = ["-r", FP8, "-o", str(out), NO_VERIFY, "--overwrite"]
    for moment in (["change", 1], ["block", 3], ["change", 9], ["time", 0.1], ["block", 60]):
        done = stage(*words, moment=moment, signal=number)
        assert done["code"] == code, done["said"]
        assert "Traceback" not in done["said"]
        if (out / JOURNAL).exists():
            words = [*words[:5], "--resume"]
        assert f"to go on: {shlex.join(['quantize', *words])}\n" in done["said"]
    assert stage(*words)["code"] == 0
    assert contents(out) == stage.whole(FP8)[0]


class FullDisk(FileIO):
    """Takes what there is room for, and says so only to the next write, as a disk does."""

    room_bytes = 0

    def write(self, data: Any) -> int:
        part = memoryview(data)[: FullDisk.room_bytes]
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room_bytes -= len(part)
        return super().write(part)


@contextmanager
def disk_with_room_for(size_bytes: int) -> Iterator[None]:
    FullDisk.room_bytes = size_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "FileIO", FullDisk)
        yield


def size_of(folder: Path) -> int:
    """Of the files that have their names."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix != ".part")


def test_a_disk_that_is_full_at_any_byte_is_named_and_the_job_goes_on_where_there_is_room(
    tmp_path: Path, small_shards: None
) -> None:
    planned, out, whole = plan(FP8), tmp_path / "out", tmp_path / "whole"
    run(planned, whole)
    numbers = random.Random(0)
    for _ in range(6):
        with (
            disk_with_room_for(numbers.randrange((size_of(whole) - size_of(out)) // 2)),
            pytest.raises(JobError) as failed,
        ):
            run(planned, out, resume=True)
        words = str(failed.value)
        assert words.startswith(f"{out}/")
        assert "there is no room for a file\n    got:      No space left on device" in words
        assert "make room (or allow larger files), then run the same command with --resume" in words
    run(planned, out, resume=True)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("missing_bytes", [1, 1000])
def test_a_copy_whose_last_bytes_find_no_room_has_no_name(tmp_path: Path, missing_bytes: int) -> None:
    (tmp_path / "source").write_bytes(b"x" * 3_000_000)
    with disk_with_room_for(3_000_000 - missing_bytes), pytest.raises(OSError, match="No space left") as failed:
        copy(tmp_path / "source", tmp_path / "target")
    assert failed.value.filename == str(tmp_path / "target.part")
    assert not (tmp_path / "target").exists()


def test_ctrl_c_in_the_middle_of_a_large_layer_ends_at_once_and_the_printed_command_finishes(
    source: Path, write_hollow: Callable[..., None]
) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=0, num_single_layers=1, num_attention_heads=8, joint_attention_dim=200_000,
            pooled_projection_dim=64,
        )  # fmt: skip
    shutil.rmtree(source / "transformer")
    write_hollow(model, source / "transformer")
    recipe = "components:\n  transformer: {backend: nvfp4, options: {scale: mse}, keep: none}\n"
    (source.parent / "large layer.yaml").write_text(recipe)
    words = ["quantize", "-r", "large layer.yaml", "-m", "source", "-o", "o ut", "--no-verify"]
    program = str(Path(sys.executable).with_name("quantize"))
    process = subprocess.Popen(
        [program, *words[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=source.parent
    )
    assert process.stderr
    while "quantizing" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    said = process.stderr.read()
    assert process.wait() == 130, said
    assert time.monotonic() - start < 2
    assert "Traceback" not in said
    again = said.split("to go on: ")[1].splitlines()[0]
    assert again == shlex.join([*words, "--resume"])
    out = source.parent / "o ut"
    assert not list(out.rglob("*.json"))
    environment = {**os.environ, "PATH": f"{Path(program).parent}:{os.environ['PATH']}"}
    done = subprocess.run(again, shell=True, capture_output=True, text=True, cwd=source.parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert (out / "bitroute.json").is_file()
    assert not list(out.rglob("*.part"))
