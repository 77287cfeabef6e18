"""Attention of few queries over many keys: decoding, and the verification of drafts and trees.

One query leaves most of a device idle if a program goes through all keys. Here keys are split among programs, each of
which leaves its result and the logarithm of its row sums, and a second kernel merges them. The queries of a group of
heads, which share their keys, are worked on together. It has no gradient.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from hf_ext.attention.blocks import KernelArguments
from hf_ext.attention.structure import AttentionStructure
from hf_ext.kernels import configs
from hf_ext.kernels.attention import attention_reference
from hf_ext.kernels.column_sums import column_sums_reference
from hf_ext.kernels.language import Launch, cdiv, check_device, jit, load_rows, power_of_two, product, tl
from hf_ext.kernels.merge import launch_columns, launch_merge
from hf_ext.kernels.problem import LENGTHS, Visibility, check_inputs, check_kernel, visibility
from hf_ext.kernels.scores import adjacent, strides, tanh, units
from hf_ext.kernels.visibility import block_start, blocks_by_table, hide, key_fields, query_fields, ranges_of_keys

#: The kernel takes no more queries; `attention` takes any number.
MOST_QUERIES = 128

Decoded = tuple[torch.Tensor, ...]


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    structure: AttentionStructure | KernelArguments | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    columns: bool = False,
    splits: int | None = None,
) -> Decoded:
    """Return what `attention` returns, for few queries, and on request the sums of the columns of the weights.

    Args:
        query: as in `attention`, at most 128 queries; so are all options not named here.
        key: see there.
        value: see there.
        scale: see there.
        softcap: see there.
        sinks: see there.
        structure: see there.
        causal: see there.
        window: see there.
        mask: see there.
        columns: whether to return the sums of the columns, too; scores are kept for it, one float32 a pair.
        splits: among how many programs the keys are split; by default as many as keep the device busy.

    Returns:
        As `attention`; with `columns` a third, float32 `(batch, key heads, keys)`, as `column_sums`.

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check(query, key, value, sinks, scale, softcap, splits)
    check_kernel(query, value)
    seen = visibility(query, key, structure, causal, window, mask)
    if seen.tensors and query.shape[2] > seen.size:
        raise ValueError(f"decoding {query.shape[2]} queries needs kernel arguments of that size, got {seen.size}")
    out, lse, sums = torch.ops.hf_ext.decode_attention(
        query, key, value, seen.tensors, seen.mask, sinks, scale, softcap or 0.0,
        seen.causal, seen.window, seen.groups, seen.tree, seen.size, columns, splits or 0,
    )  # fmt: skip
    return (out, lse, sums) if columns else (out, lse)


def decode_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    structure: AttentionStructure | KernelArguments | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    columns: bool = False,
    splits: int | None = None,
) -> Decoded:
    """Return what `decode_attention` returns, from the whole matrix; splits change nothing.

    Example:
        >>> q = torch.zeros(1, 1, 1, 4)
        >>> key, value = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
        >>> out, lse, sums = decode_attention_reference(q, key, value, columns=True)
        >>> out[0, 0], sums
        (tensor([[1., 1., 1., 1.]]), tensor([[[0.5000, 0.5000]]]))
    """
    actual = query.shape[-1] ** -0.5 if scale is None else scale
    _check(query, key, value, sinks, actual, softcap, splits)
    seen: dict[str, Any] = {"structure": structure, "causal": causal, "window": window, "mask": mask}
    out, lse = attention_reference(query, key, value, scale=scale, softcap=softcap, sinks=sinks, **seen)
    if not columns:
        return out, lse
    return out, lse, column_sums_reference(query, key, lse, scale=scale, softcap=softcap, **seen)


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, scale: float,
    softcap: float | None, splits: int | None,
) -> None:  # fmt: skip
    check_inputs(query, key, value, sinks, scale, softcap)
    if query.shape[2] > MOST_QUERIES:
        raise ValueError(f"decoding takes at most {MOST_QUERIES} queries, got {query.shape[2]}: use attention")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, or None, got {splits}")


