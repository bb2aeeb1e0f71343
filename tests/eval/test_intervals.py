from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

from bitroute.errors import JobError
from bitroute.eval.intervals import FLIPS, SIGNIFICANCE, Mean, compare, holm, summarize, summarize_psnr

SCORES = [((index * 37) % 101) / 100 for index in range(64)]  # spread over 0 … 1 without a random generator


def _scipy_p(differences: list[float], flips: float = math.inf) -> float:
    """Sign flips of one list of differences, against its mean."""
    drawn = np.random.default_rng(1)
    found = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=flips, rng=drawn, vectorized=False
    )
    return float(found.pvalue)


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


def test_a_difference_that_every_pair_shares_is_significant_where_the_means_alone_would_not_tell() -> None:
    better = [score - 0.01 - 0.0001 * (index % 7) for index, score in enumerate(SCORES)]
    low, high = _bounds(summarize(better, higher_is_better=False).mean)
    assert low < np.mean(SCORES) < high
    difference = compare(better, SCORES)
    assert difference.pairs == 64
    assert difference.mean.high is not None and difference.mean.high < -0.01
    assert difference.p == 1 / (1 + FLIPS)
    assert (difference.above, difference.below) == (0, 64)


def test_a_candidate_does_not_differ_from_itself() -> None:
    difference = compare(SCORES, SCORES)
    assert (difference.mean.value, difference.mean.low, difference.mean.high) == (0.0, 0.0, 0.0)
    assert (difference.p, difference.above, difference.below) == (1.0, 0, 0)


def test_five_prompts_settle_no_sign_and_six_that_agree_do() -> None:
    assert compare([1.0] * 5, [0.0] * 5).p == 2 / 2**5 > SIGNIFICANCE
    assert compare([0.0] * 6, [1.0] * 6).p == 2 / 2**6 < SIGNIFICANCE
    assert compare([1.0], [0.0]).p == 1.0


def test_a_pair_with_one_identical_picture_is_left_out_and_counted() -> None:
    difference = compare([math.inf, math.inf, 30.0], [math.inf, 20.0, 28.0])
    assert (difference.pairs, difference.left_out, difference.mean.value) == (2, 1, 1.0)
    assert (difference.p, difference.above, difference.below) == (1.0, 1, 0)


@pytest.mark.parametrize("prompts", [2, 7, 12, 14])
def test_few_prompts_have_the_exact_p_value_of_scipy(prompts: int) -> None:
    other = [score + 0.3 - 0.1 * ((index * 5) % 8) for index, score in enumerate(SCORES[:prompts])]
    differences = [one - two for one, two in zip(other, SCORES, strict=False)]
    assert compare(other, SCORES[:prompts]).p == pytest.approx(_scipy_p(differences), abs=1e-12)


def test_flips_that_tie_with_the_observed_differences_count_whatever_the_order_of_adding() -> None:
    differences = [0.1, 0.2, 0.3, -0.3, -0.1, 0.1, 0.7]
    flips = [[(-1) ** (number >> place & 1) for place in range(7)] for number in range(2**7)]
    totals = [round(abs(sum(s * d for s, d in zip(signs, differences, strict=True))), 9) for signs in flips]
    assert compare(differences, [0.0] * 7).p == sum(total >= 1.0 for total in totals) / 2**7


def test_many_prompts_have_nearly_the_p_value_of_scipy_and_always_the_same() -> None:
    other = [score + 0.12 - 0.1 * ((index * 5) % 8) / 3 for index, score in enumerate(SCORES[:40])]
    found = compare(other, SCORES[:40])
    wanted = _scipy_p([one - two for one, two in zip(other, SCORES, strict=False)], 20_000)
    assert 0.2 < wanted < 0.9
    assert found.p == pytest.approx(wanted, abs=0.02)
    assert compare(other, SCORES[:40]) == found


def test_prompts_on_which_nothing_differs_do_not_change_the_p_value() -> None:
    few = compare([0.4, 0.5, 0.1, 0.2, 0.3, 0.9], [0.1] * 6)
    assert compare([0.4, 0.5, 0.1, 0.2, 0.3, 0.9] + [0.7] * 30, [0.1] * 6 + [0.7] * 30).p == few.p == 2 / 2**5


def test_the_seeds_of_a_prompt_flip_together() -> None:
    seeds = [prompt for prompt in range(8) for _ in range(4)]
    first = [0.1 * (seed % 5) + 0.2 * (prompt % 3) - 0.1 for seed, prompt in enumerate(seeds)]
    means = [float(np.mean(first[4 * prompt : 4 * prompt + 4])) for prompt in range(8)]
    assert compare(first, [0.0] * 32, seeds).p == pytest.approx(_scipy_p(means), abs=1e-12)
    assert compare(first, [0.0] * 32).p < compare(first, [0.0] * 32, seeds).p


def test_candidates_that_do_not_differ_are_called_different_in_one_of_twenty_trials() -> None:
    drawn = np.random.default_rng(0)
    trials = [compare(list(drawn.normal(size=10)), list(drawn.normal(size=10))).p for _ in range(300)]
    assert 0.02 < np.mean([p < SIGNIFICANCE for p in trials]) < 0.08


def test_holms_correction_multiplies_by_the_tests_that_are_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


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
