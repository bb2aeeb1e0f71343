"""Limits that a quantized model must meet: `lpips<0.1,psnr>28`, from the command line or the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bitroute.errors import Problem, RecipeError, did_you_mean

METRICS = {"lpips": "<", "psnr": ">", "ssim": ">", "ms_ssim": ">", "flip": "<"}  # metric → the side on which good lies
_LIMIT = re.compile(r"\s*([a-z_-]+)\s*([<>])=?\s*([0-9.e+-]+)\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Limit:
    """Judged on the mean over all samples."""

    metric: str
    value: float

    def holds(self, mean: float) -> bool:
        return mean < self.value if METRICS[self.metric] == "<" else mean > self.value

    def __str__(self) -> str:
        return f"{self.metric} {METRICS[self.metric]} {self.value:g}"


def parse_gate(gate: str | Mapping[str, float] | None) -> list[Limit]:
    """From `lpips<0.1,psnr>28` or {"lpips": 0.1, "psnr": 28}; only None and {} mean that there is no gate.

    Raises:
        RecipeError: names every limit it does not understand.
    """
    if gate is None or gate == {}:
        return []
    if not isinstance(gate, str):
        gate = ",".join(f"{metric}{METRICS.get(_name(metric), '<')}{value}" for metric, value in gate.items())
    limits, problems = [], []
    for text in gate.split(","):
        found = _LIMIT.fullmatch(text)
        problem = _problem(text, found)
        if problem:
            problems.append(problem)
        elif found:
            limits.append(Limit(_name(found[1]), float(found[3])))
    if problems:
        raise RecipeError(problems)
    return limits


def _problem(text: str, found: re.Match[str] | None) -> Problem | None:
    if found is None:
        return Problem(
            "not a limit", "gate", got=repr(text), expected="METRIC<NUMBER or METRIC>NUMBER, such as lpips<0.1"
        )
    metric, side, number = _name(found[1]), found[2], found[3]
    if metric not in METRICS:
        return Problem(f"unknown metric {metric!r}", "gate", expected=f"one of {', '.join(METRICS)}",
                       next_step=did_you_mean(metric, METRICS))  # fmt: skip
    if side != METRICS[metric]:
        return Problem(
            f"the limit {text.strip()!r} points the wrong way", "gate", expected=f"{metric}{METRICS[metric]}{number}"
        )
    try:
        finite = math.isfinite(float(number))
    except ValueError:
        finite = False
    return None if finite else Problem(f"{number!r} is not a number", "gate", got=repr(text))


def _name(metric: str) -> str:
    """`MS-SSIM`, as tables write it, is ms_ssim."""
    return metric.lower().replace("-", "_")