@jit(lengths=(*LENGTHS, "splits"))
def _decode(
    Q, K, V, PARTS, PART_LSE, SCORES, QUERY_FIELDS, KEY_FIELDS, ANCESTORS, INDICES, COUNTS, MASK,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_stride, mask_unit, mask_least, words, field_rows, query_count, key_count, offset,
    window, multiplier, inner, splits,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr,
    MASK_KIND: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    query_at = tl.where(there, place, query_count)[:, None]
    K += batch * k_batch + key_head.to(tl.int64) * k_head
    V += batch * v_batch + key_head.to(tl.int64) * v_head
    of_query = (0, 0, 0, 0, 0)
    start = 0
    if STRUCTURE:
        fields = batch * field_rows
        QUERY_FIELDS += fields * 4 * query_count
        KEY_FIELDS += fields * 5 * key_count
        ANCESTORS += fields * query_count * words
        INDICES += fields * tl.cdiv(key_count, SIZE)
        of_query = query_fields(QUERY_FIELDS, ANCESTORS, query_at, query_count, WINDOW, GROUPS, TREE)
        full, partial, _, _, _ = blocks_by_table(COUNTS + fields * 2, SIZE // BLOCK_N)
        blocks = full + partial
    else:
        start, _, _, end = ranges_of_keys(
            0, query_count - 1, key_count, offset, window, BLOCK_N, CAUSAL, WINDOW, MASK_KIND > 0
        )
        blocks = end - start
    MASK_ROWS = MASK
    if MASK_KIND:
        MASK_ROWS = (MASK + batch * mask_batch + head * mask_head)[:, None]
    column = tl.arange(0, PADDED_D)[None, :]
    at = Q + (batch * q_batch + head * q_head + place.to(tl.int64) * q_row)[:, None] + column
    q = tl.load(at, mask=there[:, None] & (column < D), other=0.0)
    line = (batch * key_heads * GROUP + head) * query_count + place
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DV), tl.float32)
    each = tl.cdiv(blocks, splits)
    for step in range(split * each, tl.minimum((split + 1) * each, blocks)):
        begin = block_start(step, INDICES, 0, start, start, start, True, SIZE, BLOCK_N, STRUCTURE)
        key_at = begin + tl.arange(0, BLOCK_N)[None, :]
        k = load_rows(K + begin.to(tl.int64) * k_row, k_row, key_count - begin, BLOCK_N, D, PADDED_D, False)
        v = load_rows(V + begin.to(tl.int64) * v_row, v_row, key_count - begin, BLOCK_N, DV, PADDED_DV, False)
        scores = product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if SOFTCAP:
            scores = tanh(scores * inner)
        of_key = of_query
        if STRUCTURE:
            of_key = key_fields(KEY_FIELDS, key_at, key_count, WINDOW, GROUPS, TREE)
        scores = hide(
            scores, query_at, key_at, of_query, of_key, query_count, key_count, offset, window, ANCESTORS, words,
            MASK_ROWS, mask_stride, mask_unit, mask_least, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND,
        )  # fmt: skip
        scores = scores * multiplier
        if SCORES is not None:
            tl.store(SCORES + line[:, None] * key_count + key_at, scores, mask=there[:, None] & (key_at < key_count))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = product(weights.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    line = line * splits + split
    column = tl.arange(0, PADDED_DV)[None, :]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(PARTS + line[:, None] * DV + column, acc, mask=there[:, None] & (column < DV))
    tl.store(PART_LSE + line, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=there)


def launch_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: torch.Tensor, part_lse: torch.Tensor,
    scores: torch.Tensor | None, seen: Visibility, scale: float, softcap: float, config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel whose programs see a split of the keys each."""
    batch, heads, queries, width = query.shape
    key_heads = key.shape[1]
    keys = seen.fit(config).keys
    inner, multiplier = units(scale, softcap or None)
    splits = part_lse.shape[-1]
    arguments = {
        "Q": query, "K": key, "V": value, "PARTS": parts, "PART_LSE": part_lse, "SCORES": scores,
        **strides(q=query, k=key, v=value),
        **seen.arguments(query, key, unit=1.4426950408889634 / multiplier),
        "multiplier": multiplier, "inner": inner, "splits": splits, "SOFTCAP": softcap > 0,
        "GROUP": heads // key_heads, "D": width, "DV": value.shape[-1], "PADDED_D": power_of_two(width),
        "PADDED_DV": power_of_two(value.shape[-1]), "BLOCK_M": config.queries, "BLOCK_N": keys,
    }  # fmt: skip
    tiles = cdiv(heads // key_heads * queries, config.queries)
    return Launch(_decode, (splits, tiles * key_heads, batch), arguments, config)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def count_splits(programs: int, keys: int, block: int, device: torch.device) -> int:
    """Return among how many programs keys are split, given how many there are without.

    Enough for two programs a processor, each of which has at least four blocks of keys to see.
    """
    wanted = 3 if device.type != "cuda" else cdiv(2 * _processors(device.index or 0), programs)
    return max(1, min(wanted, cdiv(keys, 4 * block), 128))


def _run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, structure: Sequence[torch.Tensor],
    mask: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float, causal: bool, window: int,
    groups: bool, tree: int, size: int, columns: bool, splits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device(query.device)
    query, key, value = adjacent(query), adjacent(key), adjacent(value)
    out, lse, sums = _results(query, key, value, columns)
    seen = Visibility(list(structure), mask, causal, window, groups, tree, size)
    batch, heads, queries, width = query.shape
    rows = heads // key.shape[1] * queries
    config = configs.choose("decode", max(width, value.shape[-1]), query.dtype, query.device, rows)
    programs = batch * key.shape[1] * cdiv(rows, config.queries)
    splits = splits or count_splits(programs, key.shape[2], config.keys, query.device)
    parts = query.new_empty(batch, heads, queries, splits, value.shape[-1], dtype=torch.float32)
    part_lse = query.new_empty(batch, heads, queries, splits, dtype=torch.float32)
    shape = (batch, heads, queries, key.shape[2])
    scores = query.new_full(shape, -torch.inf, dtype=torch.float32) if columns else None
    launch_decode(query, key, value, parts, part_lse, scores, seen, scale, softcap, config)()
    launch_merge(parts, part_lse, sinks, out, lse)()
    if scores is not None:
        launch_columns(scores, lse, sums)()
    return out, lse, sums


def _results(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for the results."""
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    return out, lse, key.new_empty(key.shape[:3] if columns else (0,), dtype=torch.float32)


_operator = torch.library.custom_op(
    "hf_ext::decode_attention",
    _run,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor[] structure, Tensor? mask, Tensor? sinks, float scale, "
    "float softcap, bool causal, int window, bool groups, int tree, int size, bool columns, int splits) "
    "-> (Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(query, key, value, others[-2])
