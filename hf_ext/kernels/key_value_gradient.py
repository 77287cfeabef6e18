"""The gradients of key and value of attention; `attention_backward` says the formulas, and has the reference.

A program owns some keys of one key head, and adds up over the query heads of its group.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.language import Launch, cdiv, jit, load_rows, power_of_two, product, store_rows, tl
from hf_ext.kernels.problem import LENGTHS, Visibility
from hf_ext.kernels.scores import load_lse, strides, tanh, units
from hf_ext.kernels.visibility import block_start, blocks_of_queries, hide, key_fields, query_fields


@jit
def _step(
    grad_k, grad_v, k, v, Q, GRAD_OUT, LSE, ROWS, q_row, grad_row, start, key_at, of_key, QUERY_FIELDS, ANCESTORS,
    words, MASK, mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
    FULL: tl.constexpr, STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr,
    TREE: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what the block of queries from `start` on contributes to the gradients of some keys and values."""
    count = query_count - start
    q = load_rows(Q + start.to(tl.int64) * q_row, q_row, count, BLOCK_M, D, PADDED_D, False)
    grad = load_rows(GRAD_OUT + start.to(tl.int64) * grad_row, grad_row, count, BLOCK_M, DV, PADDED_DV, False)
    at = tl.arange(0, BLOCK_M)
    lse = load_lse(LSE + start, at, count)
    rows = tl.load(ROWS + start + at, mask=at < count, other=0.0)
    scores = product(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    slope = 1.0
    if SOFTCAP:
        scores = tanh(scores * inner)
        slope = 1.0 - scores * scores
    if not FULL:
        query_at = start + at[None, :]
        of_query = of_key
        if STRUCTURE:
            of_query = query_fields(QUERY_FIELDS, ANCESTORS, query_at, query_count, WINDOW, GROUPS, TREE)
        scores = hide(
            scores, query_at, key_at, of_query, of_key, query_count, key_count, offset, window, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND,
        )  # fmt: skip
    weights = tl.exp2(scores * multiplier - lse[None, :])
    grad_v = product(weights.to(grad.dtype), grad, grad_v)
    grad_weights = product(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    grad_scores = weights * (grad_weights - rows[None, :])
    if SOFTCAP:
        grad_scores = grad_scores * slope
    return product(grad_scores.to(q.dtype), q, grad_k), grad_v


@jit(lengths=LENGTHS)
def _gradient(
    Q, K, V, GRAD_OUT, LSE, ROWS, GRAD_K, GRAD_V, QUERY_FIELDS, KEY_FIELDS, ANCESTORS, INDICES, COUNTS, MASK,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    grad_k_batch, grad_k_head, grad_k_row, grad_v_batch, grad_v_head, grad_v_row,
    mask_batch, mask_head, mask_stride, mask_unit, mask_least, words, field_rows, query_count, key_count, offset,
    window, multiplier, inner, scale,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr,
    MASK_KIND: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    key_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    count = key_count - first
    last = tl.minimum(first + BLOCK_N, key_count) - 1
    key_at = first + tl.arange(0, BLOCK_N)[:, None]
    K += batch * k_batch + key_head.to(tl.int64) * k_head + first.to(tl.int64) * k_row
    V += batch * v_batch + key_head.to(tl.int64) * v_head + first.to(tl.int64) * v_row
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
    # Keys behind the last are zeros: what comes out for them is not stored, and touches no other key.
    k = load_rows(K, k_row, count, BLOCK_N, D, PADDED_D, False)
    v = load_rows(V, v_row, count, BLOCK_N, DV, PADDED_DV, False)
    grad_k = tl.zeros((BLOCK_N, PADDED_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, PADDED_DV), tl.float32)
    full, partial, start, full_start, full_end = blocks_of_queries(
        COUNTS, first, last, query_count, offset, window, SIZE, BLOCK_M, STRUCTURE, CAUSAL, WINDOW, MASK_KIND > 0
    )
    for member in range(0, GROUP):
        head = (key_head * GROUP + member).to(tl.int64)
        line = (batch * tl.num_programs(1) * GROUP + head) * query_count
        MASK_HEAD = MASK
        if MASK_KIND:
            MASK_HEAD = MASK + batch * mask_batch + head * mask_head
        Q_HEAD = Q + batch * q_batch + head * q_head
        GRAD_HEAD = GRAD_OUT + batch * grad_batch + head * grad_head
        for step in range(0, full):
            at = block_start(step, INDICES, full, start, full_start, full_end, True, SIZE, BLOCK_M, STRUCTURE)
            grad_k, grad_v = _step(
                grad_k, grad_v, k, v, Q_HEAD, GRAD_HEAD, LSE + line, ROWS + line, q_row, grad_row, at, key_at, of_key,
                QUERY_FIELDS, ANCESTORS, words, MASK_HEAD, mask_stride, mask_unit, mask_least, query_count, key_count,
                offset, window, multiplier, inner, True, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP,
                D, DV, PADDED_D, PADDED_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        for step in range(0, partial):
            at = block_start(step, INDICES, full, start, full_start, full_end, False, SIZE, BLOCK_M, STRUCTURE)
            grad_k, grad_v = _step(
                grad_k, grad_v, k, v, Q_HEAD, GRAD_HEAD, LSE + line, ROWS + line, q_row, grad_row, at, key_at, of_key,
                QUERY_FIELDS, ANCESTORS, words, MASK_HEAD, mask_stride, mask_unit, mask_least, query_count, key_count,
                offset, window, multiplier, inner, False, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP,
                D, DV, PADDED_D, PADDED_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    GRAD_K += batch * grad_k_batch + key_head.to(tl.int64) * grad_k_head + first.to(tl.int64) * grad_k_row
    GRAD_V += batch * grad_v_batch + key_head.to(tl.int64) * grad_v_head + first.to(tl.int64) * grad_v_row
    store_rows(GRAD_K, grad_k * scale, grad_k_row, count, BLOCK_N, D, PADDED_D)
    store_rows(GRAD_V, grad_v, grad_v_row, count, BLOCK_N, DV, PADDED_DV)


def launch_key_value_gradient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor, lse: torch.Tensor,
    rows: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, seen: Visibility, scale: float,
    softcap: float, config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel that goes by keys."""
    batch, heads, _, width = query.shape
    config = seen.fit(config)
    inner, multiplier = units(scale, softcap or None)
    arguments = {
        "Q": query, "K": key, "V": value, "GRAD_OUT": grad_out, "LSE": lse, "ROWS": rows,
        "GRAD_K": grad_key, "GRAD_V": grad_value,
        **strides(q=query, k=key, v=value, grad=grad_out, grad_k=grad_key, grad_v=grad_value),
        **seen.arguments(query, key, unit=1.4426950408889634 / multiplier, by_key=True),
        "multiplier": multiplier, "inner": inner, "scale": scale, "SOFTCAP": softcap > 0,
        "GROUP": heads // key.shape[1], "D": width, "DV": value.shape[-1], "PADDED_D": power_of_two(width),
        "PADDED_DV": power_of_two(value.shape[-1]), "BLOCK_M": config.queries, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(_gradient, (cdiv(key.shape[2], config.keys), key.shape[1], batch), arguments, config)
