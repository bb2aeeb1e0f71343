"""Pickled weights: refused unless allowed, then read without code and without a second way of the data."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bitroute import plan
from bitroute.convert.checkpoint import Component, open_pipeline
from bitroute.convert.job import run
from bitroute.convert.pickles import read_pickle
from bitroute.convert.reading import read_rows, read_tensor
from bitroute.errors import RecipeError, SourceError

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "a.bias": torch.arange(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
}
Records = dict[str, bytes]
NAMES = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "pytorch_model"}


def saved(folder: Path, content: object, **options: Any) -> Path:
    file = folder / "x.bin"
    torch.save(content, file, **options)
    return file


def repacked(file: Path, change: Callable[[Records], Records], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with other records, as a zip program writes it."""
    with zipfile.ZipFile(file) as archive:
        records = change({name: archive.read(name) for name in archive.namelist()})
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file


def pickle_components(source: Path, shards: int = 1) -> None:
    """Replaces the safetensors of two components by pickles of the same tensors."""
    for component, stem in NAMES.items():
        [file] = (source / component).glob("*.safetensors")
        tensors = load_file(file)
        file.unlink()
        names = [f"{stem}-{number}.bin" for number in range(shards)] if shards > 1 else [f"{stem}.bin"]
        weight_map = {tensor: names[place * shards // len(tensors)] for place, tensor in enumerate(tensors)}
        for name in names:
            torch.save({t: tensors[t] for t in tensors if weight_map[t] == name}, source / component / name)
        if shards > 1:
            (source / component / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(file: Path) -> str:
    with pytest.raises(SourceError) as refused:
        read_pickle(file)
    assert str(file) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_give_the_same_bytes_as_safetensors(source: Path, convert: Callable[[str], Path], shards: int) -> None:
    pickle_components(source, shards)
    run(plan("tiny-flux-fp8", str(source), allow_pickle=True), source.parent / "out")
    expected = json.loads((convert("tiny-flux-fp8") / "bitroute.json").read_text())["sha256"]
    found = json.loads((source.parent / "out" / "bitroute.json").read_text())["sha256"]
    names = [name for name in expected if name.endswith(".safetensors")]
    assert len(names) == 4
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_refused_unless_they_are_allowed(source: Path, shards: int) -> None:
    pickle_components(source, shards)
    with pytest.raises(RecipeError) as refused:
        plan("tiny-flux-fp8", str(source))
    for component, stem in NAMES.items():
        assert f"component {component!r} has no weights in safetensors" in str(refused.value)
        assert f"{stem}.bin" in str(refused.value) or f"{stem}-0.bin" in str(refused.value)
    assert "a pickle can run code" in str(refused.value) and "--allow-pickle" in str(refused.value)


def test_safetensors_win_over_pickles_that_are_allowed(source: Path) -> None:
    torch.save({}, source / "transformer" / "diffusion_pytorch_model.bin")
    component = open_pipeline(str(source), allow_pickle=True).components["transformer"]
    assert [file.name for file in component.headers] == ["diffusion_pytorch_model.safetensors"]


def test_an_index_of_pickles_names_pickles_in_its_folder(source: Path) -> None:
    folder = source / "transformer"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for name in ("../x.bin", "x.safetensors"):
        (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(SourceError, match="the index names a file"):
            _ = Component("transformer", "diffusers", "X", folder, allow_pickle=True).tensors


def test_every_tensor_is_read_where_it_stands(tmp_path: Path) -> None:
    found = read_pickle(saved(tmp_path, TENSORS)).tensors
    assert found.keys() == TENSORS.keys()
    assert all(read_tensor(found[name]).equal(tensor) for name, tensor in TENSORS.items())
    assert read_rows(found["a.weight"], 1, 3).equal(TENSORS["a.weight"][1:3])


def test_views_of_one_storage_are_read_twice(tmp_path: Path) -> None:
    whole = torch.arange(40.0).reshape(10, 4)
    views = {"whole": whole, "top": whole[:3], "row": whole[7], "again": whole.view(4, 10)}
    found = read_pickle(saved(tmp_path, views)).tensors
    assert all(read_tensor(found[name]).equal(view) for name, view in views.items())


def test_parameters_and_the_metadata_of_a_state_dict_do_no_harm(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    for state in (layer.state_dict(), dict(layer.named_parameters())):
        found = read_pickle(saved(tmp_path, state)).tensors
        assert all(read_tensor(found[name]).equal(tensor) for name, tensor in layer.state_dict().items())


def test_reading_takes_no_memory_for_the_data(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.zeros(2, dtype=torch.uint8)})
    read_pickle(file)  # imports what it needs
    file = saved(tmp_path, {"a": torch.zeros(100_000_000, dtype=torch.uint8)})
    tracemalloc.start()
    assert read_pickle(file).tensors["a"].spec.shape == (100_000_000,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {**TENSORS, "a": evil}, lambda evil: {evil: 1}])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path: Path, wrap: Callable[[object], object]) -> None:
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        words = refusal(saved(tmp_path, wrap(Evil(tmp_path / "canary")), **options))
        assert options or "got:      'GLOBAL posix.system'" in words
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "canary").exists()  # it would have run


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": TENSORS}, "dict under 'state_dict'"),
        ({**TENSORS, "epoch": 3}, "int under 'epoch'"),
        ({3: torch.zeros(2)}, "a key of type int"),
        ({"\x1b[31m": torch.zeros(2)}, r"a tensor of the name '\x1b[31m'"),
        ([torch.zeros(2)], "an object of type list"),
        (torch.zeros(2), "an object of type"),
        ({"t": torch.zeros(3, 2).t()}, "tensor 't': torch.float32, torch.strided, not contiguous"),
        ({"e": torch.zeros(1).expand(4)}, "tensor 'e': torch.float32, torch.strided, not contiguous"),
        ({"c": torch.zeros(2, dtype=torch.complex64)}, "tensor 'c': torch.complex64"),
        ({"s": torch.eye(3).to_sparse()}, "tensor 's': torch.float32, torch.sparse_coo"),
        ({"m": torch.zeros(2, device="meta")}, "tensor 'm', whose bytes are not where torch.save puts them"),
    ],
)
def test_what_is_no_tensor_by_name_is_refused(tmp_path: Path, content: object, words: str) -> None:
    assert words in refusal(saved(tmp_path, content))


