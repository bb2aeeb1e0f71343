"""GPTQ: what rounding one weight does to the output is made up for by the weights that are still to be rounded.

W [out, in] with inputs of second moments H = E[x xᵀ]: channels are rounded one after another, those with the largest
H[j, j] first (act-order), under scales that were chosen before; the error (w - ŵ) / U[j, j] of channel j times row j
of U, the upper Cholesky factor of H⁻¹, is taken from the channels that follow, in lazy batches of 128. H gets 1 % of
its mean diagonal added. Source: arXiv 2210.17323, algorithm 1; static act-order with block formats: arXiv 2509.23202.
A block-diagonal H compensates within its blocks. Rows whose output error does not fall keep their plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LAZY = 128  # channels whose effect on later batches is applied at once
DAMP = 0.01
DAMPS = (DAMP, 0.1, 1.0)  # the next one where a Hessian of few or equal inputs is singular in float32

Nearest = Callable[[Tensor, Tensor], Tensor]  # weights [n, c], the channels [c] that they are → what is read back


def order(hessian: Tensor) -> Tensor:
    """[n, b, b] → the channels of each block in the order in which they are rounded, int64 [n, b]."""
    return hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def factor(hessian: Tensor, channels: Tensor) -> Tensor:
    """The upper Cholesky factors [n, b, b] of the inverses of the damped blocks, rows and columns in that order."""
    factors = torch.empty_like(hessian)
    for index, places in enumerate(channels):
        factors[index] = _factor(hessian[index, places.unsqueeze(1), places])
    return factors


def compensated(rows: Tensor, hessian: Tensor, channels: Tensor, factors: Tensor, nearest: Nearest) -> Tensor:
    """What is read back for float32 rows [n, in], each with the smaller output error of compensated and plain."""
    plain = nearest(rows, torch.arange(rows.shape[1], device=rows.device))
    found = torch.empty_like(rows)
    size = hessian.shape[1]
    for index in range(len(hessian)):
        span = slice(index * size, (index + 1) * size)
        place = index * size + channels[index]
        found[:, place] = _compensate(rows[:, place], factors[index], place, nearest)
        plain_error = output_error(plain[:, span] - rows[:, span], hessian[index])
        better = output_error(found[:, span] - rows[:, span], hessian[index]) < plain_error  # NaN is not
        found[:, span] = torch.where(better.unsqueeze(1), found[:, span], plain[:, span])
    return found


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """E[(x eᵀ)²] for each row e of the error [n, b] and H [b, b]: e H eᵀ, [n]."""
    return (error @ hessian).mul_(error).sum(1)


def _compensate(rows: Tensor, factors: Tensor, places: Tensor, nearest: Nearest) -> Tensor:
    """rows [n, b] of the channels `places`, in that order; works on a copy."""
    rows, found = rows.clone(), torch.empty_like(rows)
    for start in range(0, rows.shape[1], LAZY):
        stop = min(start + LAZY, rows.shape[1])
        batch = rows[:, start:stop]
        errors = torch.empty_like(batch)
        for place in range(stop - start):
            weights = batch[:, place : place + 1]
            rounded = nearest(weights, places[start + place].unsqueeze(0))
            triangle = factors[start + place, start:stop]
            error = (weights - rounded).div_(triangle[place])
            batch[:, place + 1 :].addmm_(error, triangle[None, place + 1 :], alpha=-1)
            found[:, start + place], errors[:, place] = rounded[:, 0], error[:, 0]
        rows[:, stop:].addmm_(errors, factors[start:stop, stop:], alpha=-1)
    return found


def _factor(hessian: Tensor) -> Tensor:
    """Of one block [b, b], which is overwritten: a full one is as large as the layer."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessian.div_(mean)
    for damp in DAMPS:
        damped = hessian.clone()
        damped.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            torch.cholesky_inverse(lower, out=damped)
            del lower
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
            if not failed:
                return upper
    return torch.eye(len(hessian), device=hessian.device)
