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
from threading import Lock

import torch
from torch import Tensor

SWITCH = "BITROUTE_COMPILE"  # "0": eager code alone
LEAST_NUMBERS = 1 << 16  # fewer are not worth a compiler's start
MOST_THREADS = 4  # with more, torch's ten passes are as fast
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-xc", "-")  # products are rounded
MACHINES = frozenset({"x86_64", "aarch64"})
LONGEST_SECONDS = 60
BOUNDS, LARGEST_BLOCK = 15, 128  # of a table
Fields = tuple[int, int, float]  # of an element: exponent bits, mantissa bits, largest number
_P, _N, _F, _ELEMENT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float, (ctypes.c_int, ctypes.c_int, ctypes.c_float)
FUNCTIONS = {
    "nearest": (_P, _P, _N, *_ELEMENT),
    "codes": (_P, _P, _N, *_ELEMENT),
    "places": (_P, _P, _N, _P),
    "squares": (_P, _P, _P, _N, _N, *_ELEMENT),
    "table_squares": (_P, _P, _P, _P, _F, _P, _N, _N),
}
_turn = Lock()


class Rounding:
    """The functions of rounding.c; every tensor float32, contiguous and on the CPU."""

    def __init__(self, file: Path) -> None:
        """Raises OSError: the file is not there, or damaged. AttributeError: it is something else."""
        self.file, self._functions = file, ctypes.CDLL(str(file))
        for name, types in FUNCTIONS.items():
            function = getattr(self._functions, name)
            function.argtypes, function.restype = types, None

    def nearest(self, values: Tensor, out: Tensor | None, element: Fields) -> Tensor:
        """`Element.nearest`."""
        found = torch.empty_like(values) if out is None else out
        self._functions.nearest(values.data_ptr(), found.data_ptr(), values.numel(), *element)
        return found

    def codes(self, values: Tensor, element: Fields) -> Tensor:
        """The codes of the nearest numbers of an element, uint8 in the shape of the values."""
        found = torch.empty_like(values, dtype=torch.uint8)
        self._functions.codes(values.data_ptr(), found.data_ptr(), values.numel(), *element)
        return found

    def places(self, values: Tensor, bounds: Tensor) -> Tensor:
        """`Table.nearest` with its BOUNDS bounds, uint8 in the shape of the values."""
        found = torch.empty_like(values, dtype=torch.uint8)
        self._functions.places(values.data_ptr(), found.data_ptr(), values.numel(), bounds.data_ptr())
        return found

    def squares(self, values: Tensor, reciprocals: Tensor, out: Tensor, element: Fields) -> Tensor:
        """The squared errors of rounding blocks [..., size] times their reciprocals, in `out`."""
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


def rounding_of(*values: Tensor) -> Rounding | None:
    """For many plain numbers in the memory of this machine that nobody traces; the first of the tensors counts."""
    if not all(map(_is_plain, values)) or values[0].numel() < LEAST_NUMBERS:
        return None
    if torch.compiler.is_compiling() or torch.get_num_threads() > MOST_THREADS or os.environ.get(SWITCH) == "0":
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
    here = type(values) is Tensor and values.device.type == "cpu" and not values.requires_grad
    return here and values.dtype == torch.float32 and values.is_contiguous()


@functools.cache
def _library() -> Rounding | None:
    """Compiled once for this source, processor and user; None where that cannot be."""
    source, processor = Path(__file__).with_name("rounding.c").read_bytes(), _processor()
    if not processor:
        return None
    key = hashlib.sha256(repr((source, processor, FLAGS)).encode()).hexdigest()
    try:
        file = _cache() / f"rounding-{key[:16]}.so"
        return _opened(file) or (_opened(file) if _compile(source, file) else None)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, no room, no compiler
        return None


def _processor() -> str:
    """What it can do, in the words of Linux: what is compiled for one may crash another, which shares the home."""
    cpus = Path("/proc/cpuinfo")
    if platform.machine() not in MACHINES or not cpus.is_file():
        return ""
    found = re.search(r"^(?:flags|Features)\s*:.*$", cpus.read_text(), re.MULTILINE)
    return f"{platform.machine()} {found[0]}" if found else ""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitroute"


def _opened(file: Path) -> Rounding | None:
    try:
        return Rounding(file)
    except (OSError, AttributeError):
        return None


def _compile(source: bytes, file: Path) -> bool:
    """Whether there was a compiler that made the file."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [compiler, *FLAGS, "-o", str(made)]
        if subprocess.run(command, input=source, capture_output=True, timeout=LONGEST_SECONDS).returncode:
            return False
        os.replace(made, file)
    return True
