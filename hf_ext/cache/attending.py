"""Attention over what a layer of a compressed cache holds, with the mask that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hf_ext.attention.mode import runs_kernels
from hf_ext.attention.packed import is_packed, pack, unpack
from hf_ext.attention.structure import NEVER, AttentionStructure, Tokens
from hf_ext.cache.stores.dense import DenseStore
from hf_ext.cache.stores.packed import PackedStore
from hf_ext.cache.stores.ragged import RaggedStore

if TYPE_CHECKING:
    from hf_ext.cache.layer import CompressedLayer
    from hf_ext.cache.passes import Pass
    from hf_ext.cache.policy import Seen


@dataclass(frozen=True)
class Given:
    """What the mask of a pass says about its new tokens.

    Args:
        mask: as the model was given it: None (each sees what is before it), dense, or a packed structure.
        real: `(rows, q)` bool, False for padding; None if there is none.
        whole: whether the mask is about all columns, rather than the new ones alone.
    """

    mask: Tensor | None
    real: Tensor | None
    whole: bool = False

    @classmethod
    def of(cls, mask: Tensor | None, seen: int, query: Tensor) -> Given:
        """Read a mask.

        Args:
            mask: see above.
            seen: tokens before the pass.
            query: `(rows, heads, q, width)`.

        Raises:
            ValueError: it is about other tokens than the pass and the cache.
        """
        if mask is None:
            return cls(None, None)
        rows, _, count, _ = query.shape
        if is_packed(mask):
            structure = unpack(mask, count, count)
            real = structure.keys.order != NEVER
        else:
            if mask.shape[-1] not in (count, seen + count):
                raise ValueError(
                    f"the mask is about {mask.shape[-1]} keys; a compressed cache takes one about the {count} new "
                    f"tokens or about all {seen + count} columns"
                )
            new = mask[..., -count:]
            square = new.expand(*new.shape[:2], count, count)
            own = square.diagonal(dim1=-2, dim2=-1)[:, 0]
            real = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        real = real.expand(rows, -1)
        whole = not is_packed(mask) and seen > 0 and mask.shape[-1] == seen + count
        return cls(mask, None if bool(real.all()) else real, whole)


def visible(layer: CompressedLayer, given: Given, before: int, query: Tensor) -> Tensor | None:
    """Return the mask of a pass over all that is held, the new tokens included.

    Args:
        layer: with the new tokens stored already.
        given: what the pass's mask says.
        before: entries held before the pass.
        query: `(rows, heads, q, width)`.

    Returns:
        None where nothing is hidden but what comes later; a dense mask `(rows, 1 or heads, q, n)`, bool, or added to
        the scores where entries carry a bias; on a GPU a packed structure, if one can say it.
    """
    store, count = layer.store, query.shape[2]
    if before == 0:  # the new tokens alone, of which none has a bias yet
        return given.mask
    bias = store.bias  # type: ignore[union-attr]
    windowed = layer.window is not None
    if count == 1 and not store.holes and bias is None and not windowed and not given.whole and given.real is None:
        return None
    plain = bias is None and not windowed and not given.whole and count > 1 and not layer.policy.gated
    if plain and (given.mask is None or is_packed(given.mask)) and runs_kernels(query.device):
        return _packed(layer, given, before, query)
    columns = store.columns  # type: ignore[union-attr]
    kept, real = columns[:, :, :before], columns[:, :, :before] >= 0
    device = query.device
    if given.whole:
        assert given.mask is not None
        whole = given.mask.expand(len(kept), -1, count, -1)
        wide = whole.expand(-1, max(kept.shape[1], whole.shape[1]), -1, -1)
        groups = wide.shape[1] // kept.shape[1]
        at = kept.clamp(min=0).long().repeat_interleave(groups, dim=1)[:, :, None].expand(-1, -1, count, -1)
        old = wide.gather(3, at)
        old = _and(old, real.repeat_interleave(groups, dim=1)[:, :, None])
        new = wide[..., -count:]
    else:
        old = real[:, :1, None].expand(-1, -1, count, -1)
        if windowed:
            assert layer.window is not None
            own = torch.arange(layer.seen - count, layer.seen, device=device)
            old = real[:, :, None] & (kept[:, :, None] > (own - layer.window)[:, None])
        if given.mask is None:
            new = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None, None]
        elif is_packed(given.mask):
            new = unpack(given.mask, count, count).dense()
        else:
            new = given.mask
    heads = max(old.shape[1], new.shape[1])
    old, new = _heads(old, heads), _heads(new, heads)
    if new.dtype != old.dtype:
        old = torch.zeros(old.shape, dtype=new.dtype, device=device).masked_fill(~old, torch.finfo(new.dtype).min)
    mask = torch.cat([old, new.expand(len(old), -1, count, -1)], dim=-1)
    if bias is not None:
        added = bias.repeat_interleave(query.shape[1] // bias.shape[1], dim=1)[:, :, None].to(query.dtype)
        mask = _heads(mask, query.shape[1])
        least = torch.finfo(query.dtype).min
        mask = torch.where(mask, added, least) if mask.dtype == torch.bool else (mask + added).clamp(min=least)
    return mask if mask.shape[1] == 1 else _heads(mask, query.shape[1])


def gated(layer: CompressedLayer, mask: Tensor | None, given: Given, query: Tensor, module: nn.Module) -> Tensor:
    """Return the mask of a pass with what the policy's gate hides besides, and note what the gate says of entries.

    Args:
        layer: with the new tokens stored already.
        mask: what `visible` returned.
        given: what the pass's mask says.
        query: `(rows, heads, q, width)`.
        module: the attention layer.
    """
    entries, count = layer.entries(), query.shape[2]
    columns = torch.arange(layer.seen - count, layer.seen, device=query.device)
    told = layer.cache.seen_of(layer, query_columns=columns, query_real=given.real, module=module)
    gate, fields = layer.policy.gate(entries, told)
    layer.store.note(fields)
    return hide(mask, ~gate, query, entries.keys)


def hide(mask: Tensor | None, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask that hides more than the given one.

    Args:
        mask: None (each query sees what is before it), dense, or a packed structure.
        hidden: `(rows, 1 or heads, q, n)` bool, True for what is to be hidden.
        query: `(rows, heads, q, width)`.
        key: `(rows, key heads, n, width)`.

    Returns:
        Dense: bool, or added to the scores if the given one was.
    """
    if mask is not None and not is_packed(mask) and mask.is_floating_point():
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    from hf_ext.attention.intercept import visible as as_bool

    return as_bool(mask, query, key) & ~hidden


