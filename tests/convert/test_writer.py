"""The writer: complete files that safetensors reads, or no file at all."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from full_disk import files_limited_to
from safetensors import safe_open
from torch import Tensor

from bitroute.backends.base import TensorSpec
from bitroute.convert.layout import DTYPES, read_header
from bitroute.convert.writer import ShardWriter
from bitroute.errors import JobError

SPECS = {"a": TensorSpec((4, 3), torch.float32), "b": TensorSpec((5,), torch.uint8)}


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Random bytes; NaN patterns are avoided because they are not equal to themselves."""
    numbers = torch.randint(0, 2 if dtype == torch.bool else 64, shape)
    return numbers.to(dtype) if dtype.itemsize > 1 or dtype == torch.bool else numbers.to(torch.uint8).view(dtype)


def test_safetensors_reads_every_dtype_and_shape_that_was_written_in_parts(tmp_path: Path) -> None:
    shapes = [(), (1,), (0,), (7,), (3, 0), (16, 8), (5, 3, 2)]
    tensors = {f"{code}.{shape}": tensor_of(dtype, shape) for code, dtype in DTYPES.items() for shape in shapes}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    names = random.Random(0).sample(list(tensors), len(tensors))
    with ShardWriter(tmp_path / "x.safetensors", specs, {"format": "pt"}) as writer:
        for name in names:
            tensor = tensors[name]
            for part in torch.split(tensor, 2) if tensor.dim() and len(tensor) else [tensor]:
                writer.append(name, part)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            stored = opened.get_tensor(name)
            assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
            assert stored.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    assert read_header(tmp_path / "x.safetensors").metadata == {"format": "pt"}


def test_parts_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).T
    with ShardWriter(tmp_path / "x.safetensors", {"a": SPECS["a"]}, {}) as writer:
        writer.append("a", tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.get_tensor("a").equal(tensor)


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", SPECS, {})
    writer.append("a", torch.zeros(4, 3))
    writer.append("b", torch.zeros(5, dtype=torch.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors.part"]
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_error_on_the_way_leaves_no_finished_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "x.safetensors", SPECS, {}) as writer:
        writer.append("a", torch.zeros(4, 3))
        writer.append("b", torch.zeros(5, dtype=torch.uint8))
        raise KeyboardInterrupt
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "parts",
    [
        [torch.zeros(4, 3), torch.zeros(1, 3)],
        [torch.zeros(5, 3)],
        [torch.zeros(4, 3, dtype=torch.float64)],
        [torch.zeros(4, 3, dtype=torch.int32)],
    ],
    ids=["a part too many", "too large", "too wide a dtype", "another dtype of the same size"],
)
def test_a_part_that_was_not_planned_is_a_job_error(tmp_path: Path, parts: list[Tensor]) -> None:
    with (
        pytest.raises(JobError, match="tensor 'a' does not come as planned"),
        ShardWriter(tmp_path / "x.safetensors", SPECS, {}) as writer,
    ):
        for part in parts:
            writer.append("a", part)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_missing_part_is_a_job_error_that_names_the_tensor(tmp_path: Path) -> None:
    with (
        pytest.raises(JobError, match="never written: a"),
        ShardWriter(tmp_path / "x.safetensors", SPECS, {}) as writer,
    ):
        writer.append("a", torch.zeros(3, 3))
        writer.append("b", torch.zeros(5, dtype=torch.uint8))
    assert not (tmp_path / "x.safetensors").exists()


def test_a_finished_file_outlives_a_failed_second_attempt(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"the first")
    with pytest.raises(JobError), ShardWriter(tmp_path / "x.safetensors", SPECS, {}):
        pass
    assert (tmp_path / "x.safetensors").read_bytes() == b"the first"


def test_no_room_for_the_whole_file_shows_before_its_first_byte(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((1000,), torch.uint8), "b": TensorSpec((100_000,), torch.uint8)}
    with (
        files_limited_to(50_000),
        pytest.raises(OSError, match=r"File too large: '.*/x\.safetensors\.part'"),
    ):
        ShardWriter(tmp_path / "x.safetensors", specs, {}).append("a", torch.zeros(1000, dtype=torch.uint8))
    assert (tmp_path / "x.safetensors.part").stat().st_size == 0


def test_the_hash_that_keeps_up_with_the_writing_is_that_of_the_file(tmp_path: Path) -> None:
    specs = {f"t{number}": TensorSpec((64 * (number % 3), 16), torch.float32) for number in range(40)}
    parts = [name for name, spec in specs.items() for _ in range(spec.shape[0] // 8)]
    random.Random(0).shuffle(parts)
    writer, ended = ShardWriter(tmp_path / "x.safetensors", specs, {"format": "pt"}), Event()

    def keep_up() -> None:
        while not ended.wait(0.001):
            writer.keep_up()

    beside = [Thread(target=keep_up) for _ in range(3)]
    for thread in beside:
        thread.start()
    complete = [writer.append(name, torch.rand(8, 16)) for name in parts]
    ended.set()
    for thread in beside:
        thread.join()
    said = writer.sha256()
    writer.close()
    assert complete == [False] * (len(parts) - 1) + [True]
    assert said == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
