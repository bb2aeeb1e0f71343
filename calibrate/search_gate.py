"""The smallest recipe of the front whose pictures pass a gate: bisection, a conversion and an evaluation each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitroute.calibrate.search_front import Front, Point
from bitroute.calibrate.search_request import Search
from bitroute.convert.job import run as run_job
from bitroute.convert.plan import Plan
from bitroute.errors import JobError, Problem
from bitroute.eval.evaluate import evaluate
from bitroute.eval.gate import parse_gate

__all__ = ["folder_of", "pass_gate"]

POINTS = 31  # five evaluations tell them apart
Make = Callable[[Point], Plan]


def pass_gate(
    search: Search, front: Front, make: Make, report: Callable[[str, int, int], None], cache: Path | None
) -> tuple[Point, Mapping[str, Any]]:
    """The point, and every evaluation on the way; whatever is larger is taken to pass too.

    Raises:
        JobError: not even the largest passes.
    """
    points = front.sweep(POINTS)
    steps, passing = list[Mapping[str, Any]](), None
    low, high = 0, len(points)
    while low < high:
        middle = (low + high) // 2
        report(f"the gate at {points[middle].bits:.2f} bits", 0, 0)
        point = front.simple(points[middle])
        steps.append(_evaluate(search, point, make, cache))
        if steps[-1]["passed"]:
            high, passing = middle, point
        else:
            low = middle + 1
    if passing is None:
        got = f"{steps[-1]['bits']:.2f} bits: {steps[-1]['means']}"
        raise JobError(Problem("no recipe of the front passes the gate", "--gate", got, str(search.wish.gate)))
    return passing, {"limits": search.wish.gate, "evaluations": steps}


def folder_of(search: Search, planned: Plan) -> Path:
    """The checkpoint of a recipe; one of the same layers may have other components, or another name."""
    said = json.dumps([planned.recipe.name, planned.recipe.text])
    return search.work / "gate" / hashlib.sha256(said.encode()).hexdigest()[:16]


def _evaluate(search: Search, point: Point, make: Make, cache: Path | None) -> dict[str, Any]:
    """Checkpoints and pictures stay where they are, so that a killed search does not make them again."""
    planned, limits = make(point), parse_gate(search.wish.gate)
    folder = folder_of(search, planned)
    folder.parent.mkdir(parents=True, exist_ok=True)
    run_job(planned, folder, device=search.wish.sampling.device, resume=True)
    original = str(search.pipeline.folder)
    found = evaluate(original, [str(folder)], search.wish.sampling, limits=limits, denoiser=False, cache=cache)
    scores = found.candidates[0].scores
    means = ", ".join(f"{limit.metric} {scores.mean(limit.metric):.4g}" for limit in limits) if scores else "rejected"
    return {"bits": point.bits, "passed": found.passed, "means": means, "folder": str(folder)}