def test_a_pickle_of_before_2020_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, TENSORS, _use_new_zipfile_serialization=False)
    assert "what torch.save writes since 1.6" in refusal(file)


def without(end: str) -> Callable[[Records], Records]:
    return lambda records: {name: content for name, content in records.items() if not name.endswith(end)}


def replaced(end: str, content: bytes) -> Callable[[Records], Records]:
    return lambda records: {name: content if name.endswith(end) else old for name, old in records.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda records: records, "whose bytes are not where torch.save puts them"),
        (without("data.pkl"), "locating file data.pkl"),
        (without("data/1"), "whose bytes are not where torch.save puts them"),
        (replaced("data/0", b"short"), "whose bytes are not where torch.save puts them"),
        (replaced("byteorder", b"big"), "numbers with the high byte first"),
        (replaced("data.pkl", b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b"."), "an object of type list"),
        (replaced("data.pkl", b"cbuiltins\nbytearray\n(\x8a\x08" + bytes(7) + b"\x40tR."), "MemoryError"),
        (replaced("data.pkl", bytes(17_000_000)), "17000000 bytes of names and shapes"),
    ],
)  # fmt: skip
def test_an_archive_that_lies_is_refused(tmp_path: Path, change: Callable[[Records], Records], words: str) -> None:
    file = repacked(saved(tmp_path, TENSORS), change)
    assert words in refusal(file)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    file = repacked(saved(tmp_path, TENSORS), lambda records: records, zipfile.ZIP_DEFLATED)
    assert "a compressed or encrypted record 'x/data.pkl'" in refusal(file)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}.", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04"]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(content)
    assert "no zip archive that can be read" in refusal(file)


def test_a_pipe_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    for name in ("pipe.bin", "", "none.bin"):
        refusal(tmp_path / name)


def test_any_flipped_bit_is_refused_or_leaves_the_names_and_shapes(tmp_path: Path) -> None:
    """Outside the data: like safetensors, an archive does not say which data it should hold."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    file = tmp_path / "x.bin"
    file.write_bytes(buffer.getvalue())
    sound = read_pickle(file)
    for place in range(0, len(buffer.getvalue()), 7):
        content = bytearray(buffer.getvalue())
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        try:
            found = read_pickle(file)
        except SourceError as refused:
            assert str(file) in str(refused)
        else:
            assert found == sound
