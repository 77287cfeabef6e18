"""How much attention each key gets: the sums of the columns of the weights, without the weights.

The second of two passes: `attention` gives the logarithms of the row sums, from which each weight is known by itself.
A program owns some keys of one key head and adds up over queries and over the heads of its group, always in the same
order. Memory is that of the result.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_ext.attention.blocks import KernelArguments, kernel_arguments
from hf_ext.attention.structure import AttentionStructure
from hf_ext.kernels import configs
from hf_ext.kernels.language import Launch, cdiv, check_device, jit, load_rows, power_of_two, product, tl
from hf_ext.kernels.problem import (
    LENGTHS,
    Visibility,
    check_inputs,
    check_kernel,
    check_visibility,
    dense_visibility,
    visibility,
)
from hf_ext.kernels.scores import adjacent, load_lse, scores_reference, strides, tanh, units
from hf_ext.kernels.visibility import block_start, blocks_of_queries, hide, key_fields, query_fields


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    structure: AttentionStructure | KernelArguments | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    last: int | None = None,
) -> torch.Tensor:
    """Return the sums of attention weights over queries and over the query heads of each group.

    It has no gradient.

    Args:
        query: as in `attention`, and so are `key` and the options not named here.
        key: see there.
        lse: `(batch, heads, queries)` float32, from `attention` (with its sinks, if there were any).
        scale: see there.
        softcap: see there.
        structure: see there.
        causal: see there.
        window: see there.
        mask: see there.
        last: count only so many queries, from the end (an observation window); all by default.

    Returns:
        float32 `(batch, key heads, keys)`.

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_kernel(query)
    _check(query, key, lse, scale, softcap, structure, causal, window, mask, last)
    if last is not None and last < query.shape[2]:
        query, lse = query[:, :, -last:], lse[:, :, -last:]
        mask = None if mask is None else mask[:, :, -last:]
        structure = None if structure is None else _last(structure, last)
    seen = visibility(query, key, structure, causal, window, mask)
    return torch.ops.hf_ext.column_sums(
        query.detach(), key.detach(), lse.detach(), seen.tensors, seen.mask, scale, softcap or 0.0,
        seen.causal, seen.window, seen.groups, seen.tree, seen.size,
    )  # fmt: skip


