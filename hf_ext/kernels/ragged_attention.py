"""Attention over caches whose heads keep different numbers of entries.

Entries of all rows and heads lie side by side, `(slots, width)`; a row's head has those from its start on, as many as
its length. Nothing is padded: a head that keeps a tenth takes a tenth of the memory and of the work.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch


def ragged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `ragged_attention` returns, by its definition: every segment padded to the longest.

    Example:
        >>> query, keys, values = torch.zeros(1, 2, 1, 4), torch.zeros(3, 4), torch.eye(3)
        >>> out, lse = ragged_attention_reference(query, keys, values, torch.tensor([[0, 2]]), torch.tensor([[2, 1]]))
        >>> out[0, :, 0].tolist(), lse.exp().flatten().tolist()
        ([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [2.0, 1.0])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check(query, keys, values, starts, lengths, scale, softcap, sinks, bias)
    wide = torch.promote_types(query.dtype, torch.float32)
    group, count = query.shape[1] // starts.shape[1], query.shape[2]
    place = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=query.device)
    # (rows, heads, 1, longest); what is behind a segment is hidden below, and any slot will do for it.
    at = torch.where(place < lengths[..., None], starts[..., None] + place, 0).repeat_interleave(group, 1)
    scores = query.to(wide) @ keys[at].to(wide).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias[at].to(wide)[:, :, None]
    behind = torch.arange(count, device=query.device) - (count - 1)
    reach = lengths.repeat_interleave(group, 1)[..., None] + behind
    scores = scores.masked_fill(place >= reach[..., None], -torch.inf)
    empty = (reach <= 0)[..., None]
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[:, None, None])
    weights = (scores - lse.masked_fill(empty, 0)).exp().masked_fill(empty, 0)
    return (weights @ values[at].to(wide)).to(query.dtype), lse[..., 0]


def ragged_attention_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `ragged_attention` returns, segment by segment: what a CPU does quickest.

    Segments are views, so nothing is gathered or padded. Where they lie is looked at on the host.

    Example:
        >>> query, keys, values = torch.zeros(1, 2, 1, 4), torch.zeros(3, 4), torch.eye(3)
        >>> out, lse = ragged_attention_torch(query, keys, values, torch.tensor([[0, 2]]), torch.tensor([[2, 1]]))
        >>> out[0, :, 0].tolist(), lse.exp().flatten().tolist()
        ([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [2.0, 1.0])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check(query, keys, values, starts, lengths, scale, softcap, sinks, bias)
    rows, heads, count, width = query.shape
    key_heads = starts.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    # The queries of a group of heads share their segment and are multiplied together.
    grouped = (query.to(wide) * scale).reshape(rows, key_heads, heads // key_heads * count, width)
    out = grouped.new_zeros(*grouped.shape[:3], values.shape[-1])
    lse = grouped.new_full(grouped.shape[:3], -torch.inf)
    hidden = torch.ones(count, count - 1, dtype=torch.bool, device=query.device).triu()
    hidden = hidden.repeat(heads // key_heads, 1)
    sink = None if sinks is None else sinks.to(wide).repeat_interleave(count).view(key_heads, -1)
    for row, (places, sizes) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for head, (start, size) in enumerate(zip(places, sizes, strict=True)):
            if not size:
                continue
            segment = slice(start, start + size)
            scores = grouped[row, head] @ keys[segment].to(wide).T
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            if bias is not None:
                scores += bias[segment].to(wide)
            if count > 1:
                tail = min(size, count - 1)
                scores[:, size - tail :].masked_fill_(hidden[:, count - 1 - tail :], -torch.inf)
            top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1)
            out[row, head] = weights @ values[segment].to(wide) / total.masked_fill(total == 0, 1)[:, None]
            lse[row, head] = total.log() + top[:, 0]
    if sink is not None:
        whole = torch.logaddexp(lse, sink)
        out *= (lse - whole).exp()[..., None]
        lse = whole
    return out.view(rows, heads, count, -1).to(query.dtype), lse.view(rows, heads, count)


def _check(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor,
    scale: float, softcap: float | None, sinks: torch.Tensor | None, bias: torch.Tensor | None,
) -> None:  # fmt: skip
    if query.ndim != 4 or keys.ndim != 2 or values.ndim != 2 or query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            "query must be (rows, heads, queries, width), keys (slots, width) and values (slots, value width), got "
            f"{tuple(query.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"query, keys and values must have one dtype, got {query.dtype}, {keys.dtype}, {values.dtype}")
    fits = starts.ndim == 2 and starts.shape == lengths.shape and len(starts) == len(query)
    if not fits or not starts.shape[1] or query.shape[1] % starts.shape[1]:
        raise ValueError(
            f"starts and lengths must be ({len(query)}, key heads), the query's {query.shape[1]} heads a multiple of "
            f"them, got {tuple(starts.shape)} and {tuple(lengths.shape)}"
        )
    for name, tensor in {"starts": starts, "lengths": lengths}.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be whole numbers, got {tensor.dtype}")
    if len(keys) != len(values) or (bias is not None and bias.shape != keys.shape[:1]):
        raise ValueError(
            f"keys, values and bias must have the same slots, got {len(keys)}, {len(values)}"
            + ("" if bias is None else f" and {tuple(bias.shape)}")
        )
    if sinks is not None and (sinks.shape != query.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be {query.shape[1]} numbers, one a head, got {tuple(sinks.shape)}")
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0, or None, got {softcap}")
