"""What a model's layers are really given, and what follows from it for a recipe. In the order of the data:

layers → budget              which layers are measured, and how much of each fits the memory
capture → statistics         hooks on a running pipeline; sums over all rows, a sample of them
unfinished → calibration     the state between two samples, and the run from the model to the statistics file
commands                     the same on the command line
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitroute.calibrate.calibration import Calibration


class _Callable(ModuleType):
    """The function `bitroute.calibrate` is named as this folder is, and importing the folder takes the name."""

    def __call__(self, *args: Any, **options: Any) -> Calibration:
        from bitroute.calibrate.calibration import calibrate

        return calibrate(*args, **options)


sys.modules[__name__].__class__ = _Callable
