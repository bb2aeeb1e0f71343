"""What a list of scores says and how sure it is: means with bootstrap intervals, tails, paired differences.

Prompts are resampled, never samples: the pictures of one prompt under several seeds are not independent.
Percentile intervals (Efron 1979) of 10,000 resamples from a fixed seed, so equal scores give equal digits.
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
FEWEST_FOR_A_CLAIM = 6  # prompts; with fewer not even a sign test can reach 95 %: 2 · 2^-5 > 0.05
DRAWS_AT_ONCE = 2**20  # bounds the memory for thousands of prompts


@dataclass(frozen=True)
class Mean:
    """low and high bound the mean at 95 %; None where one prompt is all there is, or no score was finite."""

    value: float
    low: float | None
    high: float | None
    prompts: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is settled; never with fewer than six prompts, where the bootstrap is overconfident."""
        if self.low is None or self.high is None or self.prompts < FEWEST_FOR_A_CLAIM:
            return False
        return self.low > 0 or self.high < 0


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
    """mean: of first minus second over the pairs. left_out: pairs with one infinite score, without a difference."""

    mean: Mean
    pairs: int
    left_out: int


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
        mean=_mean(values[finite], clusters[finite]) if finite.any() else Mean(math.inf, None, None, 0),
        median=_quantile(ordered, 0.5),
        tail=_quantile(ordered, TAIL),
        worst=tuple((index, float(values[index])) for index in indices),
        identical=int((~finite).sum()),
    )


def summarize_psnr(scores_db: Sequence[float], prompts: Sequence[int] | None = None, *, worst: int = 5) -> PsnrSummary:
    """Of PSNR against a peak of 255; raises as `summarize` does."""
    values, clusters = _checked(scores_db, prompts)
    mse = _mean(255**2 * 10 ** (-values / 10), clusters)
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
    mean = _mean(differences[usable], clusters[usable])
    return Difference(mean, pairs=int(usable.sum()), left_out=int((~usable).sum()))


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


def _mean(values: Tensor, clusters: Tensor) -> Mean:
    """Finite float64 values [n] of prompts [n]."""
    names, places = torch.unique(clusters, return_inverse=True)
    prompts = len(names)
    sums = torch.zeros(prompts, dtype=torch.float64).index_add_(0, places, values)
    counts = places.bincount(minlength=prompts).double()
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


def _quantile(ordered: Tensor, fraction: float) -> float:
    """Linear between neighbours, as numpy's default; beside an infinite neighbour the finite one alone."""
    rank = fraction * (len(ordered) - 1)
    share = rank - math.floor(rank)
    below, above = float(ordered[math.floor(rank)]), float(ordered[math.ceil(rank)])
    if math.isinf(below) or math.isinf(above):
        return min(below, above)
    return below + share * (above - below)
