"""Ascending columns in little memory: a byte for each, where they are not far apart.

columns  -1 -1  2  3  7        a step is how much further than the one before a column lies, the first
steps     0  0  3  1  4        real one being counted from -1; 0 stands for nothing
"""

from __future__ import annotations

from typing import Any

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
    return steps.to(smallest(most))


def columns_of(steps: Tensor, heads: int) -> Tensor:
    """Return the columns `(rows, key heads, n)` int32 of steps.

    Example:
        >>> columns_of(torch.tensor([[[0, 0, 3, 1, 4]]]), 1)
        tensor([[[-1, -1,  2,  3,  7]]], dtype=torch.int32)
    """
    columns = steps.cumsum(-1, dtype=torch.int32).add_(NOTHING).masked_fill_(steps == 0, NOTHING)
    return columns.expand(-1, heads, -1)


def last_of(steps: Tensor) -> Tensor:
    """Return the last column of each head, `(rows, key heads)` int32, -1 where there is none.

    Example:
        >>> last_of(torch.tensor([[[0, 0, 3, 1, 4]]]))
        tensor([[7]], dtype=torch.int32)
    """
    return steps.sum(-1, dtype=torch.int32).add_(NOTHING)


def steps_after(last: Tensor | int, start: int, count: int, rows: int, real: Tensor | None, device: Any) -> Tensor:
    """Return the steps of new tokens, which all heads get alike.

    Args:
        last: the last column of each head before, `(rows, key heads)`; a number if it is the same everywhere.
        start: column of the first new token.
        count: new tokens.
        rows: of the batch.
        real: `(rows, count)` bool, False for padding; None if all are real.
        device: of the steps.

    Returns:
        `(rows, 1 or key heads, count)`.

    Example:
        >>> steps_after(4, 7, 3, 1, None, "cpu")
        tensor([[[3, 1, 1]]], dtype=torch.uint8)
    """
    if isinstance(last, int) and real is None:
        steps = torch.ones(rows, 1, count, dtype=smallest(start - last), device=device)
        steps[:, :, 0] = start - last
        return steps
    if isinstance(last, int):
        last = torch.full((rows, 1), last, dtype=torch.int32, device=device)
    columns = torch.arange(start, start + count, dtype=torch.int32, device=device).expand(rows, last.shape[1], -1)
    return steps_of(columns if real is None else columns.masked_fill(~real[:, None], NOTHING), last)


def smallest(most: int) -> torch.dtype:
    """Return the smallest dtype that takes so large a step."""
    return next(dtype for dtype in DTYPES if most <= torch.iinfo(dtype).max)


def fits(step: int, steps: Tensor) -> bool:
    """Tell whether steps can hold one more, as large as this."""
    return step <= torch.iinfo(steps.dtype).max


def joined(steps: Tensor, more: Tensor, room: int = 0) -> Tensor:
    """Return steps with those of later columns behind them, and room for columns without gaps behind these."""
    heads = max(steps.shape[1], more.shape[1])
    dtype = max((steps.dtype, more.dtype), key=DTYPES.index)
    spare = steps.new_ones(len(steps), heads, room)
    return torch.cat([part.to(dtype).expand(-1, heads, -1) for part in (steps, more, spare)], dim=-1)
