"""A low-rank branch: W ≈ U V + Q, U [out, r] and V [r, in] in bf16, Q what the format makes of the rest.

First the best U V of W itself, so that the rest has fewer outliers (SVDQuant, arXiv 2411.05007), then in turns of what
Q leaves (LoftQ, arXiv 2310.08659); the turn with the least error is taken. Errors count by the mean square of each
input channel where calibration measured it: U V is then the best of W diag(√m), divided by √m.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitroute.errors import BackendError, Problem

REFITS = 3
OVERSAMPLING, ITERATIONS, SEED = 16, 4, 0  # of the randomized SVD (arXiv 0909.4061, algorithm 4.4)
DTYPE = torch.bfloat16
TOO_LARGE = Problem(
    "the weight has no branch of low rank", got="numbers whose squares do not fit float32",
    next_step="give the layer a rule without low_rank",
)  # fmt: skip


def split(
    weight: Tensor, rank: int, second_moment: Tensor | None, through: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """U and V for a float32 weight [out, in]; through: the rest → what is read back for it."""
    roots = _roots(second_moment, weight)
    product, best, least = weight * roots, None, torch.inf
    for _ in range(1 + REFITS):
        up, down = _approximate(product, rank)
        down = (down / roots).to(DTYPE)
        rest = (up.float() @ down.float()).neg_().add_(weight)
        stored = through(rest)
        error = rest.sub_(stored).mul_(roots).square_().sum().item()
        del rest  # of the size of the weight, as are `product` and `stored`
        if best is None or error < least:
            best, least = (up, down), error
        product = stored.neg_().add_(weight).mul_(roots)
    assert best is not None
    return best


def _roots(second_moment: Tensor | None, weight: Tensor) -> Tensor:
    """√m [in], at least a thousandth of the mean: V is divided by it."""
    if second_moment is None or not second_moment.any():
        return torch.ones(weight.shape[1], device=weight.device)
    roots = second_moment.to(weight.device).sqrt()
    return roots.clamp(min=1e-3 * roots.mean().item())


def _approximate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best U (in its dtype) and V (float32) of this rank, singular values in halves on both sides.

    Raises:
        BackendError: LAPACK finds none, of numbers whose squares do not fit float32.
    """
    try:
        left, values, right = _svd(weight, rank)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise BackendError(TOO_LARGE) from None
    halves = values.sqrt()
    up = (left * halves).to(DTYPE)
    return up, halves.unsqueeze(1) * right


def _svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values with their vectors [out, rank] and [rank, in], the same on every run."""
    out, columns = weight.shape
    width = rank + OVERSAMPLING
    if 2 * width >= min(out, columns):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = torch.randn(columns, width, generator=torch.Generator().manual_seed(SEED)).to(weight.device)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
