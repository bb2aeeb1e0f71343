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

import torch
from torch import Tensor

SWITCH = "BITROUTE_COMPILE"  # "0": eager code alone
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
_turn, _thread = Lock(), local()


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
    if not getattr(_thread, "compiled", False) or os.environ.get(SWITCH) == "0":
        return None
    if values[0].numel() < LEAST_NUMBERS or not all(map(_is_plain, values)):
        return None
    with _turn:
        return _library()


def described() -> str:
    """Whether there is compiled code, in words."""
    if os.environ.get(SWITCH) == "0":
        return f"not compiled, as {SWITCH}=0 asks"
    with _turn:
        library = _library()
    return f"compiled, {library.file}" if library else "not compiled: slower without a C compiler (cc, gcc or clang)"


def _is_plain(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous()


@functools.cache
def _library() -> Rounding | None:
    """Compiled once for this source, processor and user; None where that cannot be."""
    try:
        source = Path(__file__).with_name("rounding.c").read_bytes()
        processor, folder = _processor(), _cache()
        if not processor:
            return None
        key = _digest(repr((source, processor, FLAGS)).encode())
        return _kept(folder, key) or (_kept(folder, key) if _compile(source, folder, key) else None)
    except CANNOT:
        return None


def _processor() -> str:
    """What it can do, in the words of Linux: what is compiled for one may crash another, which shares the home."""
    cpus = Path("/proc/cpuinfo")
    if platform.machine() not in MACHINES or not cpus.is_file():
        return ""
    found = re.search(r"^(?:flags|Features)\s*:.*$", cpus.read_text(), re.MULTILINE)
    return f"{platform.machine()} {found[0]}" if found else ""


def _cache() -> Path:
    said = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (said if said.is_absolute() else Path.home() / ".cache") / "bitroute"


def _kept(folder: Path, key: str) -> Rounding | None:
    """What was compiled before, if it is this user's and whole: its name ends with its hash."""
    for file in folder.glob(f"rounding-{key}-*.so"):
        if file.is_file() and file.stat().st_uid == os.getuid() and file.stem.endswith(_digest(file.read_bytes())):
            return Rounding(file)
    return None


def _compile(source: bytes, folder: Path, key: str) -> bool:
    """Whether there was a compiler that made the file."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "rounding.so"
        command, silent = [compiler, *FLAGS, "-o", str(made)], subprocess.DEVNULL
        subprocess.run(command, input=source, stdout=silent, stderr=silent, timeout=LONGEST_SECONDS, check=True)
        os.replace(made, folder / f"rounding-{key}-{_digest(made.read_bytes())}.so")
    return True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
