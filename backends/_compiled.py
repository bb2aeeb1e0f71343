"""Rounding by one pass of C over a block, where this machine has a compiler; the eager code gives the same bits.

torch casts to E4M3 number by number, and other rounding takes it ten passes. Inductor compiles such a cast in 13 s
instead of 0.1, holds on to Python while it runs, and makes slower code of the rest (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, local
from typing import Protocol

import torch
from torch import Tensor

SWITCH, OFF = "BITROUTE_COMPILE", ("0", "no", "off", "false")  # eager code alone
LEAST_NUMBERS = 1 << 16  # fewer are not worth a compiler's start
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-xc", "-")  # products are rounded
MACHINES = frozenset({"x86_64", "aarch64"})
LONGEST_SECONDS = 10
BOUNDS, LARGEST_BLOCK = 15, 128  # of a table
Fields = tuple[int, int, float]  # of an element: exponent bits, mantissa bits, largest number
_P, _N, _F, _ELEMENT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float, (ctypes.c_int, ctypes.c_int, ctypes.c_float)
FUNCTIONS = {
    "codes": (_P, _P, _N, *_ELEMENT),
    "places": (_P, _P, _N, _P),
    "squares": (_P, _P, _P, _N, _N, *_ELEMENT),
    "table_squares": (_P, _P, _P, _P, _F, _P, _N, _N),
}
CANNOT = (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError)  # no home, no room, nonsense
PROOF = "96a18488f8c8b1b2"  # `proof_of` the eager code
_turn, _thread = Lock(), local()


class Functions(Protocol):
    def codes(self, values: Tensor, element: Fields) -> Tensor: ...
    def places(self, values: Tensor, bounds: Tensor) -> Tensor: ...
    def squares(self, values: Tensor, reciprocals: Tensor, out: Tensor, element: Fields) -> Tensor: ...
    def table_squares(
        self, values: Tensor, reciprocals: Tensor, shares: Tensor, rough: Tensor, bins: int, out: Tensor
    ) -> Tensor: ...


class Rounding:
    """The functions of rounding.c; every tensor float32, contiguous and on the CPU."""

    def __init__(self, file: Path) -> None:
        """Raises OSError: no library, or of another machine. AttributeError: of something else."""
        self.file, self._functions = file, ctypes.CDLL(str(file))
        for name, types in FUNCTIONS.items():
            function = getattr(self._functions, name)
            function.argtypes, function.restype = types, None

    def codes(self, values: Tensor, element: Fields) -> Tensor:
        """The codes of the nearest numbers of an element, uint8 in the shape of the values."""
        found = torch.empty(values.shape, dtype=torch.uint8)
        self._functions.codes(values.data_ptr(), found.data_ptr(), values.numel(), *element)
        return found

    def places(self, values: Tensor, bounds: Tensor) -> Tensor:
        """`Table.nearest` with its BOUNDS bounds, uint8 in the shape of the values."""
        found = torch.empty(values.shape, dtype=torch.uint8)
        self._functions.places(values.data_ptr(), found.data_ptr(), values.numel(), bounds.data_ptr())
        return found

    def squares(self, values: Tensor, reciprocals: Tensor, out: Tensor, element: Fields) -> Tensor:
        """The squared errors of `Element.nearest` of blocks [..., size] times their reciprocals, in `out`."""
        pointers = (tensor.data_ptr() for tensor in (values, reciprocals, out))
        self._functions.squares(*pointers, reciprocals.numel(), values.shape[-1], *element)
        return out

    def table_squares(
        self, values: Tensor, reciprocals: Tensor, shares: Tensor, rough: Tensor, bins: int, out: Tensor
    ) -> Tensor:
        """`Table.roughly_nearest`: the squared errors of blocks [..., size <= LARGEST_BLOCK] in `out`."""
        pointers = (tensor.data_ptr() for tensor in (values, reciprocals, shares, rough))
        self._functions.table_squares(*pointers, bins, out.data_ptr(), reciprocals.numel(), values.shape[-1])
        return out


def use_compiled(yes: bool = True) -> None:
    """In this thread: one with one of torch's threads, and whose tensors nobody traces or differentiates."""
    _thread.compiled = yes


