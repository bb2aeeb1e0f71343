from __future__ import annotations

import re
from itertools import pairwise

import pytest

from bitroute.eval.plots import Axis, Line, Spot, Strip, lines, scatter, strips, tag


def circles(svg: str) -> list[float]:
    """Where the dots stand along x."""
    return [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', svg)]


@pytest.mark.parametrize(("low", "high"), [(30.0, 58.0), (49.99, 50.01), (0.0, 1e-5), (-3.0, 3.0), (5.0, 5.0)])
def test_a_linear_axis_has_a_few_round_ticks_inside_it(low: float, high: float) -> None:
    axis = Axis.around([low, high], 0, 100)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 8
    assert all(0 <= axis.place(tick) <= 100 for tick in ticks)
    assert axis.place(low) <= axis.place(high)


@pytest.mark.parametrize(("low", "high"), [(1e-5, 0.3), (0.02, 0.09), (0.5, 0.5), (0.0031, 0.0032)])
def test_a_logarithmic_axis_has_ticks_inside_it_however_narrow_it_is(low: float, high: float) -> None:
    axis = Axis.around([low, high], 0, 100, log=True)
    assert 2 <= len(axis.ticks()) <= 8
    assert all(0 <= axis.place(tick) <= 100 for tick in axis.ticks())


def test_perfect_scores_stand_apart_on_the_good_side() -> None:
    dots = [(0.1, "far"), (None, "perfect"), (0.001, "near")]
    far, perfect, near = circles(strips([Strip("a", dots, 0.05, None, None)], "LPIPS", "0", log=True))
    assert perfect < near < far
    dots = [(30.0, "far"), (None, "perfect"), (50.0, "near")]
    far, perfect, near = circles(strips([Strip("a", dots, 40.0, None, None)], "PSNR", "identical", log=False))
    assert far < near < perfect


def test_nothing_is_drawn_where_every_score_is_perfect() -> None:
    assert strips([Strip("a", [(None, "x")], None, None, None)], "PSNR", "identical", log=False) == ""
    assert scatter([Spot("a", 1.0, None, None, None)], "size", "MB", None) == ""


def test_the_names_of_close_candidates_do_not_cover_each_other() -> None:
    svg = scatter([Spot(f"candidate-{i}", 8.0, 40 + i / 100, None, None) for i in range(3)], "size", "MB", None)
    places = re.findall(r'x="([0-9.]+)" y="([0-9.]+)" text-anchor="start" class="">candidate-', svg)
    assert len(set(places)) == 3


def test_better_scores_stand_higher_than_worse_ones() -> None:
    svg = scatter([Spot("good", 8.0, 50.0, 49.0, 51.0), Spot("bad", 4.0, 30.0, 29.0, 31.0)], "size", "MB", 57.0)
    good, bad = (float(y) for y in re.findall(r'cy="([0-9.]+)"', svg))
    assert good < bad


def test_a_line_of_one_step_and_an_error_of_zero_can_be_drawn() -> None:
    assert "polyline" in lines([Line("a", [(0, 0.5)])], "error")
    assert "polyline" in lines([Line("a", [(0, 0.0), (1, 0.0)])], "error")


def test_names_at_the_ends_of_lines_keep_their_distance() -> None:
    svg = lines([Line(f"line-{i}", [(0, 1.0), (1, 1.0)]) for i in range(20)], "error")
    ends = [float(y) for y in re.findall(r'y="([0-9.]+)" text-anchor="start" class="c\d">line-', svg)]
    assert len(ends) == 20
    assert all(below - above >= 12.9 for above, below in pairwise(ends))
    height = float(re.findall(r'viewBox="0 0 360 (\d+)"', svg)[0])
    assert min(ends) > 0 and max(ends) < height


def test_what_stands_in_a_plot_is_escaped() -> None:
    assert tag("text", "<b>", aria_label='"<') == '<text aria-label="&#34;&lt;">&lt;b&gt;</text>'
