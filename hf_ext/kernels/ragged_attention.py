"""Attention over caches whose heads keep different numbers of entries.

Entries of all rows and heads lie side by side, `(slots, width)`; a row's head has those from its start on, as many as
its length. Nothing is padded: a head that keeps a tenth takes a tenth of the memory and of the work.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.decode_attention import count_splits
from hf_ext.kernels.language import Launch, cdiv, check_device, jit, load_rows, power_of_two, product, tl
from hf_ext.kernels.merge import launch_merge
from hf_ext.kernels.problem import check_kernel
from hf_ext.kernels.scores import adjacent, tanh, units, weigh

#: `ragged_attention_torch` has so many scores at a time: 64 MB of them.
LARGEST = 2**24


def ragged_attention(
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
    """Return attention of each row's heads over their own entries, and the logarithm of the row sums.

    The last entries of a segment are the queries' own: the last query sees all entries, the one before all but the
    last, and so on. Each segment is split among as many programs as any other, so the longest one decides. There is
    no gradient.

    Args:
        query: `(rows, heads, queries, width)`, float16, bfloat16 or float32, width up to 256.
        keys: `(slots, width)`, entries of all rows and key heads.
        values: `(slots, value width)`.
        starts: `(rows, key heads)` int32 or int64, where the entries of each begin; heads are a multiple of key heads,
            and go by groups side by side.
        lengths: `(rows, key heads)`, how many there are.
        scale: of the products of query and key; `width ** -0.5` by default.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `(heads,)` scores that take part in each row's softmax without a value.
        bias: `(slots,)` added to the scores of each entry: the logarithm of how many entries were merged into it.

    Returns:
        `(rows, heads, queries, value width)` in the dtype of the query, and float32 `(rows, heads, queries)`. A query
        that sees nothing is 0, and minus infinity (or its sink).

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check(query, keys, values, starts, lengths, scale, softcap, sinks, bias)
    check_kernel(query, values)
    return torch.ops.hf_ext.ragged_attention(query, keys, values, starts, lengths, sinks, bias, scale, softcap or 0.0)


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
    queries = query.shape[2]
    longest = int(lengths.max()) if lengths.numel() else 0
    few = max(LARGEST // max(query.shape[0] * query.shape[1] * longest, 1), 1)
    parts = []
    for first in range(0, queries, few):
        last = min(first + few, queries)
        # Without the queries behind them, and the entries of those, some queries are the last ones.
        sizes = (lengths - (queries - last)).clamp_min(0).tolist()
        parts.append(
            _some(query[:, :, first:last], keys, values, starts.tolist(), sizes, longest, scale, softcap, sinks, bias)
        )
    out, lse = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
    return out, lse


def ragged_decode_torch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, *,
    scale: float, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return what `ragged_attention` returns first, for one query and nothing that decoding mostly does without.

    Args:
        query: `(rows, heads, 1, width)`; this and what follows as for `ragged_attention`.
        keys: see there.
        values: see there.
        starts: see there.
        lengths: see there.
        scale: see there.
        bias: see there.

    Example:
        >>> query, keys, values = torch.zeros(1, 2, 1, 4), torch.zeros(3, 4), torch.eye(3)
        >>> found = ragged_decode_torch(query, keys, values, torch.tensor([[0, 2]]), torch.tensor([[2, 1]]), scale=1.0)
        >>> found[0, :, 0].tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    rows, heads, _, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scale).reshape(starts.numel(), -1, width)
    out = grouped.new_empty(*grouped.shape[:2], values.shape[-1])
    segments = zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True)
    for (start, length), lines, found in zip(segments, grouped, out, strict=True):
        segment = slice(start, start + length)
        scores = torch.mm(lines, keys[segment].to(wide).T)
        if bias is not None:
            scores += bias[segment].to(wide)
        torch.mm(scores.softmax(-1), values[segment].to(wide), out=found)
    return out.view(rows, heads, 1, -1).to(query.dtype)