def rounding_of(*values: Tensor) -> Rounding | None:
    """For plain numbers in the memory of this machine, and many of them in the first tensor."""
    if not getattr(_thread, "compiled", False) or _switched_off():
        return None
    if values[0].numel() < LEAST_NUMBERS or not all(map(_is_plain, values)):
        return None
    with _turn:
        found = _library()
    return found if isinstance(found, Rounding) else None


def proof_of(rounding: Functions) -> str:
    """A hash of what comes out for numbers of every size, ties and subnormals among them."""
    bits = (torch.arange(1 << 16) * 0x10001 + (1 << 15)).to(torch.int32)  # all signs, exponents and seven more bits
    values = torch.cat([bits, bits & -(1 << 16)]).view(torch.float32)
    values = values[values.isfinite()][: 1 << 16].view(-1, 16)
    ones, rough = torch.ones(len(values)), torch.linspace(-1, 1, 65)
    found = [rounding.codes(values, element) for element in ((4, 3, 448.0), (2, 1, 6.0))]
    found.append(rounding.places(values, torch.linspace(-1, 1, BOUNDS)))
    for units in (ones, ones / 3):
        found.append(rounding.squares(values, units, torch.empty_like(values), (2, 1, 6.0)))
        found.append(rounding.table_squares(values, units, ones / 7, rough, 32, torch.empty_like(values)))
    return _digest(b"".join(tensor.numpy().tobytes() for tensor in found))


def described() -> str:
    """Whether there is compiled code, in words."""
    if _switched_off():
        return f"not compiled, as {SWITCH}={os.environ[SWITCH]} asks"
    with _turn:
        found = _library()
    return f"compiled, {found.file}" if isinstance(found, Rounding) else f"not compiled, so slower: {found}"


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in OFF


def _is_plain(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous()


@functools.cache
def _library() -> Rounding | str:
    """Compiled once for this source, processor and user; or why that cannot be."""
    try:
        source = Path(__file__).with_name("rounding.c").read_bytes()
        processor, folder = _processor(), _own_folder()
        key = _digest(repr((source, processor, FLAGS)).encode())
        if found := _kept(folder, key):
            return found
        _compile(source, folder, key)
        return _kept(folder, key) or "what the compiler made gives other numbers, or does not load"
    except CANNOT as error:
        return str(error)


def _processor() -> str:
    """What it can do, in the words of Linux: what is compiled for one may crash another, which shares the home."""
    cpus = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:.*$", cpus.read_text() if cpus.is_file() else "", re.MULTILINE)
    if not flags or platform.machine() not in MACHINES:
        raise OSError(f"only on Linux on {' and '.join(sorted(MACHINES))}")
    return f"{platform.machine()} {flags[0]}"


def _own_folder() -> Path:
    """Into which nobody else writes: what lies there is run."""
    said = Path(os.environ.get("XDG_CACHE_HOME") or "")
    folder = (said if said.is_absolute() else Path.home() / ".cache") / "bitroute" / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not yours alone to write")
    return folder


def _kept(folder: Path, key: str) -> Rounding | None:
    """What was compiled before and is whole, as its name ends with its hash, and right."""
    for file in folder.glob(f"rounding-{key}-*.so"):
        try:
            if file.is_file() and file.stem.endswith(_digest(file.read_bytes())):
                found = Rounding(file)
                if proof_of(found) == PROOF:
                    return found
        except CANNOT:
            continue
    return None


def _compile(source: bytes, folder: Path, key: str) -> None:
    """Raises one of CANNOT."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise OSError("no C compiler (cc, gcc or clang)")
    with TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "rounding.so"
        command, silent = [compiler, *FLAGS, "-o", str(made)], subprocess.DEVNULL
        subprocess.run(command, input=source, stdout=silent, stderr=silent, timeout=LONGEST_SECONDS, check=True)
        os.replace(made, folder / f"rounding-{key}-{_digest(made.read_bytes())}.so")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
