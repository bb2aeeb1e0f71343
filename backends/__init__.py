"""The formats a layer can be stored in, one file each.

A backend's name is its file's name with hyphens; other packages add theirs through the entry-point
group `bitroute.backends`. Only the requested module is imported, so a missing library breaks one backend.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from bitroute.errors import BackendError, Problem, did_you_mean

if TYPE_CHECKING:
    from bitroute.backends.base import Backend

__all__ = ["Kind", "available", "create", "find", "suggest"]

Kind = Literal["8-bit", "w8a8", "4-bit"]  # weights of 8 bits alone; with 8-bit activations; weights of 4 to 6 bits

_DISTRIBUTIONS = {"optimum": "optimum-quanto"}  # import name → what pip calls it, where they differ
_ELSEWHERE = {
    "fp8": "float8", "e4m3": "float8", "float8_e4m3fn": "float8", "w8a8": "int8", "int8wo": "int8",
    "w4a16": "int4", "bf16": "keep", "bfloat16": "keep", "fp16": "keep", "none": "keep", "bnb": "nf4",
    "bnb-nf4": "nf4", "bnb-4bit": "nf4", "bnb-8bit": "bnb-int8", "llm-int8": "bnb-int8",
}  # fmt: skip
_NOT_FORMATS = {"base", "layers", "load"}


def available() -> list[str]:
    """Names of every backend that is installed, without importing any of them."""
    own = {module.name.replace("_", "-") for module in iter_modules(__path__) if _is_format(module.name)}
    return sorted(own | set(_plugins()))


def find(name: str) -> type[Backend]:
    """The backend class called `name`.

    Raises:
        BackendError: no such backend, or the library it needs is not installed.
    """
    if name not in available():
        raise BackendError(
            Problem(
                f"unknown backend {name!r}",
                expected="one of " + ", ".join(available()),
                next_step=suggest(name),
            )
        )
    try:
        found: type[Backend] = _plugins()[name].load() if name in _plugins() else _own(name)
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        raise BackendError(
            Problem(
                f"backend {name!r} cannot be imported: {error}",
                next_step=f"pip install {_DISTRIBUTIONS.get(library, library)}",
            )
        ) from error
    return found


def suggest(name: str) -> str:
    """`did you mean 'float8'?` for a name that is none of ours: what people call the formats elsewhere, or a typo."""
    known = _ELSEWHERE.get(name.lower())
    return f"did you mean {known!r}?" if known else did_you_mean(name, available())


def create(name: str, /, **options: Any) -> Backend:
    """A backend with its options, checked: `create("nvfp4", scale="mse")`.

    `method` is an option of every backend: what is done to a weight before it is rounded (backends/_method.py).

    Raises:
        BackendError: unknown backend, unknown option, or a value the option does not take.
    """
    method = options.pop("method", None)
    backend = find(name).from_options(options)
    if method is None:
        return backend
    from bitroute.backends._method import with_method

    return with_method(backend, method)


def _is_format(module: str) -> bool:
    return module not in _NOT_FORMATS and not module.startswith("_")


def _own(name: str) -> type[Backend]:
    import_module(f"bitroute.backends.{name.replace('-', '_')}")
    from bitroute.backends.base import REGISTRY

    return REGISTRY[name]


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="bitroute.backends")}
