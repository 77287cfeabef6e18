"""How much each key gets of the attention of all queries, on a CPU: no output, and no matrix.

    scores of a block of queries -> exponentials -> one product with the reciprocals of their sums

Blocks are small enough to stay in the processor's cache, and end where a causal mask ends. `exact.attend` is the
definition; on a GPU `hf_ext.kernels.column_sums` does this.
"""

from __future__ import annotations

import torch

#: Scores that exist at a time: a MiB in float32.
ENTRIES = 2**18


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    entries: int = ENTRIES,
) -> torch.Tensor:
    """Return the probability that each key gets from all queries of its group of heads.

    Args:
        query: `(rows, heads, queries, width)`.
        key: `(rows, key heads, keys, width)`; the heads of queries are a multiple of them.
        mask: `(rows or 1, 1 or heads, queries or 1, keys)`, True where a query sees a key, or added to the scores.
        causal: query `i` sees keys up to `i`; not together with a mask.
        scale: of the scores; by default one over the root of the width.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask.
        sinks: `(heads,)`, for each head the score of a key that has no value.
        entries: how many scores may exist at a time.

    Returns:
        `(rows, key heads, keys)` float32. A query that sees nothing gives nothing.

    Example:
        >>> query = torch.zeros(1, 2, 3, 4)
        >>> column_sums(query, query[:, :1], causal=True)
        tensor([[[3.6667, 1.6667, 0.6667]]])
    """
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    group = heads // key_heads
    scale = width**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    sums = query.new_zeros(rows, key_heads, keys, dtype=torch.float32)
    grouped = query.unflatten(1, (key_heads, group))
    if mask is not None:
        mask = mask.expand(rows, heads if mask.shape[1] > 1 else 1, queries, keys)
        mask = mask.unflatten(1, (key_heads, group)) if mask.shape[1] > 1 else mask[:, :, None]
    least = torch.finfo(wide).min

    def add(row: slice, head: slice, start: int, stop: int, seen: int) -> None:
        """Add what the queries from `start` to before `stop` give to the first `seen` keys."""
        part = grouped[row, head, :, start:stop]
        scores = torch.matmul(part.flatten(2, 3), key[row, head, :seen].transpose(2, 3))
        scores = scores.to(wide).unflatten(2, part.shape[2:4]).mul_(scale)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            block = mask[row, head if mask.shape[1] > 1 else slice(None), :, start:stop, :seen]
            if block.dtype == torch.bool:
                scores.masked_fill_(~block, -torch.inf)
            else:
                scores += block
                scores.masked_fill_(block <= torch.finfo(block.dtype).min / 2, -torch.inf)
        elif causal:
            later = torch.ones(stop - start, seen - start, dtype=torch.bool, device=query.device).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp_min_(least)
        if sinks is not None:
            sink = sinks.to(wide).view(key_heads, group)[head, :, None, None]
            top = torch.maximum(top, sink)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1)
        if sinks is not None:
            total = total + (sink - top)[..., 0].exp()
        share = total.reciprocal_().masked_fill_(total.isinf(), 0)
        sums[row, head, :seen] += torch.matmul(share.flatten(2, 3).unsqueeze(2), weights.flatten(2, 3))[:, :, 0].float()

    everything = slice(None)
    if rows * heads * queries * keys <= entries:
        add(everything, everything, 0, queries, keys)
        return sums
    step = max(entries // (group * keys), 1)
    for row in range(rows):
        for head in range(key_heads):
            for start in range(0, queries, step):
                stop = min(start + step, queries)
                seen = min(stop, keys) if causal else keys
                add(slice(row, row + 1), slice(head, head + 1), start, stop, seen)
    return sums
