"""GGUF files: what the blocks of every type decode to, headers that lie, and one file to one file."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bitroute import dequantize
from bitroute.cli import main
from bitroute.convert.ggml import FORMATS, BlockFormat, decode_blocks
from bitroute.convert.gguf import read_gguf
from bitroute.convert.reading import read_tensor
from bitroute.errors import BitrouteError, RecipeError, SourceError

DIGESTS = {  # of the float32 values that gguf 0.19.0 (gguf.quants.dequantize) makes of `pattern`, SHA-256
    "Q4_0": "262d5df3c7a94f54", "Q4_1": "a9782abb93453055", "Q5_0": "7da1583de3820168", "Q5_1": "820ba52fdecb6adb",
    "Q8_0": "eea5eb225db6b10f", "Q2_K": "c01b1927b9fcef51", "Q3_K": "fecd155b1cfd0450", "Q4_K": "46d6f4f4bb4af1d0",
    "Q5_K": "81cc87b533767172", "Q6_K": "170100c082b88381", "IQ4_NL": "21f2109863d340f8", "IQ4_XS": "d45d354fc9e32e42",
}  # fmt: skip
SCALES = {  # bytes where fp16 scales stand; the first gets 1.0 and the second 0.5, so that float32 is exact
    "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2),
}  # fmt: skip
Q8_0, F32, F16, BF16 = 8, 0, 1, 30


def pattern(found: BlockFormat) -> torch.Tensor:
    """64 blocks of bytes in which every field varies."""
    numbers = torch.arange(64 * found.size_bytes) * 37 % 251
    blocks = numbers.to(torch.uint8).reshape(64, found.size_bytes)
    for place, half in zip(SCALES.get(found.name, (0,)), (0x3C00, 0x3800), strict=False):
        blocks[:, place], blocks[:, place + 1] = half & 255, half >> 8
    return blocks


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def build(
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]], facts: bytes = b"", count: int = 0, version: int = 3
) -> bytes:
    """tensors: name → shape (outermost first), type, payload. facts: key-value pairs, `count` of them."""
    entries, payload = b"", b""
    for name, (shape, kind, data) in tensors.items():
        payload += b"\0" * (-len(payload) % 32)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries += text(name) + dimensions + struct.pack("<IQ", kind, len(payload))
        payload += data
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + facts + entries
    return header + b"\0" * (-len(header) % 32) + payload


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def q8_0(weight: torch.Tensor) -> bytes:
    """Whole numbers from -127 to 127, with the scale 1 in every block."""
    codes = weight.reshape(-1, 32).to(torch.int8).view(torch.uint8)
    return (
        torch.cat([torch.tensor([[0, 0x3C]], dtype=torch.uint8).expand(len(codes), 2), codes], dim=1).numpy().tobytes()
    )


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-127, 128, (4, 64), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture
def whole(weight: torch.Tensor) -> bytes:
    words = struct.pack("<IQ", 8, 3) + text("one") + text("two") + text("x" * 70_000)
    numbers = struct.pack("<IQ", 5, 20) + bytes(80)
    facts = pair("general.name", 8, text("a name")) + pair("words", 9, words) + pair("numbers", 9, numbers)
    tensors = {
        "in.weight": ((4, 64), Q8_0, q8_0(weight)), "in.bias": ((3,), F32, struct.pack("<3f", 1, 2, 3)),
        "norm": ((2,), BF16, struct.pack("<2H", 0x3F80, 0x4000)),
    }  # fmt: skip
    return build(tensors, facts, 3)


@pytest.mark.parametrize("name", DIGESTS)
def test_the_blocks_of_every_type_decode_as_the_reference_decodes_them(name: str) -> None:
    found = next(found for found in FORMATS.values() if found.name == name)
    decoded = decode_blocks(pattern(found), found)
    assert decoded.shape == (64, found.weights)
    assert hashlib.sha256(decoded.numpy().astype("<f4").tobytes()).hexdigest()[:16] == DIGESTS[name]


def test_every_known_type_has_a_digest() -> None:
    assert {found.name for found in FORMATS.values()} == set(DIGESTS)


def test_blocks_are_decoded_alike_in_one_part_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FORMATS[Q8_0]
    expected = decode_blocks(pattern(found), found)
    monkeypatch.setattr("bitroute.convert.ggml.CHUNK", 96)
    assert torch.equal(decode_blocks(pattern(found), found), expected)


def test_a_file_gives_names_shapes_and_values(tmp_path: Path, whole: bytes, weight: torch.Tensor) -> None:
    (tmp_path / "model.gguf").write_bytes(whole)
    found = read_gguf(tmp_path / "model.gguf")
    assert {name: (tensor.spec.shape, tensor.spec.dtype) for name, tensor in found.items()} == {
        "in.weight": ((4, 64), torch.bfloat16), "in.bias": ((3,), torch.float32), "norm": ((2,), torch.bfloat16),
    }  # fmt: skip
    assert torch.equal(read_tensor(found["in.weight"]), weight.to(torch.bfloat16))
    assert read_tensor(found["in.bias"]).tolist() == [1, 2, 3]
    assert read_tensor(found["norm"]).tolist() == [1, 2]


def test_a_flattened_weight_gets_its_shape_back(tmp_path: Path, weight: torch.Tensor) -> None:
    original = pair("comfy.gguf.orig_shape.w", 9, struct.pack("<IQ4i", 5, 4, 4, 4, 4, 4))
    (tmp_path / "model.gguf").write_bytes(build({"w": ((4, 64), Q8_0, q8_0(weight))}, original, 1))
    assert torch.equal(read_tensor(read_gguf(tmp_path / "model.gguf", torch.float32)["w"]), weight.reshape(4, 4, 4, 4))


def test_one_file_becomes_one_file_of_the_same_names(tmp_path: Path, whole: bytes, weight: torch.Tensor) -> None:
    (tmp_path / "model.gguf").write_bytes(whole)
    out = tmp_path / "made" / "model.safetensors"
    words = ["dequantize", str(tmp_path / "model.gguf"), "--out", str(out), "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"out": str(out), "size_bytes": 4 * 64 * 2 + 3 * 4 + 2 * 2}
    found = load_file(out)
    assert found.keys() == {"in.weight", "in.bias", "norm"}
    assert torch.equal(found["in.weight"], weight.to(torch.bfloat16))
    assert found["in.bias"].dtype == torch.float32
    single = load_file(dequantize(tmp_path / "model.gguf", tmp_path / "single.safetensors", dtype="float32"))
    assert {tensor.dtype for tensor in single.values()} == {torch.float32}
    assert torch.equal(single["in.weight"], weight)


def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, whole: bytes) -> None:
    source, out = tmp_path / "model.gguf", tmp_path / "out.safetensors"
    source.write_bytes(whole)
    out.write_bytes(b"mine")
    (tmp_path / "folder.safetensors").mkdir()
    for place, words in (
        (out, "exists already"), (tmp_path / "folder.safetensors", "is a folder"), (source, "is the source"),
        (tmp_path / "out.bin", "NAME.safetensors"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            dequantize(source, place)
    assert out.read_bytes() == b"mine"
    dequantize(source, out, overwrite=True)
    assert "in.weight" in load_file(out)
    refused = CliRunner().invoke(main, ["dequantize", str(source), "--resume"])
    assert refused.exit_code == 2
    assert "begun anew by the same command" in refused.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda whole: b"GGML" + whole[4:], "another beginning"),
        (lambda whole: whole[:4] + b"\1" + whole[5:], "GGUF version 2 or 3"),
        (lambda whole: whole[:8] + b"\xff" * 8 + whole[16:], "at most 100000"),
        (lambda whole: whole[:16] + b"\xff" * 8 + whole[24:], "at most 100000"),
        (lambda whole: whole[:16] + b"\xff" + whole[17:], "not a sound GGUF file"),
        (lambda whole: whole[:-3], "truncated"),
        (lambda whole: whole[:40], "goes on for"),
        (lambda whole: b"", "goes on for"),
    ],
)
def test_a_damaged_file_is_refused(change: Callable[[bytes], bytes], words: str, tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(change(whole))
    with pytest.raises(SourceError, match=words):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("tensors", "facts", "words"),
    [
        ({"w": ((1, 32), 16, bytes(66))}, b"", "of type 16"),
        ({"w": ((1, 33), Q8_0, bytes(34))}, b"", "in blocks of 32"),
        ({"w\n": ((1,), F32, bytes(4))}, b"", "tensor 'w"),
        ({"w": ((1, 2, 3, 4, 5), F32, bytes(480))}, b"", "5 dimensions"),
        ({"__metadata__": ((1, 32), Q8_0, bytes(34))}, b"", "tensor '__metadata__'"),
        ({"w": ((2**40, 2**20), F32, b"")}, b"", "truncated"),
        ({"w": ((0, 2**62, 2**62), F32, b"")}, b"", "with shape"),
        ({"w": ((1, 32), Q8_0, bytes(34))}, pair("general.alignment", 4, struct.pack("<I", 0)), "alignment of 0"),
        (
            {"w": ((1, 32), Q8_0, bytes(34))},
            pair("comfy.gguf.orig_shape.w", 9, struct.pack("<IQi", 5, 1, 31)),
            "with the original shape",
        ),
        ({}, pair("odd", 99, b""), "a value of type 99"),
    ],
)
def test_a_header_that_lies_is_refused(tensors: Mapping[str, Any], facts: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(build(tensors, facts, bool(facts)) + bytes(64 if facts else 0))
    with pytest.raises(SourceError, match=words):
        read_gguf(tmp_path / "model.gguf")


def test_places_that_overlap_or_are_not_aligned_are_refused(tmp_path: Path, whole: bytes) -> None:
    """Of the second tensor, whose payload is due at byte 288."""
    entry = struct.pack("<IQ", F32, 288)
    assert whole.count(entry) == 1
    for place in (0, 256, 289):
        (tmp_path / "model.gguf").write_bytes(whole.replace(entry, struct.pack("<IQ", F32, place)) + bytes(8))
        with pytest.raises(SourceError, match="of the payloads"):
            read_gguf(tmp_path / "model.gguf")


def test_any_changed_byte_ends_in_an_error_or_in_tensors(tmp_path: Path, whole: bytes) -> None:
    draw, file = random.Random(0), tmp_path / "model.gguf"
    length = len(whole) - 4 * 68 - 64
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.choice((draw.randrange(200), draw.randrange(length - 200, length)))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            for tensor in read_gguf(file).values():
                assert tensor.spec.size_bytes < 100_000
                read_tensor(tensor)
        except BitrouteError as error:
            assert error.problems


def test_a_file_without_blocks_has_nothing_to_decode(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(build({"w": ((2,), F16, bytes(4))}))
    with pytest.raises(SourceError, match="nothing is quantized in this file"):
        dequantize(tmp_path / "model.gguf", tmp_path / "out.safetensors")
