"""The compiled code gives the eager code's bits, and where it cannot be had nothing is missing but speed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from bitroute.backends import _compiled, available, create
from bitroute.backends._compiled import (
    LEAST_NUMBERS,
    PROOF,
    SWITCH,
    Fields,
    _digest,
    described,
    proof_of,
    rounding_of,
    use_compiled,
)
from bitroute.backends._elements import E2M1, E2M3, E3M2, E4M3, E5M2, Element, squared_error
from bitroute.backends._table import Blocks, Table, table
from bitroute.backends.base import Backend, TensorSpec
from bitroute.convert.workers import run_all

SEARCHING = ("nvfp4", "mxfp4", "mxfp6", "nf4", "fp4")
BACKENDS = [
    *(create(name) for name in available()), *(create(name, scale="mse") for name in SEARCHING),
    create("nvfp4", scale="four-over-six"), create("mxfp8", element="e5m2"), create("nf4", block=32),
]  # fmt: skip
HAS_COMPILER = sys.platform == "linux" and shutil.which("cc") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="this machine has no C compiler")
every_element = pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3, E5M2], ids=lambda element: element.name)
Compiler = Callable[[str], None]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet; the folder in which it will be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    _compiled._library.cache_clear()
    use_compiled()
    yield tmp_path / "cache" / "bitroute" / "compiled"
    use_compiled(False)
    _compiled._library.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Puts a script in the place of all compilers."""

    def write(script: str) -> None:
        file = tmp_path / "bin" / "cc"
        file.parent.mkdir()
        file.write_text(script)
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(file.parent))

    return write


def hard_values() -> Tensor:
    """Every sign and exponent with the first seven bits of a mantissa and what lies beside them; numbers at random."""
    heads = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    drawn = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(3))
    bits = torch.cat([heads, heads + 1, heads - 1, heads + (1 << 15), drawn.to(torch.int32)])
    return bits.view(torch.float32)


def eagerly(work: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH, "0")
        return work()


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.int32 if tensor.itemsize == 4 else torch.uint8)


