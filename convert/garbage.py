"""Importing torch, diffusers and transformers makes a million objects that stay, and no cycle of them is garbage."""

from __future__ import annotations

import atexit
import gc

NEW_OBJECTS = 100_000  # Python's 700 spends a quarter of the time of a short command on looking for garbage


def collect_seldom() -> None:
    """Call in a process of our own, before the libraries are imported."""
    gc.set_threshold(NEW_OBJECTS)
    atexit.register(gc.freeze)  # collecting what the libraries leave at the end takes 1.5 s, for nothing
