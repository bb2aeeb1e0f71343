"""Headers: what is written is sound by safetensors' own reader, and what is broken is refused by name."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitroute.backends.base import CODES, TensorSpec
from bitroute.convert.layout import DTYPES, build_header, read_header
from bitroute.errors import SourceError

SPECS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        TensorSpec,
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
        st.sampled_from(list(CODES)),
    ),
    max_size=8,
)
SOUND = {
    "layer.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
    "layer.bias": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
}


def written(folder: Path, header: bytes, payload: int = 80) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(payload))
    return file


def changed(name: str, **changes: Any) -> bytes:
    """The sound header with one entry changed; a change to ... removes the key."""
    entry = {key: value for key, value in {**SOUND[name], **changes}.items() if value is not ...}
    return json.dumps({**SOUND, name: entry}).encode()


@given(SPECS)
@settings(max_examples=60, deadline=None)
def test_a_built_header_is_sound_and_its_payloads_are_aligned(specs: dict[str, TensorSpec]) -> None:
    header, offsets = build_header(specs, {"format": "pt"})
    content = header + bytes(sum(spec.size_bytes for spec in specs.values()))
    deserialized = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    for name, tensor in deserialized:
        assert (CODES[specs[name].dtype], list(specs[name].shape)) == (tensor["dtype"], tensor["shape"])
        for boundary in (64, 16):
            if specs[name].size_bytes % boundary == 0:
                assert offsets[name] % boundary == 0
    assert len(deserialized) == len(specs)


def test_a_header_reads_back_with_offsets_and_metadata(tmp_path: Path) -> None:
    specs = {
        "b": TensorSpec((3,), torch.uint8),
        "a": TensorSpec((8, 8), torch.float32),
        "c": TensorSpec((), torch.int64),
    }
    header, offsets = build_header(specs, {"format": "pt", "note": "größer"})
    file = tmp_path / "x.safetensors"
    file.write_bytes(header + bytes(256 + 8 + 3))
    found = read_header(file)
    assert {name: tensor.spec for name, tensor in found.tensors.items()} == specs
    assert {name: tensor.offset for name, tensor in found.tensors.items()} == offsets
    assert found.metadata == {"format": "pt", "note": "größer"}


@pytest.mark.parametrize(
    "broken",
    [
        changed("layer.bias", data_offsets=[60, 76]),  # overlaps
        changed("layer.bias", data_offsets=[66, 82]),  # leaves a gap
        changed("layer.bias", shape=[5]),  # lies about its size
        changed("layer.bias", shape=[-4]),
        changed("layer.bias", shape=[True, 4]),
        changed("layer.bias", shape=[0, 2**62, 2**62], data_offsets=[64, 64]),  # torch multiplies the others
        changed("layer.bias", shape=[4.0]),
        changed("layer.bias", shape=["4"]),
        changed("layer.bias", shape=4),
        changed("layer.bias", shape=None),
        changed("layer.bias", shape=...),
        changed("layer.bias", data_offsets=[64]),
        changed("layer.bias", data_offsets=[80, 64]),
        changed("layer.bias", data_offsets=[64.0, 80.0]),
        changed("layer.bias", data_offsets=["64", "80"]),
        changed("layer.bias", dtype="F7"),
        changed("layer.bias", dtype=["F32"]),
        changed("layer.bias", dtype=None),
        changed("layer.bias", shape=""),
        json.dumps(SOUND).encode()[:-1] + b', "layer.bias": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
        changed("layer.bias").replace(b'"dtype"', b'"dtype": "F64", "dtype"'),
        json.dumps({**SOUND, "layer.bias": []}).encode(),
        json.dumps({**SOUND, "layer.bias": None}).encode(),
        changed("layer.bias").replace(b"[4]", b"[%s]" % (b"9" * 5000)),  # more digits than Python converts
    ],
    ids=lambda broken: str(broken[-60:]),
)  # fmt: skip
def test_a_broken_entry_is_refused_with_its_file_and_its_tensor(tmp_path: Path, broken: bytes) -> None:
    file = written(tmp_path, broken)
    with pytest.raises(SourceError) as refused:
        read_header(file)
    assert str(file) in str(refused.value)
    assert "layer.bias" in str(refused.value) or "not plain JSON" in str(refused.value)


def test_a_name_that_stands_twice_is_found_among_many_in_no_time(tmp_path: Path) -> None:
    many = "".join(f'"{number}":0,' for number in range(200_000))
    file = written(tmp_path, f'{{{many}"199999":0}}'.encode())
    started = time.perf_counter()
    with pytest.raises(SourceError, match="'199999' stands twice"):
        read_header(file)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 0) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 20) + b'{"__metadata__": [1]}'[:20],
        struct.pack("<Q", 21) + b'{"__metadata__": [1]}',
        struct.pack("<Q", 20) + b'{"__metadata__": []}',
        struct.pack("<Q", 26) + b'{"__metadata__": {"a": 1}}',
        struct.pack("<Q", 34) + b'{"__metadata__": {"a": "\\ud800"}}  ',
        struct.pack("<Q", 8) + "{}  ".encode("utf-16-le"),
        struct.pack("<Q", 100_000) + b"[" * 100_000,  # nests deeper than any parser follows
        b"PK\x03\x04" + b"\x00" * 100,  # a pickle's zip archive
    ],
    ids=lambda content: str(content[:24]),
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        read_header(file)


def test_no_problem_repeats_a_long_value(tmp_path: Path) -> None:
    names = json.dumps({"n" * 10_000: SOUND["layer.bias"]}).encode()
    for broken in (names, changed("layer.bias", dtype="x" * 10_000), changed("layer.bias", shape=[1] * 10_000)):
        with pytest.raises(SourceError) as refused:
            read_header(written(tmp_path, broken))
        assert max(len(line) for line in str(refused.value).splitlines()) < 300


def test_a_header_larger_than_any_model_needs_is_refused_unread(tmp_path: Path) -> None:
    file = written(tmp_path, b"[" + b"[]," * 6_000_000 + b"[]]", payload=0)
    tracemalloc.start()
    with pytest.raises(SourceError, match="a header of 18000004 bytes"):
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("payload", [0, 79, 81, 4096])
def test_a_truncated_or_overwritten_file_is_refused(tmp_path: Path, payload: int) -> None:
    file = written(tmp_path, json.dumps(SOUND).encode(), payload)
    with pytest.raises(SourceError, match=f"{file.stat().st_size} bytes where"):
        read_header(file)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(SourceError) as refused:
            read_header(place)
        assert str(place) in str(refused.value)


def test_claims_of_a_terabyte_allocate_nothing(tmp_path: Path) -> None:
    huge = changed("layer.bias", shape=[2**40], data_offsets=[64, 64 + 2**42])
    for content in (struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", len(huge)) + huge):
        file = tmp_path / "model.safetensors"
        file.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(SourceError):
            read_header(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_header_is_a_source_error_or_leaves_it_sound(tmp_path: Path, data: st.DataObject) -> None:
    header = bytearray(json.dumps({"__metadata__": {"format": "pt"}, **SOUND}).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        damage = data.draw(st.sampled_from(DAMAGES))
        damage(
            header,
            data.draw(st.integers(0, max(len(header) - 1, 0))),
            data.draw(st.binary(min_size=1, max_size=4)),
        )
    file = written(tmp_path, bytes(header), data.draw(st.sampled_from([80, 80, 80, 64, 0])))
    try:
        found = read_header(file)
    except SourceError:
        return
    end = max((tensor.offset + tensor.spec.size_bytes for tensor in found.tensors.values()), default=0)
    assert end in (0, file.stat().st_size)
    assert all(tensor.spec.dtype in DTYPES.values() for tensor in found.tensors.values())


def _overwrite(header: bytearray, at: int, content: bytes) -> None:
    header[at : at + len(content)] = content


def _insert(header: bytearray, at: int, content: bytes) -> None:
    header[at:at] = content


def _remove(header: bytearray, at: int, content: bytes) -> None:
    del header[at : at + len(content)]


DAMAGES: list[Callable[[bytearray, int, bytes], None]] = [_overwrite, _insert, _remove]


def test_a_tensor_that_lies_beyond_four_gigabytes_is_read(tmp_path: Path) -> None:
    length = 4 * 10**9
    entry = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [length, length + 8]}
    entries = {"hole": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}, "last": entry}
    header = json.dumps(entries).encode()
    with open(tmp_path / "large.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + length + 8)
    assert read_header(tmp_path / "large.safetensors").tensors["last"].offset == 8 + len(header) + length
