"""What a list of scores says and how sure it is: means with bootstrap intervals, tails, paired differences.

Prompts are resampled, never samples: the pictures of one prompt under several seeds are not independent.
Percentile intervals (Efron 1979) of 10,000 resamples from a fixed seed, so equal scores give equal digits.
Whether two candidates differ is decided by a sign-flip permutation test (Fisher 1935), which holds for few prompts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitroute.errors import JobError, Problem
from bitroute.eval.metrics import mse_to_db

RESAMPLES, CONFIDENCE, SEED = 10_000, 0.95, 0
TAIL = 0.95  # of the scores are better than the tail
SIGNIFICANCE = 0.05  # of a p-value, corrected where several are judged at once
EXACT_PROMPTS = 14  # up to 2^14 sign flips are enumerated, for more prompts FLIPS are drawn
FLIPS = 10_000
ROUNDING = 1e-12  # of the largest sum: flips that tie with what was observed but for the order of adding
DRAWS_AT_ONCE = 2**20  # bounds the memory for thousands of prompts


@dataclass(frozen=True)
class Mean:
    """low and high bound the mean at 95 %; None where one prompt is all there is, or no score was finite."""

    value: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class Summary:
    """mean: of the finite scores. tail: the 95th percentile in the bad direction. worst: (index, score), worst first.

    identical: how many scores were infinite; the median, the tail and the worst are those of all scores.
    """

    mean: Mean
    median: float
    tail: float
    worst: tuple[tuple[int, float], ...]
    identical: int


@dataclass(frozen=True)
class PsnrSummary:
    """of_db: the mean of the dB, without identical pictures. of_mse: the dB of the mean squared error of all."""

    of_db: Summary
    of_mse: Mean


@dataclass(frozen=True)
class Difference:
    """mean: of first minus second over the pairs. left_out: pairs with one infinite score, without a difference.

    p: two-sided p-value of "the two are equally good". above, below: prompts on which first is higher, lower.
    """

    mean: Mean
    pairs: int
    left_out: int
    p: float
    above: int
    below: int


def summarize(
    scores: Sequence[float], prompts: Sequence[int] | None = None, *, higher_is_better: bool, worst: int = 5
) -> Summary:
    """prompts: the prompt that each score belongs to; None: every score has its own.

    Raises:
        JobError: no scores, NaN or -inf among them, or not one prompt for each.
    """
    values, clusters = _checked(scores, prompts)
    finite = values.isfinite()
    ordered = values.sort(descending=higher_is_better, stable=True).values
    indices = values.sort(descending=not higher_is_better, stable=True).indices[:worst].tolist()
    return Summary(
        mean=_mean(*_by_prompt(values[finite], clusters[finite])) if finite.any() else Mean(math.inf, None, None, 0),
        median=_quantile(ordered, 0.5),
        tail=_quantile(ordered, TAIL),
        worst=tuple((index, float(values[index])) for index in indices),
        identical=int((~finite).sum()),
    )


def summarize_psnr(scores_db: Sequence[float], prompts: Sequence[int] | None = None, *, worst: int = 5) -> PsnrSummary:
    """Of PSNR against a peak of 255; raises as `summarize` does."""
    values, clusters = _checked(scores_db, prompts)
    mse = _mean(*_by_prompt(255**2 * 10 ** (-values / 10), clusters))
    low, high = (None if bound is None else mse_to_db(bound) for bound in (mse.high, mse.low))
    return PsnrSummary(
        of_db=summarize(scores_db, prompts, higher_is_better=True, worst=worst),
        of_mse=Mean(mse_to_db(mse.value), low, high, mse.prompts),
    )


def compare(first: Sequence[float], second: Sequence[float], prompts: Sequence[int] | None = None) -> Difference:
    """Two candidates' scores of the same samples in the same order; two infinite scores differ by 0.

    Raises:
        JobError: as `summarize`, or the two are not equally long, or no pair has a difference.
    """
    one, clusters = _checked(first, prompts)
    other, _ = _checked(second, prompts)
    if len(one) != len(other):
        got = f"{len(one)} and {len(other)} scores"
        raise JobError(Problem("the candidates cannot be paired", got=got, expected="scores of the same samples"))
    differences = torch.where(one == other, 0.0, one - other)
    usable = differences.isfinite()
    if not usable.any():
        raise JobError(
            Problem(
                "no pair has a difference",
                got="an infinite score in each",
                expected="a pair of finite scores",
            )
        )
    sums, counts = _by_prompt(differences[usable], clusters[usable])
    return Difference(
        _mean(sums, counts), pairs=int(usable.sum()), left_out=int((~usable).sum()), p=_sign_flip_p(sums),
        above=int((sums > 0).sum()), below=int((sums < 0).sum()),
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value corrected for all of them, in the given order (Holm 1979, step-down).

    Whoever calls significant what stays below 5 % errs even once in at most 5 % of such families.
    """
    corrected, reached = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = reached
    return corrected


