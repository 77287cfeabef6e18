"""Attention step by step, for methods that look at scores or probabilities, or change them.

`scores` and `attended` together are what a model's eager attention does: scaling, soft-capping,
grouped heads and learned sinks as the layer's own call says. Their inputs may have any leading
dimensions; heads stand before tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scores(query: Tensor, key: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the scores of all pairs, before any mask.

    Args:
        query: `(..., heads, queries, width)`.
        key: `(..., key heads, keys, width)`; consecutive heads share one.
        call: the keyword arguments of the layer's call: `scaling` and `softcap` are followed.

    Returns:
        `(..., heads, queries, keys)`.

    Raises:
        ValueError: the layer adds something to the scores that is not known here.

    Example:
        >>> scores(torch.ones(4, 2, 8), torch.ones(2, 3, 8), {"scaling": 0.5}).shape
        torch.Size([4, 2, 3])
    """
    if call.get("position_bias") is not None:
        raise ValueError("the model adds position biases to its scores, which cannot be moved to other positions")
    scaling, softcap = call.get("scaling"), call.get("softcap")
    shared = query.unflatten(-3, (key.shape[-3], -1)).flatten(-3, -2)
    found = (shared @ key.transpose(-1, -2)).unflatten(-2, (-1, query.shape[-2])).flatten(-4, -3)
    found = found * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def probabilities(found: Tensor, seen: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the probabilities of what each query sees, in float32 at least.

    Args:
        found: `(..., heads, queries, keys)` scores.
        seen: bool, broadcasts to the scores; a query that sees nothing looks everywhere alike.
        call: as in `scores`: a learned sink of each head (`s_aux`) takes its share.
    """
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    found = found.masked_fill(~seen, torch.finfo(found.dtype).min)
    sinks = call.get("s_aux")
    if sinks is None:
        return found.softmax(-1)
    column = sinks.to(found)[:, None, None].expand(*found.shape[:-1], 1)
    return torch.cat([found, column], dim=-1).softmax(-1)[..., :-1]


def attended(weights: Tensor, value: Tensor) -> Tensor:
    """Return values weighted by probabilities.

    Args:
        weights: `(..., heads, queries, keys)`.
        value: `(..., key heads, keys, width)`.

    Returns:
        `(..., queries, heads, width)`, as attention functions of transformers return it.
    """
    shared = weights.to(value.dtype).unflatten(-3, (value.shape[-3], -1)).flatten(-3, -2)
    found = (shared @ value).unflatten(-2, (-1, weights.shape[-2])).flatten(-4, -3)
    return found.transpose(-2, -3).contiguous()
