"""The smallest recipe whose pictures pass: whole conversions and evaluations, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bitroute.calibrate import search_gate
from bitroute.calibrate.search_front import Front, Point
from bitroute.calibrate.search_gate import folder_of, pass_gate
from bitroute.calibrate.search_recipe import Draft, planned_recipe, recipe_text
from bitroute.calibrate.search_request import Search, Wish, prepare
from bitroute.convert.job import run as run_job
from bitroute.convert.plan import Plan
from bitroute.errors import JobError
from bitroute.eval.sampling import Sampling

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "max_sequence_length": 16}
SIZES = {"nvfp4": 0.1, "int8": 0.01, "keep": 0.0}


@pytest.fixture
def search(tmp_path: Path) -> Callable[[str], Search]:
    sampling = Sampling(("red apple, noto style",), (0,), CALL)

    def search(gate: str) -> Search:
        wish = Wish("builtin:tiny-flux", tmp_path / "best.yaml", sampling, gate=gate, candidates="nvfp4,int8,keep",
                    work=tmp_path / "work")  # fmt: skip
        return prepare(wish)

    return search


def front_of(search: Search) -> tuple[Front, Callable[[Point], Plan]]:
    """Of made-up errors; each point is really converted and drawn."""
    errors: Mapping[str, Mapping[str, float]] = {
        layer.name: {name: SIZES[name] * (1 + math.sin(number)) for name in layer.size_bytes}
        for number, layer in enumerate(search.space.layers)
    }
    front = Front(search.space, errors, search.families, 0.01)

    def make(point: Point) -> Plan:
        draft = Draft({"model": "builtin:tiny-flux"}, [], "", search.base)
        text = recipe_text(search.space, point.chosen, errors, draft)
        return planned_recipe(search.space, point.chosen, text, draft, "gate")

    return front, make


def test_bisection_takes_the_smallest_that_passes_and_says_so_where_none_does(
    search: Callable[[str], Search], tmp_path: Path, tiny: Path, fill: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(search_gate, "POINTS", 3)
    wanted = search("psnr>42")  # 47 dB in 8 bits, 37 in 4
    front, make = front_of(wanted)
    points = [front.simple(point) for point in front.sweep(3)]
    folders = [folder_of(wanted, make(point)) for point in points]
    for point, folder in zip(points, folders, strict=True):
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_job(make(point), folder)
    fill(tmp_path / "cache", tiny, folders, wanted.wish.sampling)  # what the evaluations draw, in this process
    chosen, gate = pass_gate(wanted, front, make, lambda what, done, total: None, tmp_path / "cache")
    assert [(step["bits"], step["passed"]) for step in gate["evaluations"]] == [
        (points[1].bits, True), (points[0].bits, False),
    ]  # fmt: skip
    assert chosen.chosen == points[1].chosen
    unpassable = search("ssim>1.5")
    with pytest.raises(JobError, match="no recipe of the front passes the gate"):
        pass_gate(unpassable, front, make, lambda what, done, total: None, tmp_path / "cache")