def _heads(mask: Tensor, heads: int) -> Tensor:
    """Return a mask with so many heads; neighbouring heads share those of a key head."""
    return mask if mask.shape[1] == heads else mask.repeat_interleave(heads // mask.shape[1], dim=1)


def _and(mask: Tensor, real: Tensor) -> Tensor:
    return mask & real if mask.dtype == torch.bool else mask.masked_fill(~real, torch.finfo(mask.dtype).min)


def _packed(layer: CompressedLayer, given: Given, before: int, query: Tensor) -> Tensor:
    """Return the mask as a packed structure: what was held before stands in front of the first new token."""
    rows, _, count, _ = query.shape
    device = query.device
    if given.mask is None:
        structure = AttentionStructure.causal(torch.ones(1, count, dtype=torch.int64, device=device))
    else:
        structure = unpack(given.mask, count, count)
    held = layer.store.columns[:, 0, :before]  # type: ignore[union-attr]

    def beside(new: Tensor, old: Tensor) -> Tensor:
        return torch.cat([old.to(torch.int32).expand(rows, before), new.expand(rows, -1)], dim=1)

    zero = torch.zeros(1, 1, dtype=torch.int32, device=device)
    new = structure.keys
    keys = Tokens(
        order=beside(new.order, torch.where(held >= 0, -1, NEVER)),
        position=beside(new.position, zero),
        group=None if new.group is None else beside(new.group, zero),
        segment=None if new.segment is None else beside(new.segment, zero),
    )
    nodes = None if structure.nodes is None else beside(structure.nodes, zero - 1)
    return pack(dataclasses.replace(structure, keys=keys, nodes=nodes))


def sees_all(layer: CompressedLayer, given: Given, query: Tensor) -> bool:
    """Tell whether a pass is of one query that sees all of a plain store on a CPU, so that `attend_one` is enough."""
    store = layer.store
    plain = isinstance(store, DenseStore) and not store.holes and layer.window is None and not layer.policy.gated
    masked = given.mask is not None or runs_kernels(query.device)
    return plain and query.shape[2] == 1 and not masked and not (torch.is_grad_enabled() and query.requires_grad)


@torch.no_grad()
def attend_one(
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    query: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend with one query to all that is held, and count the attention it gets: in a few steps, on a CPU.

    Args:
        keys: `(rows, key heads, n, width)`.
        values: `(rows, key heads, n, value width)`.
        bias: `(rows, key heads, n)`, added to the scores.
        query: `(rows, heads, 1, width)`.
        scale: of the scores.
        softcap: of the scores.
        sinks: `(heads,)`.

    Returns:
        `(rows, 1, heads, width)`, and what each entry got, `(rows, key heads, n)` float32.
    """
    rows, heads, _, width = query.shape
    key_heads = keys.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    # The heads of a group see the same keys and are multiplied together.
    grouped = (query.to(wide) * scale).view(rows * key_heads, -1, width)
    transposed = keys.to(wide).flatten(0, 1).mT
    if bias is not None and softcap is None:
        scores = torch.baddbmm(bias.to(wide).flatten(0, 1)[:, None], grouped, transposed)
    else:
        scores = torch.bmm(grouped, transposed)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            scores += bias.flatten(0, 1)[:, None]
    if sinks is None:
        weights = scores.softmax(-1)
    else:  # a sink takes part in the sum and adds nothing
        sink = sinks.to(wide).view(1, key_heads, -1, 1).expand(rows, -1, -1, -1).flatten(0, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    output = torch.bmm(weights, values.to(wide).flatten(0, 1)).view(rows, 1, heads, -1)
    return output.to(query.dtype), weights.sum(1).view(rows, key_heads, -1).float()


def attend_ragged_one(store: RaggedStore, query: Tensor, scale: float) -> Tensor:
    """Attend with one query to entries of which each head has its own number: on a CPU, head by head.

    Args:
        store: with the new token stored already.
        query: `(rows, heads, 1, width)`.
        scale: of the scores.

    Returns:
        `(rows, 1, heads, width)`.
    """
    rows, heads, _, width = query.shape
    keys, values = store.buffers["keys"], store.buffers["values"]
    value_width = values.shape[-1]
    segments = store.segments()
    lines = query.reshape(len(segments), 1, -1, 1, width)
    found = []
    for (start, length), line in zip(segments, lines, strict=True):
        key = keys.as_strided((1, 1, length, width), (0, 0, width, 1), keys.storage_offset() + start * width)
        value = values.as_strided(
            (1, 1, length, value_width), (0, 0, value_width, 1), values.storage_offset() + start * value_width
        )
        found.append(scaled_dot_product_attention(line, key, value, scale=scale, enable_gqa=True))
    return torch.stack(found).view(rows, 1, heads, -1)


def attend_ragged(
    layer: CompressedLayer,
    query: Tensor,
    given: Given,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend to entries of which each head has its own number.

    Args:
        layer: with the new tokens stored already.
        query: `(rows, heads, q, width)`.
        given: what the pass's mask says.
        scale: of the scores.
        softcap: of the scores.
        sinks: `(heads,)`.

    Returns:
        `(rows, q, heads, width)`.

    Raises:
        ValueError: a mask that says more than who came first.
    """
    from hf_ext.cache.ops import ragged_attention

    count = query.shape[2]
    if given.whole or (given.mask is not None and count > 1 and not _is_causal(given, count)):
        raise ValueError(
            f"{type(layer.policy).__name__} keeps other tokens in every head, which goes with causal attention and "
            "padding on the left alone; use a policy that stores all heads alike for structured prompts"
        )
    store: Any = layer.store
    tracked = torch.is_grad_enabled() and query.requires_grad
    if count == 1 and softcap is None and sinks is None and not (tracked or runs_kernels(query.device)):
        from hf_ext.kernels.ragged_attention import ragged_decode_torch

        output = ragged_decode_torch(
            query, store.buffers["keys"], store.buffers["values"], store.starts, store.lengths, scale=scale,
            bias=store.buffers.get("bias"),
        )  # fmt: skip
        return output.transpose(1, 2)
    from hf_ext.kernels.ragged_attention import ragged_attention_reference

    output, _ = (ragged_attention_reference if tracked else ragged_attention)(  # what is quick has no gradients
        query, store.buffers["keys"], store.buffers["values"], store.starts, store.lengths,
        scale=scale, softcap=softcap, sinks=sinks, bias=store.buffers.get("bias"),
    )  # fmt: skip
    return output.transpose(1, 2).contiguous()


def _is_causal(given: Given, count: int) -> bool:
    """Tell whether a mask of the new tokens hides what comes later and padding on the left, and nothing else."""
    assert given.mask is not None
    mask = unpack(given.mask, count, count).dense() if is_packed(given.mask) else given.mask
    if mask.dtype != torch.bool:
        mask = mask == 0
    real = mask.diagonal(dim1=-2, dim2=-1)
    sorted_left = bool((real[..., 1:] >= real[..., :-1]).all())
    wanted = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril() & real[..., None, :]
    rows = real[..., :, None]  # what padding sees does not matter
    return sorted_left and bool(((mask == wanted) | ~rows).all())


def counted(layer: CompressedLayer, passes: Sequence[Pass]) -> Tensor:
    """Return how much attention the passes paid to each entry that the policy may still drop.

    Args:
        layer: with the tokens of the passes stored.
        passes: since the last time, oldest first.

    Returns:
        `(rows, key heads, n)` float32.
    """
    sums = passes[-1].column_sums if len(passes) == 1 else None
    if sums is None:
        sums = _column_sums(layer, passes)
    # Packed entries are no matter of the policy's.
    return sums[..., sums.shape[-1] - len(layer.store.recent) :] if isinstance(layer.store, PackedStore) else sums


def seen(layer: CompressedLayer, passes: Sequence[Pass], sums: Tensor | None) -> Seen:
    """Return what the passes tell the policy.

    Args:
        layer: with the tokens of the passes stored.
        passes: since the last time, oldest first.
        sums: what `counted` returned, if the policy wants it.
    """
    policy = layer.policy
    last = passes[-1]
    queries = real = columns = None
    if policy.queries:
        parts = [step.queries for step in passes if step.queries is not None]
        marks = [step.real for step in passes if step.queries is not None]
        if layer.queries is not None and policy.queries > 0:
            parts, marks = [layer.queries, *parts], [layer.query_real, *marks]
        counts = [part.shape[2] for part in parts]
        queries = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        rows, device = len(queries), queries.device
        real = torch.cat(
            [torch.ones(rows, n, dtype=torch.bool, device=device) if mark is None else mark
             for n, mark in zip(counts, marks, strict=True)], dim=1,
        )  # fmt: skip
        if policy.queries > 0:
            queries, real = queries[:, :, -policy.queries :], real[:, -policy.queries :]
            if policy.when != "prefill" and policy.queries > 1:
                layer.queries, layer.query_real = queries.clone(), real
        columns = torch.arange(layer.seen - queries.shape[2], layer.seen, device=device)
    return layer.cache.seen_of(
        layer, queries=queries, query_columns=columns, query_real=real, column_sums=sums, scale=last.scale,
        softcap=last.softcap, module=last.module, sinks=last.sinks,
    )  # fmt: skip


def _column_sums(layer: CompressedLayer, passes: Sequence[Pass]) -> Tensor:
    """Return what the entries got of the attention of the passes' queries, which see what is not later than they."""
    from hf_ext.attention.columns import column_sums

    entries = layer.entries()
    queries = [step.queries for step in passes if step.queries is not None]
    query = torch.cat(queries, dim=2)
    own = torch.arange(layer.seen - query.shape[2], layer.seen, device=query.device)
    mask = entries.real[:, :, None] & (entries.columns[:, :, None] <= own[:, None])
    if layer.window is not None:
        mask &= entries.columns[:, :, None] > (own - layer.window)[:, None]
    if layer.policy.biased:
        bias = entries.fields["bias"][:, :, None].to(query.dtype)
        mask = torch.where(mask, bias, torch.finfo(query.dtype).min)
    groups = query.shape[1] // entries.keys.shape[1]
    with torch.no_grad():
        return column_sums(
            query, entries.keys, mask=mask.repeat_interleave(groups, dim=1), scale=passes[-1].scale,
            softcap=passes[-1].softcap, sinks=passes[-1].sinks,
        )  # fmt: skip
