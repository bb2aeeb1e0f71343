"""Formats that choose the scales of their blocks first and then round every weight by itself.

What rounds one weight at a time can also be told which weights to round: error compensation moves the weights that
are still to be rounded, under scales that were chosen before (backends/_compensation.py).
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from bitroute.backends.base import NONE, Backend, Statistics, Survey

Scales = tuple[Tensor, ...]  # each [n, blocks]: of every block of a row, what its weights are rounded with


class Rounded(Backend):
    """`encode` in two steps that others may take one by one."""

    @property
    def in_two_steps(self) -> bool:
        """Whether the options leave it so; where a library does both steps at once, they do not."""
        return True

    @abstractmethod
    def scales(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> Scales:
        """What `encode` would choose for rows [n, in], as it will be read back: one or more [n, blocks]."""

    @abstractmethod
    def nearest(self, weights: Tensor, scales: Scales, survey: Survey) -> Tensor:
        """What is read back for float32 weights [n, c] that were stored with these scales, each [n, c] or [n, 1]."""

    @abstractmethod
    def store(self, rows: Tensor, scales: Scales, survey: Survey) -> dict[str, Tensor]:
        """The row-wise outputs for rows [n, in] with these scales, each [n, blocks]."""

    def encode(self, rows: Tensor, survey: Survey, statistics: Statistics = NONE) -> dict[str, Tensor]:
        return self.store(rows, self.scales(rows, survey, statistics), survey)
