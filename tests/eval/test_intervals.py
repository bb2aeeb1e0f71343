from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitroute.errors import JobError
from bitroute.eval.intervals import Mean, compare, summarize, summarize_psnr

SCORES = [((index * 37) % 101) / 100 for index in range(64)]  # spread over 0 … 1 without a random generator


def _bounds(mean: Mean) -> tuple[float, float]:
    assert mean.low is not None
    assert mean.high is not None
    return mean.low, mean.high


def test_the_interval_is_that_of_the_normal_approximation_when_there_are_many_prompts() -> None:
    mean = summarize(SCORES, higher_is_better=False).mean
    error = 1.96 * np.std(SCORES) / math.sqrt(len(SCORES))
    assert mean.value == pytest.approx(np.mean(SCORES), abs=1e-12)
    assert _bounds(mean) == pytest.approx((mean.value - error, mean.value + error), abs=0.05 * error)


def test_seeds_of_one_prompt_do_not_narrow_the_interval() -> None:
    once = summarize(SCORES, higher_is_better=False)
    four_seeds = [score for score in SCORES for _ in range(4)]
    prompts = [prompt for prompt in range(len(SCORES)) for _ in range(4)]
    clustered = summarize(four_seeds, prompts, higher_is_better=False).mean
    assert clustered.prompts == len(SCORES)
    assert _bounds(clustered) == pytest.approx(_bounds(once.mean), abs=1e-12)
    low, high = _bounds(summarize(four_seeds, higher_is_better=False).mean)
    assert high - low < 0.6 * (_bounds(clustered)[1] - _bounds(clustered)[0])


def test_prompts_with_more_seeds_weigh_more_in_the_mean() -> None:
    assert summarize([1.0, 1.0, 1.0, 0.0], [7, 7, 7, 2], higher_is_better=False).mean.value == 0.75


def test_the_same_scores_give_the_same_digits_whatever_the_thread_count() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = summarize(SCORES * 30, higher_is_better=False)
        torch.set_num_threads(2)
        assert summarize(SCORES * 30, higher_is_better=False) == one
    finally:
        torch.set_num_threads(threads)


def test_one_prompt_has_a_mean_but_no_interval() -> None:
    mean = summarize([0.1, 0.3], [5, 5], higher_is_better=False).mean
    assert (mean.value, mean.low, mean.high, mean.prompts) == (0.2, None, None, 1)
    assert not mean.excludes_zero


def test_the_tail_and_the_worst_lie_in_the_bad_direction() -> None:
    low_is_good = summarize(SCORES, higher_is_better=False, worst=3)
    high_is_good = summarize(SCORES, higher_is_better=True, worst=3)
    assert low_is_good.tail == pytest.approx(np.percentile(SCORES, 95))
    assert high_is_good.tail == pytest.approx(np.percentile(SCORES, 5))
    assert low_is_good.median == high_is_good.median == pytest.approx(np.median(SCORES))
    ranked = sorted(range(len(SCORES)), key=SCORES.__getitem__)
    assert [index for index, _ in low_is_good.worst] == ranked[::-1][:3]
    assert high_is_good.worst == tuple((index, SCORES[index]) for index in ranked[:3])


def test_of_equally_bad_scores_the_earlier_comes_first() -> None:
    assert summarize([1.0, 2.0, 2.0, 2.0], higher_is_better=False, worst=2).worst == ((1, 2.0), (2, 2.0))


def test_psnr_is_averaged_in_db_and_over_the_squared_errors() -> None:
    summary = summarize_psnr([20.0, 40.0])
    assert summary.of_db.mean.value == 30.0
    assert summary.of_mse.value == pytest.approx(10 * math.log10(2 / (10**-2 + 10**-4)), abs=1e-12)
    assert _bounds(summary.of_mse) == pytest.approx((20.0, 40.0))


def test_identical_pictures_are_counted_and_left_out_of_the_mean_of_db() -> None:
    summary = summarize_psnr([math.inf, 20.0, math.inf, 30.0, 25.0])
    assert summary.of_db.identical == 2
    assert summary.of_db.mean.value == 25.0
    assert summary.of_db.mean.prompts == 3
    assert summary.of_db.median == 30.0
    assert summary.of_db.worst[0] == (1, 20.0)
    assert math.isfinite(summary.of_db.tail)
    assert summary.of_mse.value == pytest.approx(10 * math.log10(5 / (10**-2 + 10**-3 + 10**-2.5)))


def test_a_tail_between_a_finite_and_an_infinite_score_is_the_finite_one() -> None:
    assert summarize([math.inf, 20.0], higher_is_better=True).tail == 20.0


def test_pictures_that_are_all_identical_have_an_infinite_mean_without_an_interval() -> None:
    summary = summarize_psnr([math.inf, math.inf])
    assert summary.of_db.mean == Mean(math.inf, None, None, 0)
    assert summary.of_db.median == summary.of_db.tail == summary.of_mse.value == math.inf


def test_a_difference_that_every_pair_shares_excludes_zero_where_the_means_alone_would_not() -> None:
    better = [score - 0.01 - 0.0001 * (index % 7) for index, score in enumerate(SCORES)]
    low, high = _bounds(summarize(better, higher_is_better=False).mean)
    assert low < np.mean(SCORES) < high
    difference = compare(better, SCORES)
    assert difference.pairs == 64
    assert difference.mean.high is not None and difference.mean.high < -0.01
    assert difference.mean.excludes_zero


def test_a_candidate_does_not_differ_from_itself() -> None:
    mean = compare(SCORES, SCORES).mean
    assert (mean.value, mean.low, mean.high) == (0.0, 0.0, 0.0)
    assert not mean.excludes_zero


def test_five_prompts_settle_no_sign() -> None:
    assert not compare([1.0] * 5, [0.0] * 5).mean.excludes_zero
    assert compare([1.0] * 6, [0.0] * 6).mean.excludes_zero


def test_a_pair_with_one_identical_picture_is_left_out_and_counted() -> None:
    difference = compare([math.inf, math.inf, 30.0], [math.inf, 20.0, 28.0])
    assert (difference.pairs, difference.left_out, difference.mean.value) == (2, 1, 1.0)


@pytest.mark.parametrize(
    ("scores", "prompts", "said"),
    [
        ([], None, "no scores"),
        ([0.1, math.nan], None, "not a score"),
        ([-math.inf], None, "not a score"),
        ([0.1, 0.2], [0], "one prompt for each"),
    ],
)
def test_scores_without_a_meaning_are_refused(scores: list[float], prompts: list[int] | None, said: str) -> None:
    with pytest.raises(JobError, match=said):
        summarize(scores, prompts, higher_is_better=False)


def test_candidates_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(JobError, match="3 and 2 scores"):
        compare([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(JobError, match="no pair has a difference"):
        compare([math.inf], [20.0])
