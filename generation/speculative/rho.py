"""The parameter of K-SEQ: by how much the target is scaled down so that k tries do not accept too much."""

from __future__ import annotations

import math

import numpy as np
import torch


def solve_rho(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    """Solve `1 - (1 - beta(rho))^k = rho beta(rho)` for `rho` on [1, k], `beta(rho) = sum min(q, p/rho)`.

    The left side falls and the right side rises with `rho`, so there is one crossing (or, without a
    common token, equality everywhere). Between two neighbouring values of `p/q` beta is `Q + P/rho`
    with constants `P` and `Q`: sort the ratios once, search the interval, then solve in scalars.

    Args:
        p: `(vocab,)` target distribution.
        q: `(vocab,)` distribution of the drafts.
        k: number of drafts.

    Returns:
        `rho`, never below the crossing by more than rounding (above it K-SEQ is exact, too).

    Raises:
        ValueError: `k` is below 1, or the shapes differ.

    Example:
        >>> round(solve_rho(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]), 2), 4)
        1.3904
    """
    if k < 1:
        raise ValueError(f"the number of drafts must be at least 1, got {k}")
    if p.shape != q.shape:
        raise ValueError(f"p and q must have one shape, got {tuple(p.shape)} and {tuple(q.shape)}")
    if k == 1:
        return 1.0
    target, draft = (x.detach().cpu().double().numpy() for x in (p, q))
    # Only ratios between 1 and k change sides; zeros of p and of q are not among them.
    at_most_1, at_least_k = target <= draft, target >= k * draft
    between = np.flatnonzero(~(at_most_1 | at_least_k))
    p_mass, q_mass = float(target.dot(at_most_1)), float(draft.dot(at_least_k))
    p_between, q_between = target[between], draft[between]
    ratios, q_mass = p_between / q_between, q_mass + float(q_between.sum())
    low, high = 1.0, float(k)
    rho = (low + high) / 2
    while low < rho < high:
        below = ratios < rho
        p_part, q_part = p_mass + float(p_between.dot(below)), q_mass - float(q_between.dot(below))
        beta = q_part + p_part / rho
        excess = any_of(beta, k) - rho * q_part - p_part
        slope = k * max(1 - beta, 0.0) ** (k - 1) * p_part / rho**2 + q_part
        low, high = (rho, high) if excess > 0 else (low, rho)
        better = rho + excess / slope if slope > 0 else rho
        if slope > 0 and abs(better - rho) <= 1e-15 * rho:
            return min(max(better, rho), high)
        rho = better if low < better < high else (low + high) / 2
    return high


def any_of(beta: float, k: int) -> float:
    """Return `1 - (1 - beta)^k`, to full precision for small beta as well.

    Args:
        beta: probability of one of k independent events of the same kind.
        k: their number.

    Returns:
        The probability that at least one of them happens.

    Example:
        >>> any_of(0.5, 2)
        0.75
    """
    return 1.0 if beta >= 1 else -math.expm1(k * math.log1p(-beta))
