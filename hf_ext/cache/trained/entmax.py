"""The sparse sigmoid: alpha-entmax of two entries.

alpha-entmax of `[x, 0]` is `(p, 1 - p)` with

    ln_a(p) - ln_a(1 - p) = x,    ln_a(t) = (t^a - 1) / a,    a = alpha - 1

or 1 (0) once `x` is at least `1 / a` (at most `-1 / a`). With `alpha = 1` this is the logistic function, with
`alpha = 2` a ramp, and the larger `alpha`, the closer to a step. Source: Sparse Sequence-to-Sequence Models
(arXiv:1905.05702), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Steps of Newton's method. The slope lies between 1 and 2 everywhere, so that a few are enough in any precision.
STEPS = 8


def sparse_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """Return the first entry of the alpha-entmax of `[x, 0]`.

    Args:
        x: any shape, floating point.
        alpha: from 1 (the logistic function) to infinity (1 where `x` is positive, otherwise 0, without gradient).

    Raises:
        ValueError: alpha is below 1.

    Example:
        >>> sparse_sigmoid(torch.tensor([-2.0, 0.0, 0.5, 2.0]), alpha=2)
        tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """
    if not alpha >= 1:
        raise ValueError(f"alpha must be a number from 1, got {alpha}")
    if alpha == 1:
        return torch.sigmoid(x)
    if math.isinf(alpha):
        return (x > 0).to(x.dtype)
    return _SparseSigmoid.apply(x, alpha - 1)


class _SparseSigmoid(torch.autograd.Function):
    """Solve for the value; the gradient is that of the equation above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: float) -> Tensor:  # type: ignore[override]
        size = x.abs()
        smaller = _smaller(size.clamp(max=1 / a), a)
        smaller = torch.where(size < 1 / a, smaller, 0)
        ctx.save_for_backward(smaller)
        ctx.a = a
        return torch.where(x > 0, 1 - smaller, smaller)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (q,) = ctx.saved_tensors
        slope = 1 / (q ** (ctx.a - 1) + (1 - q) ** (ctx.a - 1))
        return grad * torch.where(q > 0, slope, 0), None


def _smaller(x: Tensor, a: float) -> Tensor:
    """Return the smaller of the two probabilities for `x` from 0 to `1 / a`.

    The unknown is the deformed logarithm of the probability for which the slope stays between 1 and 2: the smaller one
    up to a = 1, the larger one from there on. Both start at one half and approach the root from one side.
    """
    log = torch.full_like(x, math.expm1(a * math.log(0.5)) / a)
    if a <= 1:
        for _ in range(STEPS):
            q = _exp(log, a)
            gap = torch.expm1(a * torch.log1p(-q)) / a - log - x
            log = log + gap / (1 + (q / (1 - q)) ** (1 - a))
        return _exp(log, a)
    for _ in range(STEPS):
        p = _exp(log, a).clamp(max=1)
        gap = log - ((1 - p) ** a - 1) / a - x
        log = (log - gap / (1 + ((1 - p) / p) ** (a - 1))).clamp(max=0)
    return 1 - _exp(log, a).clamp(max=1)


def _exp(log: Tensor, a: float) -> Tensor:
    """Return what has this deformed logarithm."""
    return torch.exp(torch.log1p((a * log).clamp(min=-1)) / a)