def _checked(scores: Sequence[float], prompts: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Scores in float64 and their prompts, [n] each."""
    values = torch.tensor(list(scores), dtype=torch.float64)
    clusters = torch.arange(len(values)) if prompts is None else torch.tensor(list(prompts), dtype=torch.int64)
    if not len(values):
        raise JobError(Problem("no scores to summarize", expected="at least one"))
    if len(values) != len(clusters):
        got = f"{len(values)} scores, {len(clusters)} prompts"
        raise JobError(Problem("the scores' prompts are not known", got=got, expected="one prompt for each score"))
    bad = (values.isnan() | values.isneginf()).nonzero().flatten().tolist()
    if bad:
        where = f"score {bad[0]}"
        raise JobError(Problem("not a score", where, got=str(float(values[bad[0]])), expected="a number or inf"))
    return values, clusters


def _by_prompt(values: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts, float64 [prompts] each, of finite float64 values [n] of prompts [n]."""
    names, places = torch.unique(clusters, return_inverse=True)
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, places, values)
    return sums, places.bincount(minlength=len(names)).double()


def _mean(sums: Tensor, counts: Tensor) -> Mean:
    """Of what `_by_prompt` returns."""
    prompts = len(sums)
    value = float(sums.sum() / counts.sum())
    if prompts < 2:
        return Mean(value, None, None, prompts)
    means = _resampled_means(sums, counts).sort().values
    side = (1 - CONFIDENCE) / 2
    return Mean(value, _quantile(means, side), _quantile(means, 1 - side), prompts)


def _resampled_means(sums: Tensor, counts: Tensor) -> Tensor:
    """The mean over all samples of as many prompts, drawn with replacement: float64 [RESAMPLES]."""
    generator = torch.Generator().manual_seed(SEED)
    prompts = len(sums)
    rows = max(1, DRAWS_AT_ONCE // prompts)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = torch.randint(prompts, (min(rows, RESAMPLES - start), prompts), generator=generator)
        means.append(sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1))
    return torch.cat(means)


def _sign_flip_p(sums: Tensor) -> float:
    """Share of the sign flips of whole prompts whose mean is as far from 0 as the observed one; sums: [prompts].

    A drawn share counts the observed signs too, so it is never 0 (Phipson and Smyth 2010).
    """
    moving = sums[sums != 0]  # flipping 0 changes nothing
    prompts, largest = len(moving), float(moving.abs().sum())
    observed = abs(float(moving.sum())) - ROUNDING * largest
    if prompts <= EXACT_PROMPTS:
        flips = torch.arange(2**prompts).unsqueeze(1) >> torch.arange(prompts) & 1
        return float((_flipped(moving, flips) >= observed).double().mean())
    generator = torch.Generator().manual_seed(SEED)
    rows, as_far = max(1, DRAWS_AT_ONCE // prompts), 0
    for start in range(0, FLIPS, rows):
        flips = torch.randint(2, (min(rows, FLIPS - start), prompts), generator=generator)
        as_far += int((_flipped(moving, flips) >= observed).sum())
    return (1 + as_far) / (1 + FLIPS)


def _flipped(sums: Tensor, flips: Tensor) -> Tensor:
    """How far from 0 the total is under each row of flips [n, prompts] of 0 and 1: float64 [n]."""
    return (sums - 2 * flips * sums).sum(dim=1).abs()


def _quantile(ordered: Tensor, fraction: float) -> float:
    """Linear between neighbours, as numpy's default; beside an infinite neighbour the finite one alone."""
    rank = fraction * (len(ordered) - 1)
    share = rank - math.floor(rank)
    below, above = float(ordered[math.floor(rank)]), float(ordered[math.ceil(rank)])
    if math.isinf(below) or math.isinf(above):
        return min(below, above)
    return below + share * (above - below)
