"""Attention by its definition, in blocks of queries: soft-capping, sinks and statistics wherever torch runs.

Works on any device and under autograd. Without gradients the memory is linear in the length, as only a
block of queries is ever seen against all keys. The Triton kernels compute the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hf_ext.attention.structure import AttentionStructure

#: Entries of the matrix that exist at a time when no gradient is needed.
ENTRIES = 2**22


@dataclass(frozen=True)
class Attended:
    """What came of attention; None for what was not asked for.

    Args:
        output: `(rows, heads, queries, width)`.
        lse: `(rows, heads, queries)` float32, the logarithm of the sum over what a query sees and the sink; -inf
            for a query that sees nothing.
        column_sums: `(rows, key heads, keys)` float32, the probability that each key got from all queries of its
            group of heads.
        weights: `(rows, heads, queries, keys)`, the whole matrix.
    """

    output: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    column_sums: torch.Tensor | None = None
    weights: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | AttentionStructure | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    output: bool = True,
    lse: bool = False,
    column_sums: bool = False,
    weights: bool = False,
    entries: int = ENTRIES,
) -> Attended:
    """Let queries attend to keys.

    Args:
        query: `(rows, heads, queries, width)`.
        key: `(rows, key heads, keys, width)`; the heads of queries are a multiple of them.
        value: likewise, of any width.
        mask: `(rows, 1 or heads, queries, keys)`, True where a query sees a key, or added to the scores; or who
            sees whom as a structure.
        causal: query `i` sees keys up to `i`; not together with a mask.
        scale: of the scores; by default one over the root of the width.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask.
        sinks: `(heads,)`, for each head the score of a key that has no value.
        dropout: probability with which weights are dropped.
        output: whether to compute the output.
        lse: whether to return the logarithms of the sums.
        column_sums: whether to return the sums of the columns; without dropout, and without gradients.
        weights: whether to return the matrix.
        entries: how many entries of the matrix may exist at a time where no gradient is needed.

    Example:
        >>> query = torch.zeros(1, 2, 3, 4)
        >>> found = attend(query, query[:, :1], torch.ones(1, 1, 3, 4), causal=True, column_sums=True)
        >>> found.output[0, 0, 0], found.column_sums
        (tensor([1., 1., 1., 1.]), tensor([[[3.6667, 1.6667, 0.6667]]]))
    """
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    tracked = torch.is_grad_enabled() and any(
        isinstance(part, torch.Tensor) and part.requires_grad for part in (query, key, value, sinks, mask)
    )
    step = queries if tracked or torch.compiler.is_compiling() else max(entries // (rows * heads * keys), 1)
    outputs: list[torch.Tensor] = []
    logs: list[torch.Tensor] = []
    matrices: list[torch.Tensor] = []
    sums = query.new_zeros(rows, key_heads, keys, dtype=torch.float32) if column_sums else None
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        grouped = query[:, :, start:stop].reshape(rows, key_heads, -1, width)
        scores = torch.matmul(grouped, key.transpose(2, 3)).view(rows, key_heads, -1, stop - start, keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        part = _part(mask, causal, start, stop, keys, query.device)
        scores, visible = _masked(scores.float(), part)
        if sinks is not None:
            sink = sinks.float().view(1, key_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], dim=-1)
        share = torch.softmax(scores, dim=-1)[..., :keys]
        if sums is not None:
            seen = share.detach() if visible is None else share.detach() * visible
            sums += seen.sum(dim=(2, 3))
        if lse:
            logs.append(_log(scores.detach(), visible, sinks is not None).reshape(rows, heads, -1))
        if output or weights:
            share = torch.nn.functional.dropout(share.to(query.dtype), dropout, training=dropout > 0)
        if weights:
            matrices.append(share.reshape(rows, heads, stop - start, keys))
        if output:
            found = torch.matmul(share.reshape(rows, key_heads, -1, keys), value)
            outputs.append(found.view(rows, heads, stop - start, value.shape[-1]))

    def joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
        return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    return Attended(joined(outputs), joined(logs), sums, joined(matrices))


def _part(
    mask: torch.Tensor | AttentionStructure | None, causal: bool, start: int, stop: int, keys: int, device: torch.device
) -> torch.Tensor | None:
    """Return the mask of the queries from `start` to before `stop`."""
    if isinstance(mask, AttentionStructure):
        return queries_of(mask, start, stop).dense()
    if mask is not None:
        return mask[:, :, start:stop] if mask.shape[2] > 1 else mask
    if causal:
        return (torch.arange(keys, device=device) <= torch.arange(start, stop, device=device)[:, None])[None, None]
    return None


def queries_of(structure: AttentionStructure, start: int, stop: int) -> AttentionStructure:
    """Return a structure of some of the queries and all keys."""
    ancestors = structure.ancestors
    return dataclasses.replace(
        structure,
        queries=structure.queries.map(lambda field: field[:, start:stop]),
        ancestors=None if ancestors is None else ancestors[:, start:stop],
    )


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mask `(rows, key heads, group, queries, keys)` scores; also say who sees whom.

    A query that sees nothing gets even weights, as eager attention gives it: its gradients stay finite.
    """
    if mask is None:
        return scores, None
    heads = mask.shape[1]
    mask = mask[:, :, None] if heads == 1 else mask.view(len(mask), scores.shape[1], -1, *mask.shape[2:])
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, lowest), mask
    return (scores + mask).clamp_min(lowest), mask > torch.finfo(mask.dtype).min / 2


def _log(scores: torch.Tensor, visible: torch.Tensor | None, sinks: bool) -> torch.Tensor:
    log = torch.logsumexp(scores, dim=-1)
    return log if visible is None or sinks else log.masked_fill(~visible.any(-1), -torch.inf)
