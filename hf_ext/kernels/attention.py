"""Attention in one pass over the keys, with all that stock models and structures ask of it.

`attention_reference` is the definition. `attention` computes the same on a GPU without the matrix of scores, as the
operator `hf_ext::attention`, which has gradients (see `attention_backward`) and passes through
`torch.compile(fullgraph=True)`.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_ext.attention.blocks import KernelArguments
from hf_ext.attention.structure import AttentionStructure
from hf_ext.kernels import attention_backward, configs
from hf_ext.kernels.language import (
    LN_2,
    LOG2_E,
    Launch,
    cdiv,
    check_device,
    jit,
    load_rows,
    power_of_two,
    product,
    store_rows,
    tl,
)
from hf_ext.kernels.problem import LENGTHS, Visibility, check_inputs, check_kernel, dense_visibility, visibility
from hf_ext.kernels.scores import adjacent, scores_reference, strides, tanh, units
from hf_ext.kernels.visibility import block_start, blocks_of_keys, hide, key_fields, query_fields


def attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention and the logarithm of the sum of the exponentials of each row.

    All inputs may have any strides, as long as the numbers of a head are adjacent; the result lies in memory as
    `(batch, queries, heads, width)`.

    Args:
        query: `(batch, heads, queries, width)`, float16, bfloat16 or float32, width up to 256.
        key: `(batch, key heads, keys, width)`; heads are a multiple of key heads, and go by groups side by side.
        value: `(batch, key heads, keys, value width)`.
        scale: of the products of query and key; `width ** -0.5` by default.
        softcap: scores become `softcap * tanh(scores / softcap)` before anything is masked.
        sinks: `(heads,)` scores that take part in each row's softmax without a value.
        structure: who sees whom. Its kernel arguments spare the work of making them in every layer.
        causal: the last query sees all keys, the one before all but one, and so on.
        window: with `causal`, a query sees this many keys, itself among them.
        mask: `(batch or 1, heads or 1, queries, keys)`, bool (True is seen) or added to the scores (the least number
            of its dtype hides).

    Returns:
        `(batch, heads, queries, value width)` in the dtype of the query, and float32 `(batch, heads, queries)`. A row
        that sees nothing is 0, and minus infinity (or its sink).

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_inputs(query, key, value, sinks, scale, softcap)
    check_kernel(query, value)
    seen = visibility(query, key, structure, causal, window, mask)
    return torch.ops.hf_ext.attention(
        query, key, value, seen.tensors, seen.mask, sinks, scale, softcap or 0.0,
        seen.causal, seen.window, seen.groups, seen.tree, seen.size,
    )  # fmt: skip


def attention_reference(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `attention` returns, by its definition: any dtype, any width, any device, the whole matrix.

    float16 and bfloat16 are computed in float32.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> out, lse = attention_reference(q, q[:, :1], torch.eye(3, 4)[None, None], causal=True)
        >>> out[0, 0]
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.3333, 0.3333, 0.3333, 0.0000]])
        >>> lse[0, 0].exp()
        tensor([1., 2., 3.])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_inputs(query, key, value, sinks, scale, softcap)
    scores = scores_reference(query, key, scale, softcap)
    seen, added = dense_visibility(query, key, structure, causal, window, mask)
    scores = scores if added is None else scores + added.to(scores.dtype)
    empty = ~seen.any(-1, keepdim=True)
    # A row of nothing but minus infinity has no gradient: it is computed in full and thrown away.
    scores = scores.masked_fill(~(seen | empty), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
    weights = (scores - lse.masked_fill(empty, 0)).exp().masked_fill(empty, 0)
    out = weights @ value.to(weights.dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return out.to(query.dtype), lse[..., 0]


@jit
def _step(
    acc, total, top, q, K, V, k_row, v_row, start, query_at, of_query, KEY_FIELDS, ANCESTORS, words, MASK, mask_stride,
    mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
    FULL: tl.constexpr, STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr,
    TREE: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Let some queries see the block of keys from `start` on."""
    k = load_rows(K + start.to(tl.int64) * k_row, k_row, key_count - start, BLOCK_N, D, PADDED_D, FULL)
    scores = product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if SOFTCAP:
        scores = tanh(scores * inner)
    if not FULL:
        key_at = start + tl.arange(0, BLOCK_N)[None, :]
        of_key = of_query
        if STRUCTURE:
            of_key = key_fields(KEY_FIELDS, key_at, key_count, WINDOW, GROUPS, TREE)
        scores = hide(
            scores, query_at, key_at, of_query, of_key, query_count, key_count, offset, window, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND,
        )  # fmt: skip
    new_top = tl.maximum(top, tl.max(scores, 1) * multiplier)
    # The top of a row that has seen nothing yet is minus infinity, which would subtract to NaN.
    base = new_top if FULL else tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * multiplier - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    v = load_rows(V + start.to(tl.int64) * v_row, v_row, key_count - start, BLOCK_N, DV, PADDED_DV, FULL)
    acc = product(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, new_top


@jit(lengths=LENGTHS)
def _forward(
    Q, K, V, SINKS, OUT, LSE, QUERY_FIELDS, KEY_FIELDS, ANCESTORS, INDICES, COUNTS, MASK,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    mask_batch, mask_head, mask_stride, mask_unit, mask_least, words, field_rows, query_count, key_count, offset,
    window, multiplier, inner,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr,
    MASK_KIND: tl.constexpr, SIZE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Late queries see most: they go first, so that the last programs to finish are short ones.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    count = query_count - first
    last = tl.minimum(first + BLOCK_M, query_count) - 1
    query_at = first + tl.arange(0, BLOCK_M)[:, None]
    Q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
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
    q = load_rows(Q, q_row, count, BLOCK_M, D, PADDED_D, False)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DV), tl.float32)
    full, partial, start, full_start, full_end = blocks_of_keys(
        COUNTS, first, last, key_count, offset, window, SIZE, BLOCK_N, STRUCTURE, CAUSAL, WINDOW, MASK_KIND > 0
    )
    for step in range(0, full):
        at = block_start(step, INDICES, full, start, full_start, full_end, True, SIZE, BLOCK_N, STRUCTURE)
        acc, total, top = _step(
            acc, total, top, q, K, V, k_row, v_row, at, query_at, of_query, KEY_FIELDS, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
            True, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP, D, DV, PADDED_D, PADDED_DV, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    for step in range(0, partial):
        at = block_start(step, INDICES, full, start, full_start, full_end, False, SIZE, BLOCK_N, STRUCTURE)
        acc, total, top = _step(
            acc, total, top, q, K, V, k_row, v_row, at, query_at, of_query, KEY_FIELDS, ANCESTORS, words, MASK,
            mask_stride, mask_unit, mask_least, query_count, key_count, offset, window, multiplier, inner,
            False, STRUCTURE, CAUSAL, WINDOW, GROUPS, TREE, MASK_KIND, SOFTCAP, D, DV, PADDED_D, PADDED_DV, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        acc = acc * shrink[:, None]
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = tl.where(total > 0, (top + tl.log2(total)) * LN_2, float("-inf"))
    OUT += batch * out_batch + head.to(tl.int64) * out_head + first.to(tl.int64) * out_row
    store_rows(OUT, acc, out_row, count, BLOCK_M, DV, PADDED_DV)
    line = (batch * tl.num_programs(1) + head) * query_count + first
    place = tl.arange(0, BLOCK_M)
    tl.store(LSE + line + place, lse, mask=place < count)


def launch_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    seen: Visibility, sinks: torch.Tensor | None, scale: float, softcap: float, config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the forward kernel."""
    batch, heads, queries, width = query.shape
    config = seen.fit(config)
    inner, multiplier = units(scale, softcap or None)
    arguments = {
        "Q": query, "K": key, "V": value, "SINKS": sinks, "OUT": out, "LSE": lse,
        **strides(q=query, k=key, v=value, out=out),
        **seen.arguments(query, key, unit=1.4426950408889634 / multiplier),
        "multiplier": multiplier, "inner": inner, "SOFTCAP": softcap > 0, "GROUP": heads // key.shape[1],
        "D": width, "DV": value.shape[-1], "PADDED_D": power_of_two(width),
        "PADDED_DV": power_of_two(value.shape[-1]), "BLOCK_M": config.queries, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(_forward, (cdiv(queries, config.queries), heads, batch), arguments, config)


def _results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for the results."""
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, queries, dtype=torch.float32)


def _run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, structure: Sequence[torch.Tensor],
    mask: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float, causal: bool, window: int,
    groups: bool, tree: int, size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device(query.device)
    query, key, value = adjacent(query), adjacent(key), adjacent(value)
    out, lse = _results(query, value)
    seen = Visibility(list(structure), mask, causal, window, groups, tree, size)
    width = max(query.shape[-1], value.shape[-1])
    config = configs.choose("forward", width, query.dtype, query.device, query.shape[2])
    launch_forward(query, key, value, out, lse, seen, sinks, scale, softcap, config)()
    return out, lse


_SEEN = "bool causal, int window, bool groups, int tree, int size"
_operator = torch.library.custom_op(
    "hf_ext::attention",
    _run,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor[] structure, Tensor? mask, Tensor? sinks, float scale, "
    f"float softcap, {_SEEN}) -> (Tensor, Tensor)",
)


@_operator.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(query, value)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, structure, mask, sinks, *ctx.numbers = inputs
    ctx.pieces = len(structure)
    ctx.save_for_backward(query, key, value, mask, sinks, *output, *structure)


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, mask, sinks, out, lse, *structure = ctx.saved_tensors
    grad_query, grad_key, grad_value, products = attention_backward.operator(
        grad_out, grad_lse, query, key, value, out, lse, structure, mask, *ctx.numbers
    )
    grad_sinks = None
    if sinks is not None:
        # A sink is a key without a value: its share of the row, times nothing less the row's product.
        share = (sinks.float()[:, None] - lse).exp()
        grad_sinks = -(share * products).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, [None] * ctx.pieces, None, grad_sinks, *[None] * len(ctx.numbers)


_operator.register_autograd(_backward, setup_context=_remember)
