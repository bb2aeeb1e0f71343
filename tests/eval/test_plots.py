from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest

from bitroute.eval.plots import LABEL_PX, WIDTH, Axis, Line, Spot, Strip, lines, scatter, strips, tag


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


def boxes_of_names(svg: str) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of each candidate's name, at the width that the plot reckons with."""
    found = re.findall(r'<text x="([0-9.-]+)" y="([0-9.-]+)" text-anchor="start" class="">([^<]+)</text>', svg)
    return [(float(x), float(y) - 9, float(x) + LABEL_PX * len(name), float(y) + 2) for x, y, name in found]


def test_twenty_names_at_one_place_stay_apart_and_inside_and_lines_lead_to_them() -> None:
    spots = [Spot(f"candidate-{i:02d}", 8.0 + i / 1000, 0.02 + i / 10000, None, None) for i in range(20)]
    svg = scatter([*spots, Spot("far", 4.0, 0.5, None, None)], "size", "MB", 0.001, log=True)
    boxes = boxes_of_names(svg)
    assert len(boxes) == 21
    assert not [1 for a, b in combinations(boxes, 2) if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
    assert all(left > 0 and right < WIDTH and top > 0 and bottom < 230 for left, top, right, bottom in boxes)
    assert svg.count('class="leader"') > 5


def test_where_smaller_is_better_a_perfect_score_stands_lowest_and_the_floor_below_the_others() -> None:
    spots = [Spot("best", 9.0, None, None, None), Spot("good", 8.0, 0.01, 0.005, 0.02), Spot("bad", 4.0, 0.5, 0.4, 0.6)]
    svg = scatter(spots, "size", "MB", 0.001, log=True)
    best, good, bad = (float(y) for y in re.findall(r'cy="([0-9.]+)"', svg))
    [floor] = (float(y) for y in re.findall(r'y1="([0-9.]+)" x2="[0-9.]+" y2="[0-9.]+" class="yardstick"', svg))
    assert bad < good < floor < best < 230


def test_a_line_joins_the_front_in_the_order_of_size_and_no_name_lies_on_it() -> None:
    spots = [
        Spot("large", 9.0, 0.01, None, None),
        Spot("small", 3.0, 0.3, None, None),
        Spot("other", 8.0, 0.4, None, None),
    ]
    svg = scatter(spots, "size", "MB", None, log=True, front=["large", "small"])
    [points] = re.findall(r'<polyline points="([^"]+)" class="front"', svg)
    (x1, y1), (x2, y2) = ([float(number) for number in point.split(",")] for point in points.split())
    assert x1 < x2 and y1 < y2
    on_line = [(x1 + (x2 - x1) * k / 500, y1 + (y2 - y1) * k / 500) for k in range(501)]
    for left, top, right, bottom in boxes_of_names(svg):
        assert not [1 for x, y in on_line if left < x < right and top < y < bottom]
    assert "front" not in scatter(spots, "size", "MB", None, log=True, front=["large"])


def test_a_line_of_one_step_and_an_error_of_zero_can_be_drawn() -> None:
    assert "polyline" in lines([Line("a", [(0, 0.5)])], "error")
    assert "polyline" in lines([Line("a", [(0, 0.0), (1, 0.0)])], "error")


@pytest.mark.parametrize(("last", "ticks"), [(1, ["0", "1"]), (2, ["0", "1", "2"]), (27, ["0", "10", "20"])])
def test_steps_are_counted_in_whole_numbers(last: int, ticks: list[str]) -> None:
    svg = lines([Line("a", [(0, 0.5), (last, 0.5)])], "error")
    assert re.findall(r'text-anchor="middle" class="muted">([^<]+)<', svg) == ticks


def test_names_at_the_ends_of_lines_keep_their_distance() -> None:
    svg = lines([Line(f"line-{i}", [(0, 1.0), (1, 1.0)]) for i in range(20)], "error")
    ends = [float(y) for y in re.findall(r'y="([0-9.]+)" text-anchor="start" class="c\d">line-', svg)]
    assert len(ends) == 20
    assert all(below - above >= 12.9 for above, below in pairwise(ends))
    height = float(re.findall(r'viewBox="0 0 360 (\d+)"', svg)[0])
    assert min(ends) > 0 and max(ends) < height


def test_long_names_lose_their_middle_and_keep_both_ends() -> None:
    names = ["a-model-of-a-long-name-fp8", "a-model-of-a-long-name-nf4"]
    svg = scatter([Spot(name, 8.0, 40.0 + index, None, None) for index, name in enumerate(names)], "s", "MB", None)
    assert re.findall(r">(a-mode[^<]*)</text>", svg) == ["a-model…name-fp8", "a-model…name-nf4"]


def test_what_stands_in_a_plot_is_escaped() -> None:
    assert tag("text", "<b>", aria_label='"<') == '<text aria-label="&#34;&lt;">&lt;b&gt;</text>'
