"""How much attention the last queries give to each entry, for policies that score by it."""

from __future__ import annotations

from torch import Tensor

from hf_ext.attention.columns import column_sums
from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import Seen


def received(entries: Entries, seen: Seen) -> Tensor:
    """Return what each entry gets of the queries' attention, averaged over the queries and the heads of its group.

    It is computed in blocks, so that the matrix never exists as a whole.

    Args:
        entries: what the layer holds.
        seen: with queries; those of padding count for nothing.

    Returns:
        `(rows, key heads, n)` float32; each head of a row sums to 1, or to less if the layer has sinks.

    Example:
        >>> import torch
        >>> keys = torch.zeros(1, 1, 4, 2)
        >>> entries = Entries(keys, keys, torch.tensor([[[-1, 0, 1, 2]]], dtype=torch.int32), 3, torch.zeros(1))
        >>> queries = torch.ones(1, 2, 1, 2)
        >>> last = Seen(0, 1, queries, torch.tensor([2]), torch.ones(1, 1, dtype=torch.bool))
        >>> received(entries, last)
        tensor([[[0.0000, 0.3333, 0.3333, 0.3333]]])
    """
    queries, own, real = seen.queries, seen.query_columns, seen.query_real
    assert queries is not None
    assert own is not None
    assert real is not None
    columns, groups = entries.columns, queries.shape[1] // entries.columns.shape[1]
    if columns.shape[1] > 1 and bool((columns == columns[:, :1]).all()):
        columns = columns[:, :1]  # before anything is dropped heads see alike, and one mask does for all
    visible = (columns >= 0)[:, :, None] & (columns[:, :, None] <= own[:, None])
    if seen.window is not None:
        visible = visible & (columns[:, :, None] > (own - seen.window)[:, None])
    visible = visible & real[:, None, :, None]
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(groups, dim=1)
    sums = column_sums(queries, entries.keys, mask=visible, scale=seen.scale, softcap=seen.softcap, sinks=seen.sinks)
    return sums / (groups * real.sum(1).clamp(min=1))[:, None, None]
