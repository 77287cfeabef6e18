"""Attention over packed codes and the recent entries beside them, each read as it is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ext.attention.mode import runs_kernels
from hf_ext.attention.packed import is_packed, unpack
from hf_ext.cache.attending import Given
from hf_ext.cache.stores.packed import PackedStore
from hf_ext.kernels.merge import merge_two
from hf_ext.kernels.packed_native import packed_scores, packed_sums
from hf_ext.kernels.scores import weigh

#: Passes of more queries dequantise a layer for as long as its attention runs, which is quicker for many.
MOST_QUERIES = 16


def reads_codes(store: PackedStore, query: Tensor, given: Given, plain: bool) -> bool:
    """Tell whether a pass reads the codes directly, rather than what a layer holds as plain tensors.

    Args:
        store: of the layer.
        query: `(rows, heads, q, width)`.
        given: what the pass's mask says.
        plain: whether attention has to run on plain tensors, as its weights are returned or dropped at random.
    """
    tracked = torch.is_grad_enabled() and query.requires_grad
    return bool(store.frozen) and query.shape[2] <= MOST_QUERIES and not (plain or given.whole or tracked)


@torch.no_grad()
def attend_packed(
    store: PackedStore,
    query: Tensor,
    given: Given,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    counts: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attend to all that a store holds.

    Args:
        store: with the new tokens stored already, among the recent ones.
        query: `(rows, heads, q, width)`.
        given: what the pass's mask says about the new tokens.
        scale: of the scores.
        softcap: of the scores.
        sinks: `(heads,)`.
        counts: whether it is asked what entries got of the attention.

    Returns:
        `(rows, q, heads, width)`, and `(rows, key heads, recent)` float32, what each recent entry got of the
        attention, or None.
    """
    attend = _by_kernel if runs_kernels(query.device) else _at_once
    out, weights = attend(store, query, given, scale, softcap, sinks)
    return out.to(query.dtype).transpose(1, 2).contiguous(), weights.sum(2).float() if counts else None


def _by_kernel(
    store: PackedStore, query: Tensor, given: Given, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend to packed and to recent entries on their own, and merge what is found."""
    from hf_ext.cache.ops import packed_attention

    rows, heads, count, _ = query.shape
    recent = store.recent
    grouped = _grouped(query, store, scale)
    scores = _capped(grouped @ recent.keys.to(grouped.dtype).mT, softcap)
    if recent.bias is not None:
        scores += recent.bias[:, :, None]
    _hide(scores, _hidden(store, given, count), count)
    weights, lse = weigh(scores)
    found = (weights @ recent.values.to(grouped.dtype)).view(rows, heads, count, -1)
    own = lse.view(rows, heads, count)
    out, whole = packed_attention(
        query, *store.codes(), bits=store.quantisation.bits, scale=scale, softcap=softcap, visible=store.visible(),
        bias=store.packed_bias,
    )  # fmt: skip
    out, whole = merge_two(found, own, out, whole)
    if sinks is not None:
        # A sink takes part in the sum and adds nothing.
        with_sink = torch.logaddexp(whole, sinks.to(whole.dtype)[:, None])
        out, whole = out * (whole - with_sink).exp()[..., None], with_sink
    part = (own - whole.masked_fill(whole.isneginf(), 0)).exp()
    return out, weights * part.view(*grouped.shape[:3], 1)


def _at_once(
    store: PackedStore, query: Tensor, given: Given, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend to packed and recent entries with one softmax, which takes fewer steps."""
    rows, heads, count, _ = query.shape
    recent, frozen, bits = store.recent, store.frozen, store.quantisation.bits
    key_codes, key_scale, key_zero, value_codes, value_scale, value_zero = store.codes()
    grouped = _grouped(query, store, scale)
    keys, values = (found.to(grouped.dtype).flatten(0, 1) for found in (recent.keys, recent.values))
    scores = grouped.new_empty(*grouped.shape[:3], len(store))
    packed, open_ = scores.split([frozen, len(recent)], dim=-1)
    packed_scores(grouped, key_codes, key_scale, key_zero, bits, packed)
    torch.bmm(grouped.flatten(0, 1), keys.mT, out=open_.view(len(keys), *open_.shape[2:]))
    scores = _capped(scores, softcap)
    if store.packed_bias is not None:
        packed += store.packed_bias[:, :, None]
    if recent.bias is not None:
        open_ += recent.bias[:, :, None]
    visible, hidden = store.visible(), _hidden(store, given, count)
    if visible is not None:
        packed.masked_fill_(~visible[:, :, None], -torch.inf)
    _hide(open_, hidden, count)
    weights = scores.softmax(-1)
    if visible is not None or hidden is not None:
        weights.nan_to_num_(nan=0.0)  # of a query that sees nothing
    if sinks is not None:
        # A sink takes part in the sum and adds nothing.
        sink = sinks.to(scores.dtype).repeat_interleave(count).view(1, grouped.shape[1], -1, 1)
        lse = scores.logsumexp(-1, keepdim=True)
        weights *= (lse - torch.logaddexp(lse, sink)).exp()
    packed, open_ = weights.split([frozen, len(recent)], dim=-1)
    out = packed_sums(packed, value_codes, value_scale, value_zero, bits)
    out.view(-1, *out.shape[2:]).baddbmm_(open_.flatten(0, 1), values)
    return out.view(rows, heads, count, -1), open_


def _grouped(query: Tensor, store: PackedStore, scale: float) -> Tensor:
    """Return queries times the scale, `(rows, key heads, lines, width)`: those that see the same keys together."""
    rows, _, _, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return (query.to(wide) * scale).reshape(rows, store.recent.keys.shape[1], -1, width)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hide(scores: Tensor, hidden: Tensor | None, count: int) -> None:
    """Take from the scores of recent entries, `(rows, key heads, lines, recent)`, those that `_hidden` returned."""
    if hidden is None:
        return
    by_query = scores.unflatten(2, (-1, count))
    if hidden.dtype == torch.bool:
        by_query.masked_fill_(hidden, -torch.inf)
    else:
        by_query += hidden


def _hidden(store: PackedStore, given: Given, count: int) -> Tensor | None:
    """Return what the new tokens do not see of the recent entries.

    Returns:
        `(rows or 1, key heads or 1, 1, q, recent)`: bool, True for what is hidden, or added to the scores; None where
        all see all.
    """
    recent = store.recent
    if count == 1 and given.mask is None and not recent.holes:
        return None
    columns = recent.columns
    before = columns.shape[2] - count
    old = (columns[:, :, :before] < 0)[:, :, None, None].expand(-1, -1, -1, count, -1)
    device = columns.device
    if given.mask is None:
        new = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)[None, None]
    elif is_packed(given.mask):
        new = ~unpack(given.mask, count, count).dense()
    else:
        new = given.mask[..., -count:]
        if new.dtype != torch.bool:
            least = torch.finfo(new.dtype).min
            old = torch.zeros(old.shape, dtype=new.dtype, device=device).masked_fill(old, least)
        else:
            new = ~new
    new = new.unflatten(1, (columns.shape[1], -1)) if new.shape[1] > 1 else new[:, :, None]
    rows, heads, groups = (max(a, b) for a, b in zip(old.shape[:3], new.shape[:3], strict=True))
    return torch.cat([part.expand(rows, heads, groups, count, -1) for part in (old, new)], dim=-1)