@needs_compiler
@every_element
def test_what_is_stored_is_the_same_bit_for_bit(element: Element, monkeypatch: pytest.MonkeyPatch) -> None:
    values = hard_values()
    values = values if element.bits == 8 else values[~values.isnan()]  # only E4M3 and E5M2 have a NaN
    values = values[: len(values) // 4 * 4]
    eager = eagerly(lambda: element.store(values), monkeypatch)
    assert torch.equal(bits_of(element.store(values)), bits_of(eager))
    assert rounding_of(values)


@needs_compiler
@pytest.mark.parametrize("more", [0, 1, 7, 15, 16, 33])
def test_no_length_is_special(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = hard_values()[-LEAST_NUMBERS - more :].clone()
    eager = eagerly(lambda: E4M3.store(values), monkeypatch)
    assert torch.equal(bits_of(E4M3.store(values)), bits_of(eager))


@needs_compiler
@pytest.mark.parametrize("name", ["nf4", "fp4", "one with equal numbers"])
def test_places_in_a_table_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = Table(torch.linspace(-1, 1, 8).repeat_interleave(2), torch.arange(16, dtype=torch.uint8))
    found = table("nf4" if name == "nf4" else "fp4", torch.device("cpu")) if "4" in name else twice
    drawn = torch.rand(LEAST_NUMBERS, generator=torch.Generator().manual_seed(5)) * 2 - 1
    beside = torch.cat(
        [found.bounds, found.bounds.nextafter(torch.tensor(2.0)), found.bounds.nextafter(-torch.ones(1))]
    )
    values = torch.cat([beside, -torch.zeros(1), torch.zeros(1), torch.tensor([torch.inf, -torch.inf]), drawn])
    eager = eagerly(lambda: found.nearest(values), monkeypatch)
    assert torch.equal(found.nearest(values), eager)
    assert rounding_of(values)


@needs_compiler
@every_element
@pytest.mark.parametrize("size", [8, 16, 32, 100])
def test_squared_errors_of_blocks_are_the_same(element: Element, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.randn(64, 1400 // size, size, generator=torch.Generator().manual_seed(size))
    reciprocals = element.max / blocks.abs().amax(-1) * torch.linspace(0.5, 1.5, blocks.shape[1])
    weights = torch.rand(blocks.shape[1], size, generator=torch.Generator().manual_seed(1))
    for weighted in (None, weights):
        error = squared_error(blocks, element, weighted)
        eager = eagerly(lambda error=error: error(reciprocals), monkeypatch)
        assert torch.equal(error(reciprocals), eager)
    assert rounding_of(blocks, reciprocals)


@needs_compiler
@every_element
def test_squared_errors_of_hard_values_are_the_same(element: Element, monkeypatch: pytest.MonkeyPatch) -> None:
    values = hard_values()
    blocks = values[values.isfinite()][: 1 << 20].view(256, -1, 16)
    error, ones = squared_error(blocks, element, None), torch.ones(blocks.shape[:-1])
    eager = eagerly(lambda: error(ones), monkeypatch).nan_to_num()
    assert torch.equal(error(ones).nan_to_num(), eager)


@needs_compiler
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [16, 64, 100, 128, 256])
def test_squared_errors_of_a_table_are_the_same(
    name: Literal["nf4", "fp4"], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 1536 // size, size, generator=torch.Generator().manual_seed(size))
    blocks = Blocks(weight, table(name, torch.device("cpu")), None)
    for factor in (0.0, -0.5, 0.76, 1.0, 1.6, 1e30):
        scales = blocks.amax * factor
        eager = eagerly(lambda scales=scales: blocks.rough_error(scales), monkeypatch)
        assert torch.equal(blocks.rough_error(scales), eager)
    assert rounding_of(blocks.shares, blocks.amax)


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_backend_stores_the_same_with_and_without(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (torch.randn(256, 384, generator=torch.Generator().manual_seed(11)) * 0.02).to(dtype)
    assert backend.refuse(TensorSpec((256, 384), dtype)) is None
    compiled = backend.quantize(weight)
    monkeypatch.setenv(SWITCH, "0")
    eager = backend.quantize(weight)
    for suffix, tensor in eager.items():
        assert torch.equal(bits_of(compiled[suffix]), bits_of(tensor)), suffix


@needs_compiler
@pytest.mark.parametrize(
    "values",
    [
        torch.ones(LEAST_NUMBERS - 1),
        torch.ones(LEAST_NUMBERS, dtype=torch.float64),
        torch.ones(2, LEAST_NUMBERS).t(),
        torch.ones(LEAST_NUMBERS, device="meta"),
    ],
    ids=["few", "of another dtype", "strided", "without memory"],
)
def test_what_it_cannot_take_is_left_to_the_eager_code(values: Tensor) -> None:
    assert rounding_of(values) is None
    assert rounding_of(torch.ones(LEAST_NUMBERS))


class Eager:
    """What the compiled functions stand for."""

    def codes(self, values: Tensor, element: Fields) -> Tensor:
        (named,) = [one for one in (E2M1, E4M3) if one.fields == element]
        return named._rounded_codes(values) if named is E2M1 else named.store(values).view(torch.uint8)

    def places(self, values: Tensor, bounds: Tensor) -> Tensor:
        return torch.bucketize(values, bounds).to(torch.uint8)

    def squares(self, values: Tensor, reciprocals: Tensor, out: Tensor, element: Fields) -> Tensor:
        scaled = values * reciprocals.unsqueeze(-1)
        return (scaled - E2M1.nearest(scaled)).square()

    def table_squares(
        self, values: Tensor, reciprocals: Tensor, shares: Tensor, rough: Tensor, bins: int, out: Tensor
    ) -> Tensor:
        places = (values * reciprocals.unsqueeze(-1) * bins).clamp(-bins, bins) + (bins + 0.5)
        return (rough[places.int()] * shares.unsqueeze(-1) - values).square()


def test_what_is_compiled_is_held_against_the_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert proof_of(Eager()) == PROOF


@needs_compiler
def test_a_folder_that_others_write_to_is_not_used(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert rounding_of(torch.ones(LEAST_NUMBERS)) is None
    assert "not yours alone" in described()


@needs_compiler
def test_a_bad_file_beside_a_good_one_changes_nothing(fresh: Path) -> None:
    assert rounding_of(torch.ones(LEAST_NUMBERS))
    (good,) = fresh.iterdir()
    key = good.stem.split("-")[1]
    for content in (b"", b"nonsense"):
        (fresh / f"rounding-{key}-{_digest(content)}.so").write_bytes(content)
    (fresh / f"rounding-{key}-folder.so").mkdir()
    os.mkfifo(fresh / f"rounding-{key}-fifo.so")
    _compiled._library.cache_clear()
    assert rounding_of(torch.ones(LEAST_NUMBERS))
    assert f"compiled, {good}" == described()


@needs_compiler
def test_only_threads_that_ask_for_it_use_it() -> None:
    values = torch.ones(LEAST_NUMBERS)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(rounding_of, values).result() is None
        other.submit(use_compiled).result()
        assert other.submit(rounding_of, values).result() is rounding_of(values)


@needs_compiler
def test_the_workers_of_a_job_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    run_all([lambda: found.append(rounding_of(torch.ones(LEAST_NUMBERS)))])
    assert found == [rounding_of(torch.ones(LEAST_NUMBERS))] != [None]


@needs_compiler
def test_a_table_has_a_place_for_all_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38]).repeat(LEAST_NUMBERS // 4)
    found = table("nf4", torch.device("cpu"))
    assert found.nearest(values)[:4].tolist() == eagerly(lambda: found.nearest(values), monkeypatch)[:4].tolist()
    blocks = Blocks(values.view(1024, 1, 64), found, None)
    assert blocks.rough_error(blocks.amax).isnan().all()


@needs_compiler
def test_it_is_compiled_once_for_all_processes(fresh: Path, compiler: Compiler) -> None:
    values = torch.ones(LEAST_NUMBERS)
    assert rounding_of(values)
    (kept,) = fresh.iterdir()
    made = kept.stat().st_mtime_ns
    _compiled._library.cache_clear()  # as in a process that starts later
    compiler("#!/bin/sh\nexit 1\n")
    assert rounding_of(values)
    assert [(file, file.stat().st_mtime_ns) for file in fresh.iterdir()] == [(kept, made)]


@needs_compiler
@pytest.mark.parametrize("length", [0, 2000, 8192, -1])
def test_a_damaged_file_is_compiled_again(
    length: int, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.ones(LEAST_NUMBERS)
    assert rounding_of(values)
    (sound,) = fresh.iterdir()
    content = sound.read_bytes()
    damaged = tmp_path / "elsewhere" / "bitroute" / "compiled" / sound.name  # what is open is not opened again
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content[:length])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    _compiled._library.cache_clear()
    assert rounding_of(values)
    assert content in {file.read_bytes() for file in damaged.parent.iterdir()}


@needs_compiler
@pytest.mark.parametrize(
    "flags",
    ["-ffast-math", "-fvisibility=hidden", "-fassociative-math -fno-signed-zeros -fno-trapping-math"],
)
def test_a_compiler_that_adds_its_own_flags_is_not_used(flags: str, compiler: Compiler) -> None:
    found = shutil.which("gcc") or shutil.which("cc")
    compiler(f'#!/bin/sh\nPATH=/usr/bin:/bin exec {found} "$@" {flags}\n')
    assert rounding_of(torch.ones(LEAST_NUMBERS)) is None


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\nexit 1\n",
        "#!/bin/sh\nexit 0\n",
        "#!/bin/sh\nprintf nonsense > $9\n",
        "#!/nowhere\n",
        "#!/bin/sh\nexec /bin/sleep 60\n",
    ],
    ids=["fails", "writes nothing", "writes nonsense", "does not start", "does not end"],
)
def test_a_broken_compiler_costs_speed_alone(
    script: str, compiler: Compiler, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compiled, "LONGEST_SECONDS", 0.3)
    compiler(script)
    values = torch.full((LEAST_NUMBERS,), 300.0)
    assert rounding_of(values) is None
    assert described().startswith("not compiled, so slower: ")
    assert E4M3.store(values).float().unique().tolist() == [288.0]
    assert not [file for file in fresh.iterdir() if file.is_dir()]


@pytest.mark.parametrize("machine", ["no compiler", "no home", "a home that is a file", "another processor"])
def test_a_machine_that_cannot_compile_goes_without(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif machine == "no home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        monkeypatch.delenv("XDG_CACHE_HOME")
    elif machine == "a home that is a file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert rounding_of(torch.ones(LEAST_NUMBERS)) is None
