"""The libraries' remarks about kernels that a machine lacks are not the user's business."""

from __future__ import annotations

import logging
import os

LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "optimum")


def quiet() -> None:
    """Call before the libraries are imported: most of what they say, they say then."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
