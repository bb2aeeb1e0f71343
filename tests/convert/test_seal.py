"""One flipped bit in any file of a finished checkpoint is found, and the file is named."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitroute.convert.files import sha256, write_json
from bitroute.convert.seal import SEAL, check_seal, sealed
from bitroute.errors import SourceError

CONTENT = {"name": "größer", "files": ["a", "b"], "sha256": {"a": "0" * 64}, "nothing": None, "number": 1.5e-7}


def written(folder: Path) -> Path:
    file = folder / "x.json"
    write_json(file, sealed(CONTENT))
    return file


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """One bit of the file is another, until the end."""
    _flip(file, bit)
    yield
    _flip(file, bit)


def _flip(file: Path, bit: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        [byte] = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def is_found(file: Path) -> bool:
    """Whether reading the file, as the record of a checkpoint is read, says that it was changed."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return True
    try:
        check_seal(file, content)
    except SourceError as error:
        return f"the file {file.name} was changed after the job" in str(error)
    return False


def test_a_sealed_file_holds_its_content_and_is_sound(tmp_path: Path) -> None:
    file = written(tmp_path)
    content = json.loads(file.read_text())
    check_seal(file, content)
    assert {key: value for key, value in content.items() if key != SEAL} == CONTENT


def test_every_single_bit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    file = written(tmp_path)
    for bit in range(8 * file.stat().st_size):
        with flipped(file, bit):
            assert is_found(file), bit


@pytest.mark.parametrize("seal", [None, 3, "", "0" * 64, "A" * 64, ["0" * 64]])
def test_a_file_without_its_seal_is_refused(tmp_path: Path, seal: object) -> None:
    file = tmp_path / "x.json"
    write_json(file, {**CONTENT, SEAL: seal})
    with pytest.raises(SourceError, match=r"the file x\.json was changed after the job"):
        check_seal(file, json.loads(file.read_text()))


def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_found(output: Path) -> None:
    """A bit of each file, and 200 anywhere, by the hash that its job wrote down."""
    record = output / "bitroute.json"
    content = json.loads(record.read_text())
    content.pop(SEAL, None)
    write_json(record, sealed(content))
    files = sorted(path for path in output.rglob("*") if path.is_file())
    assert {path.relative_to(output).as_posix() for path in files} == {*content["sha256"], "bitroute.json"}
    generator = random.Random(0)
    sizes = [file.stat().st_size for file in files]
    for file in [*files, *generator.choices(files, sizes, k=200)]:
        name = file.relative_to(output).as_posix()
        with flipped(file, generator.randrange(8 * file.stat().st_size)):
            assert is_found(file) if file == record else sha256(file) != content["sha256"][name]
    assert all(sha256(output / name) == digest for name, digest in content["sha256"].items())
