"""The limits of a gate, from the command line and from a recipe."""

from __future__ import annotations

import math

import pytest

from bitroute.errors import RecipeError
from bitroute.eval.gate import Limit, parse_gate


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("lpips<0.1", [Limit("lpips", 0.1)]),
        (" lpips < 1e-2 , psnr>28 ", [Limit("lpips", 0.01), Limit("psnr", 28)]),
        ("psnr>=3E+1,ssim>.9", [Limit("psnr", 30), Limit("ssim", 0.9)]),
        ("LPIPS<=0.1,MS-SSIM>0.95", [Limit("lpips", 0.1), Limit("ms_ssim", 0.95)]),
        ({"lpips": 0.1, "PSNR": 28}, [Limit("lpips", 0.1), Limit("psnr", 28)]),
        (None, []),
        ({}, []),
    ],
)
def test_limits_are_read(text: str | dict[str, float] | None, limits: list[Limit]) -> None:
    assert parse_gate(text) == limits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lpip<0.1", "unknown metric 'lpip'.*\n.*did you mean 'lpips'"),
        ("fid<10", "unknown metric 'fid'"),
        ("lpips>0.1", "points the wrong way\n.*lpips<0.1"),
        ("psnr<28", "points the wrong way\n.*psnr>28"),
        ("psnr", "not a limit"),
        ("psnr>", "not a limit"),
        ("psnr>good", "not a limit"),
        ("psnr=28", "not a limit"),
        ("psnr>28 lpips<0.1", "not a limit"),
        ("psnr>28,", "not a limit"),
        ("", "not a limit"),  # an empty shell variable must not wave everything through
        ("psnr>1.2.3", "'1.2.3' is not a number"),
        ("psnr>1e999", "'1e999' is not a number"),
        ("psnr>nan", "not a limit"),
        ({"psnr": math.nan}, "not a limit"),
        ({"psnr": True}, "not a limit"),
        ({"psnr": "28 dB"}, "not a limit"),
        ({"fid": 10}, "unknown metric 'fid'"),
    ],
)
def test_what_is_no_limit_is_refused_with_the_reason(text: str | dict[str, float], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){reason}"):
        parse_gate(text)


def test_every_wrong_limit_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        parse_gate("lpips>0.1,fid<3,psnr>28,garbage")
    assert len(error.value.problems) == 3


def test_a_mean_on_the_limit_does_not_hold_and_identical_pictures_always_do() -> None:
    assert [Limit("lpips", 0.1).holds(mean) for mean in (0.0, 0.0999, 0.1, 0.2)] == [True, True, False, False]
    assert [Limit("psnr", 28).holds(mean) for mean in (math.inf, 28.1, 28.0, 20.0)] == [True, True, False, False]


def test_no_limit_holds_for_a_mean_that_is_no_number() -> None:
    assert not Limit("lpips", 0.1).holds(math.nan)
    assert not Limit("psnr", 28).holds(math.nan)
