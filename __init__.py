"""bitroute: quantize diffusers models layer by layer.

Importing it makes diffusers and transformers load checkpoints of `quant_method: bitroute`, in whichever
order they are imported. It imports neither, nor torch: registration waits until they load their quantizers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from bitroute.calibrate.calibration import calibrate
    from bitroute.calibrate.search import search
    from bitroute.convert.dequantize import dequantize
    from bitroute.convert.job import quantize
    from bitroute.convert.plan import plan
    from bitroute.convert.verify import verify
    from bitroute.errors import BitrouteError
    from bitroute.eval.evaluate import evaluate
    from bitroute.eval.report import write_report
    from bitroute.eval.sampling import Sampling, read_prompts

    __version__: str

__all__ = [
    "BitrouteError", "Sampling", "__version__", "calibrate", "dequantize", "evaluate", "plan", "quantize",
    "read_prompts", "search", "verify", "write_report",
]  # fmt: skip

_HOMES = {
    "BitrouteError": "bitroute.errors",
    "Sampling": "bitroute.eval.sampling",
    "dequantize": "bitroute.convert.dequantize",
    "evaluate": "bitroute.eval.evaluate",
    "plan": "bitroute.convert.plan",
    "quantize": "bitroute.convert.job",
    "read_prompts": "bitroute.eval.sampling",
    "search": "bitroute.calibrate.search",
    "verify": "bitroute.convert.verify",
    "write_report": "bitroute.eval.report",
}
_QUANTIZERS = {
    "diffusers.quantizers.auto": "bitroute.backends._diffusers",
    "transformers.quantizers.auto": "bitroute.backends._transformers",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import (
            version,  # a third of the import time of this package, were it at the top
        )

        value: Any = version("bitroute")
    elif name == "calibrate":
        value = import_module("bitroute.calibrate")  # the folder's own name: it is callable
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'bitroute' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _RegisterAfterLoading:
    """A `sys.meta_path` finder: the library's own loader runs first, then our quantizer joins its tables."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _QUANTIZERS else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            if module.__name__ in _QUANTIZERS:  # a zip archive has one loader for all its modules
                _register(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register(tables: ModuleType) -> None:
    """Whatever goes wrong here must not break the import of the library."""
    try:
        import_module(_QUANTIZERS[tables.__name__]).register(tables)
    except Exception as error:
        import logging

        logging.getLogger("bitroute").warning("cannot register with %s: %r", tables.__name__, error)


for _name in _QUANTIZERS:
    if _name in sys.modules:
        _register(sys.modules[_name])
sys.meta_path.insert(0, _RegisterAfterLoading)
