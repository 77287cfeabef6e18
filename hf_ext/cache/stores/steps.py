"""Ascending columns in little memory: a byte for each, where they are not far apart.

columns  -1 -1  2  3  7        a step is how much further than the one before a column lies, the first
steps     0  0  3  1  4        real one being counted from -1; 0 stands for nothing
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ext.cache.entries import NOTHING

#: From the smallest to the largest.
DTYPES = (torch.uint8, torch.int16, torch.int32)


def steps_of(columns: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the steps of columns that follow others.

    Args:
        columns: `(rows, key heads, n)`, ascending but for what stands for nothing.
        before: `(rows, key heads)`, the last column before; -1, or None, where there is none.

    Returns:
        `(rows, key heads, n)`, or `(rows, 1, n)` if all heads are alike, in the smallest dtype that takes them.

    Example:
        >>> steps_of(torch.tensor([[[-1, -1, 2, 3, 7]]]))
        tensor([[[0, 0, 3, 1, 4]]], dtype=torch.uint8)
    """
    real = columns >= 0
    first = columns.new_full((*columns.shape[:2], 1), NOTHING) if before is None else before[..., None].to(columns)
    highest = torch.cat([first, columns], dim=-1).cummax(-1).values
    steps = highest.diff(dim=-1).masked_fill(~real, 0)
    if bool((steps == steps[:, :1]).all()):
        steps = steps[:, :1]
    most = int(steps.max()) if steps.numel() else 0
    return steps.to(next(dtype for dtype in DTYPES if most <= torch.iinfo(dtype).max))


def columns_of(steps: Tensor, heads: int) -> Tensor:
    """Return the columns `(rows, key heads, n)` int32 of steps.

    Example:
        >>> columns_of(torch.tensor([[[0, 0, 3, 1, 4]]]), 1)
        tensor([[[-1, -1,  2,  3,  7]]], dtype=torch.int32)
    """
    columns = steps.cumsum(-1, dtype=torch.int32).add_(NOTHING).masked_fill_(steps == 0, NOTHING)
    return columns.expand(-1, heads, -1)


def joined(steps: Tensor, more: Tensor) -> Tensor:
    """Return steps with those of later columns behind them."""
    heads = max(steps.shape[1], more.shape[1])
    dtype = max((steps.dtype, more.dtype), key=DTYPES.index)
    return torch.cat([part.to(dtype).expand(-1, heads, -1) for part in (steps, more)], dim=-1)
