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
    return _go_through(query, key, None, mask, causal, scale, softcap, sinks, entries)[1]


@torch.no_grad()
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    entries: int = ENTRIES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what attention gives, and `column_sums`, going through the scores once.

    Args:
        query: as in `column_sums`; so are all options not named here.
        key: see there.
        value: `(rows, key heads, keys, value width)`.
        mask: see there.
        causal: see there.
        scale: see there.
        softcap: see there.
        sinks: see there.
        entries: see there.

    Returns:
        `(rows, heads, queries, value width)` in the query's dtype, 0 for a query that sees nothing; and the sums.

    Example:
        >>> query = torch.zeros(1, 2, 3, 4)
        >>> output, sums = attend(query, query[:, :1], torch.ones(1, 1, 3, 4), causal=True)
        >>> output[0, 0, 0], sums
        (tensor([1., 1., 1., 1.]), tensor([[[3.6667, 1.6667, 0.6667]]]))
    """
    output, sums = _go_through(query, key, value, mask, causal, scale, softcap, sinks, entries)
    assert output is not None
    return output, sums


def _go_through(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    entries: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Go through the scores in blocks; return the output, if there are values, and the sums of the columns."""
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    group = heads // key_heads
    scale = width**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    sums = query.new_zeros(rows, key_heads, keys, dtype=torch.float32)
    # The queries of a group of heads see the same keys and are multiplied together.
    grouped = (query.to(wide) * scale).unflatten(1, (key_heads, group))
    key = key.to(wide)
    output = None
    if value is not None:
        value = value.to(wide)
        output = query.new_empty(rows, key_heads, group, queries, value.shape[-1])
    if mask is not None:
        mask = mask.expand(rows, heads if mask.shape[1] > 1 else 1, queries, keys)
        mask = mask.unflatten(1, (key_heads, group)) if mask.shape[1] > 1 else mask[:, :, None]
    least = torch.finfo(wide).min

    def add(row: slice, head: slice, start: int, stop: int, seen: int) -> None:
        """Add what the queries from `start` to before `stop` give to the first `seen` keys."""
        part = grouped[row, head, :, start:stop]
        flat = torch.matmul(part.flatten(2, 3), key[row, head, :seen].transpose(2, 3))
        scores = flat.unflatten(2, part.shape[2:4])
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
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
        if mask is None and sinks is None:  # every query sees something, and one step does for the weights
            weights = flat.softmax(-1)
            ones = weights.new_ones(*weights.shape[:2], 1, weights.shape[2])
            sums[row, head, :seen] += torch.matmul(ones, weights)[:, :, 0].float()
            if output is not None and value is not None:
                found = torch.matmul(weights, value[row, head, :seen])
                output[row, head, :, start:stop] = found.unflatten(2, part.shape[2:4]).to(output.dtype)
            return
        top = flat.amax(-1, keepdim=True).clamp_min_(least)
        if sinks is not None:
            sink = (
                sinks.to(wide).view(key_heads, group)[head, :, None].expand(-1, -1, stop - start).flatten(1)[..., None]
            )
            top = torch.maximum(top, sink)
        weights = flat.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sink - top).exp()
        share = total.reciprocal_().masked_fill_(total.isinf(), 0)
        sums[row, head, :seen] += torch.matmul(share.transpose(2, 3), weights)[:, :, 0].float()
        if output is not None and value is not None:
            found = torch.matmul(weights, value[row, head, :seen]).mul_(share)
            output[row, head, :, start:stop] = found.unflatten(2, part.shape[2:4]).to(output.dtype)

    everything = slice(None)
    if rows * heads * queries * keys <= entries:
        add(everything, everything, 0, queries, keys)
    else:
        step = max(entries // (group * keys), 1)
        for row in range(rows):
            for head in range(key_heads):
                for start in range(0, queries, step):
                    stop = min(start + step, queries)
                    seen = min(stop, keys) if causal else keys
                    add(slice(row, row + 1), slice(head, head + 1), start, stop, seen)
    return None if output is None else output.flatten(1, 2), sums