def column_sums_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    structure: AttentionStructure | KernelArguments | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    last: int | None = None,
) -> torch.Tensor:
    """Return what `column_sums` returns, from the whole matrix, in the dtype of the query or at least in float32.

    Example:
        >>> q = torch.zeros(1, 2, 2, 4)
        >>> lse = torch.tensor([1.0, 2.0]).log().expand(1, 2, 2)  # of causal attention
        >>> column_sums_reference(q, q[:, :1], lse, causal=True)
        tensor([[[3., 1.]]])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check(query, key, lse, scale, softcap, structure, causal, window, mask, last)
    scores = scores_reference(query, key, scale, softcap)
    seen, added = dense_visibility(query, key, structure, causal, window, mask)
    scores = scores if added is None else scores + added.to(scores.dtype)
    lse = lse.to(scores.dtype)[..., None]
    weights = (scores - lse.masked_fill(lse.isneginf(), torch.inf)).exp().masked_fill(~seen, 0)
    if last is not None:
        weights = weights[:, :, -last:]
    return weights.sum(2).unflatten(1, (key.shape[1], -1)).sum(2)


def _check(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, scale: float, softcap: float | None,
    structure: AttentionStructure | KernelArguments | None, causal: bool, window: int | None,
    mask: torch.Tensor | None, last: int | None,
) -> None:  # fmt: skip
    check_inputs(query, key, None, None, scale, softcap)
    check_visibility(query, key, structure, causal, window, mask)
    if lse.shape != query.shape[:3] or lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"lse must be float32 of shape {tuple(query.shape[:3])}, as attention returns it, got {lse.dtype} of "
            f"shape {tuple(lse.shape)}"
        )
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1, or None for all queries, got {last}")


def _last(structure: AttentionStructure | KernelArguments, count: int) -> KernelArguments:
    found = structure if isinstance(structure, KernelArguments) else kernel_arguments(structure)
    return found.last(count)


@jit
def _step(
    sums, k, Q, LSE, q_row, start, key_at, of_key, QUERY_FIELDS, ANCESTORS, words, MASK, mask_stride, mask_unit,
    mask_least, query_count, key_count, offset, window, multiplier, inner,
    FULL: tl.constexpr, STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr,
    TREE: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the weights that the block of queries from `start` on gives to some keys."""
    count = query_count - start
    q = load_rows(Q + start.to(tl.int64) * q_row, q_row, count, BLOCK_M, D, PADDED_D, False)
    at = tl.arange(0, BLOCK_M)
    lse = load_lse(LSE + start, at, count)
    scores = product(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    if SOFTCAP:
        scores = tanh(scores * inner)
    if not FULL:
        query_at = start + at[None, :]
        of_query = of_key
        if STRUCTURE:
            of_query = query_fields(QUERY_FIELDS, ANCESTORS, query_at, query_count, WINDOW, GROUPS, TREE)
        scores = hide(
            scores, query_at, key_at, of_query, of_key, query_count, key_count, offset, window, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND,
        )  # fmt: skip
    return sums + tl.sum(tl.exp2(scores * multiplier - lse[None, :]), 1)


@jit(lengths=(*LENGTHS, "lse_batch", "lse_head"))
def _column_sums(
    Q, K, LSE, SUMS, QUERY_FIELDS, KEY_FIELDS, ANCESTORS, INDICES, COUNTS, MASK,
    q_batch, q_head, q_row, k_batch, k_head, k_row, lse_batch, lse_head,
    mask_batch, mask_head, mask_stride, mask_unit, mask_least, words, field_rows, query_count, key_count, offset,
    window, multiplier, inner,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr,
    MASK_KIND: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    key_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    count = key_count - first
    last = tl.minimum(first + BLOCK_N, key_count) - 1
    key_at = first + tl.arange(0, BLOCK_N)[:, None]
    K += batch * k_batch + key_head.to(tl.int64) * k_head + first.to(tl.int64) * k_row
    of_key = (0, 0, 0, 0, 0)
    if STRUCTURE:
        row = batch * field_rows
        QUERY_FIELDS += row * 4 * query_count
        KEY_FIELDS += row * 5 * key_count
        ANCESTORS += row * query_count * words
        line = row * tl.cdiv(key_count, SIZE) + first // SIZE
        INDICES += line * tl.cdiv(query_count, SIZE)
        COUNTS += line * 2
        of_key = key_fields(KEY_FIELDS, key_at, key_count, WINDOW, GROUPS, TREE)
    k = load_rows(K, k_row, count, BLOCK_N, D, PADDED_D, False)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    full, partial, start, full_start, full_end = blocks_of_queries(
        COUNTS, first, last, query_count, offset, window, SIZE, BLOCK_M, STRUCTURE, CAUSAL, WINDOW, MASK_KIND > 0
    )
    for member in range(0, GROUP):
        head = (key_head * GROUP + member).to(tl.int64)
        MASK_HEAD = MASK
        if MASK_KIND:
            MASK_HEAD = MASK + batch * mask_batch + head * mask_head
        Q_HEAD = Q + batch * q_batch + head * q_head
        LSE_HEAD = LSE + batch * lse_batch + head * lse_head
        for step in range(0, full):
            at = block_start(step, INDICES, full, start, full_start, full_end, True, SIZE, BLOCK_M, STRUCTURE)
            sums = _step(
                sums, k, Q_HEAD, LSE_HEAD, q_row, at, key_at, of_key, QUERY_FIELDS, ANCESTORS, words, MASK_HEAD,
                mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner, True,
                STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP, D, PADDED_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        for step in range(0, partial):
            at = block_start(step, INDICES, full, start, full_start, full_end, False, SIZE, BLOCK_M, STRUCTURE)
            sums = _step(
                sums, k, Q_HEAD, LSE_HEAD, q_row, at, key_at, of_key, QUERY_FIELDS, ANCESTORS, words, MASK_HEAD,
                mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner, False,
                STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP, D, PADDED_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    line = (batch * tl.num_programs(1) + key_head) * key_count + first
    place = tl.arange(0, BLOCK_N)
    tl.store(SUMS + line + place, sums, mask=place < count)


def launch_column_sums(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, sums: torch.Tensor, seen: Visibility, scale: float,
    softcap: float, config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel."""
    batch, heads, _, width = query.shape
    config = seen.fit(config)
    inner, multiplier = units(scale, softcap or None)
    arguments = {
        "Q": query, "K": key, "LSE": lse, "SUMS": sums, **strides(q=query, k=key),
        "lse_batch": lse.stride(0), "lse_head": lse.stride(1),
        **seen.arguments(query, key, unit=1.4426950408889634 / multiplier, by_key=True),
        "multiplier": multiplier, "inner": inner, "SOFTCAP": softcap > 0, "GROUP": heads // key.shape[1],
        "D": width, "PADDED_D": power_of_two(width), "BLOCK_M": config.queries, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(_column_sums, (cdiv(key.shape[2], config.keys), key.shape[1], batch), arguments, config)


def _run(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, structure: Sequence[torch.Tensor],
    mask: torch.Tensor | None, scale: float, softcap: float, causal: bool, window: int, groups: bool, tree: int,
    size: int,
) -> torch.Tensor:  # fmt: skip
    check_device(query.device)
    query, key = adjacent(query), adjacent(key)
    sums = key.new_empty(key.shape[:3], dtype=torch.float32)
    seen = Visibility(list(structure), mask, causal, window, groups, tree, size)
    config = configs.choose("column_sums", query.shape[-1], query.dtype, query.device)
    launch_column_sums(query, key, adjacent(lse.float()), sums, seen, scale, softcap, config)()
    return sums


_operator = torch.library.custom_op(
    "hf_ext::column_sums",
    _run,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor lse, Tensor[] structure, Tensor? mask, float scale, float softcap, "
    "bool causal, int window, bool groups, int tree, int size) -> Tensor",
)


@_operator.register_fake
def _(query: torch.Tensor, key: torch.Tensor, *_: Any) -> torch.Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.float32)