def _some(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: list[list[int]], lengths: list[list[int]],
    longest: int, scale: float, softcap: float | None, sinks: torch.Tensor | None, bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend with so few queries that all scores have room."""
    rows, heads, count, width = query.shape
    key_heads = len(starts[0]) if rows else 1
    lines = heads // key_heads * count
    wide = torch.promote_types(query.dtype, torch.float32)
    # The queries of a group of heads share their segment and are multiplied together.
    grouped = (query.to(wide) * scale).reshape(rows * key_heads, lines, width)
    segments = [
        slice(start, start + length)
        for places, sizes in zip(starts, lengths, strict=True)
        for start, length in zip(places, sizes, strict=True)
    ]
    sizes = [segment.stop - segment.start for segment in segments]
    even = min(sizes, default=0) == longest
    shape = (len(segments), lines, longest)
    scores = grouped.new_empty(shape) if even else grouped.new_full(shape, -torch.inf)
    for segment, size, rows_of_query, found in zip(segments, sizes, grouped, scores, strict=True):
        torch.mm(rows_of_query, keys[segment].to(wide).T, out=found[:, :size])
        if bias is not None and softcap is None:
            found[:, :size] += bias[segment].to(wide)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
        for segment, size, found in zip(segments, sizes, scores, strict=True):
            found[:, size:] = -torch.inf
            if bias is not None:
                found[:, :size] += bias[segment].to(wide)
    if count > 1:
        hidden = torch.ones(count, count - 1, dtype=torch.bool, device=query.device).triu()
        hidden = hidden.repeat(heads // key_heads, 1)
        for size, found in zip(sizes, scores, strict=True):
            tail = min(size, count - 1)
            found[:, size - tail : size].masked_fill_(hidden[:, count - 1 - tail :], -torch.inf)
    lse = scores.new_full((*shape[:2], 1), -torch.inf)
    out = grouped.new_zeros(*shape[:2], values.shape[-1])
    if longest:
        weights, lse = weigh(scores)
        for segment, size, given, found in zip(segments, sizes, weights, out, strict=True):
            torch.mm(given[:, :size], values[segment].to(wide), out=found)
    lse = lse.view(rows, heads, count)
    out = out.view(rows, heads, count, -1)
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(wide)[:, None])
        out = out * (lse - whole).exp()[..., None]
        lse = whole
    return out.to(query.dtype), lse


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


@jit(lengths=("query_count", "splits"))
def _ragged(
    Q, K, V, STARTS, LENGTHS, BIAS, PARTS, PART_LSE, q_batch, q_head, q_row, k_row, v_row, query_count, multiplier,
    inner, bias_unit, splits, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    tiles = tl.cdiv(GROUP * query_count, BLOCK_M)
    key_head = tl.program_id(1) // tiles
    key_heads = tl.num_programs(1) // tiles
    batch = tl.program_id(2).to(tl.int64)
    # A row is a query of a head: all queries of the group's first head, then those of the next.
    row = (tl.program_id(1) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < GROUP * query_count
    head = (key_head * GROUP + row // query_count).to(tl.int64)
    place = row % query_count
    segment = batch * key_heads + key_head
    first = tl.load(STARTS + segment).to(tl.int64)
    length = tl.load(LENGTHS + segment).to(tl.int32)
    # From here on a query sees nothing.
    reach = (length - (query_count - 1) + place)[:, None]
    column = tl.arange(0, PADDED_D)[None, :]
    at = Q + (batch * q_batch + head * q_head + place.to(tl.int64) * q_row)[:, None] + column
    q = tl.load(at, mask=there[:, None] & (column < D), other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DV), tl.float32)
    blocks = tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(blocks, splits)
    for step in range(split * each, tl.minimum((split + 1) * each, blocks)):
        begin = step * BLOCK_N
        key_at = begin + tl.arange(0, BLOCK_N)[None, :]
        k = load_rows(K + (first + begin) * k_row, k_row, length - begin, BLOCK_N, D, PADDED_D, False)
        v = load_rows(V + (first + begin) * v_row, v_row, length - begin, BLOCK_N, DV, PADDED_DV, False)
        scores = product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if SOFTCAP:
            scores = tanh(scores * inner)
        if BIAS is not None:
            scores += tl.load(BIAS + first + key_at, mask=key_at < length, other=0.0).to(tl.float32) * bias_unit
        scores = tl.where(key_at < reach, scores, float("-inf")) * multiplier
        new_top = tl.maximum(top, tl.max(scores, 1))
        # The top of a row that has seen nothing yet is minus infinity, which would subtract to NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = product(weights.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    line = ((batch * key_heads * GROUP + head) * query_count + place) * splits + split
    column = tl.arange(0, PADDED_DV)[None, :]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(PARTS + line[:, None] * DV + column, acc, mask=there[:, None] & (column < DV))
    tl.store(PART_LSE + line, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=there)


def launch_ragged(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor,
    bias: torch.Tensor | None, parts: torch.Tensor, part_lse: torch.Tensor, scale: float, softcap: float,
    config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel whose programs see a split of a segment each."""
    rows, heads, queries, width = query.shape
    key_heads = starts.shape[1]
    inner, multiplier = units(scale, softcap or None)
    splits = part_lse.shape[-1]
    arguments = {
        "Q": query, "K": keys, "V": values, "STARTS": starts, "LENGTHS": lengths, "BIAS": bias, "PARTS": parts,
        "PART_LSE": part_lse, "q_batch": query.stride(0), "q_head": query.stride(1), "q_row": query.stride(2),
        "k_row": keys.stride(0), "v_row": values.stride(0), "query_count": queries, "multiplier": multiplier,
        "inner": inner, "bias_unit": 1.4426950408889634 / multiplier, "splits": splits, "SOFTCAP": softcap > 0,
        "GROUP": heads // key_heads, "D": width, "DV": values.shape[-1], "PADDED_D": power_of_two(width),
        "PADDED_DV": power_of_two(values.shape[-1]), "BLOCK_M": config.queries, "BLOCK_N": config.keys,
    }  # fmt: skip
    tiles = cdiv(heads // key_heads * queries, config.queries)
    return Launch(_ragged, (splits, tiles * key_heads, rows), arguments, config)


def _run(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor,
    sinks: torch.Tensor | None, bias: torch.Tensor | None, scale: float, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device(query.device)
    query, keys, values = adjacent(query), adjacent(keys), adjacent(values)
    out, lse = _results(query, values)
    rows, heads, queries, width = query.shape
    segments = max(starts.numel(), 1)
    lines = heads // starts.shape[1] * queries
    config = configs.choose("ragged", max(width, values.shape[-1]), query.dtype, query.device, lines)
    # How long the longest segment is, only the device knows: twice the mean is a guess that costs little.
    longest = 2 * cdiv(len(keys), segments)
    splits = count_splits(segments * cdiv(lines, config.queries), longest, config.keys, query.device)
    parts = query.new_empty(rows, heads, queries, splits, values.shape[-1], dtype=torch.float32)
    part_lse = query.new_empty(rows, heads, queries, splits, dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    launch_ragged(
        query, keys, values, starts.contiguous(), lengths.contiguous(), bias, parts, part_lse, scale, softcap, config
    )()
    launch_merge(parts, part_lse, sinks, out, lse)()
    return out, lse


def _results(query: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for the results; heads of a token lie side by side, as models go on with them."""
    rows, heads, queries, _ = query.shape
    out = query.new_empty(rows, queries, heads, values.shape[-1]).transpose(1, 2)
    return out, query.new_empty(rows, heads, queries, dtype=torch.float32)


_operator = torch.library.custom_op(
    "hf_ext::ragged_attention",
    _run,
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor starts, Tensor lengths, Tensor? sinks, Tensor? bias, "
    "float scale, float softcap) -> (Tensor, Tensor)",
)


@_operator.register_fake
def _(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(query, values)
