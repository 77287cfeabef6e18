"""The gradient of the query of attention; `attention_backward` says the formulas, and has the reference."""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.language import Launch, cdiv, jit, load_rows, power_of_two, product, store_rows, tl
from hf_ext.kernels.problem import LENGTHS, Visibility
from hf_ext.kernels.scores import load_lse, strides, tanh, units
from hf_ext.kernels.visibility import block_start, blocks_of_keys, hide, key_fields, query_fields


@jit
def _step(
    acc, q, grad, lse, rows, K, V, k_row, v_row, start, query_at, of_query, KEY_FIELDS, ANCESTORS, words, MASK,
    mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
    FULL: tl.constexpr, STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr,
    TREE: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what the block of keys from `start` on contributes to the gradient of some queries."""
    k = load_rows(K + start.to(tl.int64) * k_row, k_row, key_count - start, BLOCK_N, D, PADDED_D, FULL)
    v = load_rows(V + start.to(tl.int64) * v_row, v_row, key_count - start, BLOCK_N, DV, PADDED_DV, FULL)
    scores = product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    slope = 1.0
    if SOFTCAP:
        scores = tanh(scores * inner)
        slope = 1.0 - scores * scores
    if not FULL:
        key_at = start + tl.arange(0, BLOCK_N)[None, :]
        of_key = of_query
        if STRUCTURE:
            of_key = key_fields(KEY_FIELDS, key_at, key_count, WINDOW, GROUPS, TREE)
        scores = hide(
            scores, query_at, key_at, of_query, of_key, query_count, key_count, offset, window, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND,
        )  # fmt: skip
    weights = tl.exp2(scores * multiplier - lse[:, None])
    grad_weights = product(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    grad_scores = weights * (grad_weights - rows[:, None])
    if SOFTCAP:
        grad_scores = grad_scores * slope
    return product(grad_scores.to(k.dtype), k, acc)


@jit(lengths=LENGTHS)
def _gradient(
    Q, K, V, GRAD_OUT, LSE, ROWS, GRAD_Q, QUERY_FIELDS, KEY_FIELDS, ANCESTORS, INDICES, COUNTS, MASK,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    grad_q_batch, grad_q_head, grad_q_row,
    mask_batch, mask_head, mask_stride, mask_unit, mask_least, words, field_rows, query_count, key_count, offset,
    window, multiplier, inner, scale,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr,
    MASK_KIND: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    count = query_count - first
    last = tl.minimum(first + BLOCK_M, query_count) - 1
    query_at = first + tl.arange(0, BLOCK_M)[:, None]
    Q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
    GRAD_OUT += batch * grad_batch + head.to(tl.int64) * grad_head + first.to(tl.int64) * grad_row
    K += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    V += batch * v_batch + (head // GROUP).to(tl.int64) * v_head
    of_query = (0, 0, 0, 0, 0)
    if STRUCTURE:
        row = batch * field_rows
        QUERY_FIELDS += row * 4 * query_count
        KEY_FIELDS += row * 5 * key_count
        ANCESTORS += row * query_count * words
        line = row * tl.cdiv(query_count, SIZE) + first // SIZE
        INDICES += line * tl.cdiv(key_count, SIZE)
        COUNTS += line * 2
        of_query = query_fields(QUERY_FIELDS, ANCESTORS, query_at, query_count, WINDOW, GROUPS, TREE)
    if MASK_KIND:
        MASK += batch * mask_batch + head.to(tl.int64) * mask_head
    line = (batch * tl.num_programs(1) + head) * query_count + first
    place = tl.arange(0, BLOCK_M)
    lse = load_lse(LSE + line, place, count)
    rows = tl.load(ROWS + line + place, mask=place < count, other=0.0)
    q = load_rows(Q, q_row, count, BLOCK_M, D, PADDED_D, False)
    grad = load_rows(GRAD_OUT, grad_row, count, BLOCK_M, DV, PADDED_DV, False)
    acc = tl.zeros((BLOCK_M, PADDED_D), tl.float32)
    full, partial, start, full_start, full_end = blocks_of_keys(
        COUNTS, first, last, key_count, offset, window, SIZE, BLOCK_N, STRUCTURE, CAUSAL, WINDOW, MASK_KIND > 0
    )
    for step in range(0, full):
        at = block_start(step, INDICES, full, start, full_start, full_end, True, SIZE, BLOCK_N, STRUCTURE)
        acc = _step(
            acc, q, grad, lse, rows, K, V, k_row, v_row, at, query_at, of_query, KEY_FIELDS, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
            True, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP, D, DV, PADDED_D, PADDED_DV, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    for step in range(0, partial):
        at = block_start(step, INDICES, full, start, full_start, full_end, False, SIZE, BLOCK_N, STRUCTURE)
        acc = _step(
            acc, q, grad, lse, rows, K, V, k_row, v_row, at, query_at, of_query, KEY_FIELDS, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
            False, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP, D, DV, PADDED_D, PADDED_DV, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    GRAD_Q += batch * grad_q_batch + head.to(tl.int64) * grad_q_head + first.to(tl.int64) * grad_q_row
    store_rows(GRAD_Q, acc * scale, grad_q_row, count, BLOCK_M, D, PADDED_D)


def launch_query_gradient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor, lse: torch.Tensor,
    rows: torch.Tensor, grad_query: torch.Tensor, seen: Visibility, scale: float, softcap: float,
    config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel that goes by queries."""
    batch, heads, queries, width = query.shape
    config = seen.fit(config)
    inner, multiplier = units(scale, softcap or None)
    arguments = {
        "Q": query, "K": key, "V": value, "GRAD_OUT": grad_out, "LSE": lse, "ROWS": rows, "GRAD_Q": grad_query,
        **strides(q=query, k=key, v=value, grad=grad_out, grad_q=grad_query),
        **seen.arguments(query, key, unit=1.4426950408889634 / multiplier),
        "multiplier": multiplier, "inner": inner, "scale": scale, "SOFTCAP": softcap > 0,
        "GROUP": heads // key.shape[1], "D": width, "DV": value.shape[-1], "PADDED_D": power_of_two(width),
        "PADDED_DV": power_of_two(value.shape[-1]), "BLOCK_M": config.queries, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(_gradient, (cdiv(queries, config.queries), heads, batch), arguments, config)
