"""What a model's layers are really given, and what follows from it for a recipe. In the order of the data:

layers → budget              which layers are measured, and how much of each fits the memory
capture → statistics         hooks on a running pipeline; sums over all rows, a sample of them
unfinished → calibration     the state between two samples, and the run from the model to the statistics file
commands                     the same on the command line

search_candidates → search_space     formats to choose from; which layer can be in which, and in how many bytes
search_request                       what a search is asked for, and everything that can be refused
search_methods                       by the statistics alone: the methods with which a format is worth measuring
search_sensitivity, search_journal   what a layer in a format does to the output; every measurement on the disk
search_solver → search_front         the least error for a budget, and for budgets of all sizes
search_recipe, search_report         what was chosen as a recipe, and what people are told
search_gate → search                 the smallest that passes an evaluation; all of it in order
search_command                       the same on the command line
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
