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


def nearest(values: Tensor, out: Tensor | None, element: Fields) -> Tensor | None:
    """`Element.nearest`; None where that is to do it itself."""
    library = _for(values)
    if not library:
        return None
    found = torch.empty_like(values) if out is None else out
    library.nearest(values.data_ptr(), found.data_ptr(), values.numel(), *element)
    return found


def codes(values: Tensor, element: Fields) -> Tensor | None:
    """The codes of the nearest numbers of an element, uint8 in the shape of the values; None as in `nearest`."""
    library = _for(values)
    if not library:
        return None
    found = torch.empty_like(values, dtype=torch.uint8)
    library.codes(values.data_ptr(), found.data_ptr(), values.numel(), *element)
    return found


def places(values: Tensor, bounds: Tensor) -> Tensor | None:
    """`Table.nearest` with its 15 bounds, uint8 in the shape of the values; None as in `nearest`."""
    library = _for(values)
    if not library or len(bounds) != BOUNDS:
        return None
    found = torch.empty_like(values, dtype=torch.uint8)
    library.places(values.data_ptr(), found.data_ptr(), values.numel(), bounds.data_ptr())
    return found


def squares(values: Tensor, reciprocals: Tensor, out: Tensor, element: Fields) -> Tensor | None:
    """The squared errors of rounding blocks [..., size] times their reciprocals [...], in `out`; None as above."""
    library = _for(values)
    if not library:
        return None
    units = reciprocals.contiguous()
    library.squares(values.data_ptr(), units.data_ptr(), out.data_ptr(), units.numel(), values.shape[-1], *element)
    return out


def table_squares(
    values: Tensor, reciprocals: Tensor, shares: Tensor, rough: Tensor, bins: int, out: Tensor
) -> Tensor | None:
    """The squared errors of blocks [..., size] that a table holds in shares [...] of them; None as above."""
    library = _for(values)
    if not library or values.shape[-1] > LARGEST_BLOCK:
        return None
    units, parts = reciprocals.contiguous(), shares.contiguous()
    pointers = (tensor.data_ptr() for tensor in (values, units, parts, rough))
    library.table_squares(*pointers, bins, out.data_ptr(), units.numel(), values.shape[-1])
    return out


def described() -> str:
    """Whether there is compiled code, in words."""
    if os.environ.get(SWITCH) == "0":
        return f"not compiled, as {SWITCH}=0 asks"
    with _turn:
        library = _library()
    return f"compiled, {library._name}" if library else "not compiled: slower without a C compiler (cc, gcc or clang)"


def _for(values: Tensor) -> ctypes.CDLL | None:
    """The library, for many plain numbers in the memory of this machine that nobody traces."""
    plain = type(values) is Tensor and values.device.type == "cpu" and values.dtype == torch.float32
    if not plain or values.numel() < LEAST_NUMBERS or not values.is_contiguous() or values.requires_grad:
        return None
    if torch.compiler.is_compiling() or torch.get_num_threads() > MOST_THREADS or os.environ.get(SWITCH) == "0":
        return None
    with _turn:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Compiled once for this source, processor and user; None where that cannot be."""
    source, processor = Path(__file__).with_name("rounding.c").read_bytes(), _processor()
    if not processor:
        return None
    key = hashlib.sha256(repr((source, processor, FLAGS)).encode()).hexdigest()
    try:
        file = _cache() / f"rounding-{key[:16]}.so"
        library = _opened(file) or (_opened(file) if _compile(source, file) else None)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, no room, no compiler
        return None
    for name, types in FUNCTIONS.items() if library else ():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _processor() -> str:
    """What it can do, in the words of Linux: what is compiled for one may crash another, which shares the home."""
    cpus = Path("/proc/cpuinfo")
    if platform.machine() not in MACHINES or not cpus.is_file():
        return ""
    found = re.search(r"^(?:flags|Features)\s*:.*$", cpus.read_text(), re.MULTILINE)
    return f"{platform.machine()} {found[0]}" if found else ""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitroute"


def _opened(file: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # not there, or damaged
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
