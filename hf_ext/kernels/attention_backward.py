"""Gradients of attention, in two passes: by queries for the query's, by keys for those of key and value.

Each program owns what it writes, so that sums are always taken in the same order and nothing is added atomically.
With p the weights and s the scores before the soft cap, all from the saved logarithms of the row sums:

    dv = p^T do        dp = do v^T        ds = p (dp - rows) (1 - tanh(s)^2)        dq = ds k        dk = ds^T q

where `rows` is the sum of `do * out` in each row, less the gradient of the row's logarithm.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.key_value_gradient import launch_key_value_gradient
from hf_ext.kernels.language import Launch, cdiv, check_device, jit, load_rows, power_of_two, tl
from hf_ext.kernels.problem import Visibility
from hf_ext.kernels.query_gradient import launch_query_gradient
from hf_ext.kernels.scores import adjacent, strides

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def attention_backward_reference(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Gradients:
    """Return the gradients of query, key and value, and the row products, by the formulas and with the whole matrix.

    Args:
        grad_out: gradient of the result.
        grad_lse: gradient of the logarithms of the row sums.
        query: as in `attention`, and so are `key` and `value`.
        key: see there.
        value: see there.
        out: result of `attention`.
        lse: logarithms of the row sums of `attention`.
        seen: bool that broadcasts to `(batch, heads, queries, keys)`.
        scale: as in `attention`.
        softcap: as in `attention`, 0 without.
    """
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ keys.transpose(-1, -2) * scale
    slope = torch.ones_like(scores)
    if softcap:
        slope = 1 - torch.tanh(scores / softcap) ** 2
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores - lse.masked_fill(lse.isneginf(), torch.inf)[..., None]).exp().masked_fill(~seen, 0)
    rows = (grad_out * out).sum(-1) - grad_lse
    grad_scores = weights * (grad_out @ values.transpose(-1, -2) - rows[..., None]) * slope * scale
    grad_keys = (grad_scores.transpose(-1, -2) @ query).unflatten(1, (-1, group)).sum(2)
    grad_values = (weights.transpose(-1, -2) @ grad_out).unflatten(1, (-1, group)).sum(2)
    return grad_scores @ keys, grad_keys, grad_values, rows


@jit(lengths=("query_count",))
def _row_products(
    OUT, GRAD_OUT, GRAD_LSE, ROWS, out_batch, out_head, out_row, grad_batch, grad_head, grad_row, query_count,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    count = query_count - first
    OUT += batch * out_batch + head * out_head + first.to(tl.int64) * out_row
    GRAD_OUT += batch * grad_batch + head * grad_head + first.to(tl.int64) * grad_row
    out = load_rows(OUT, out_row, count, BLOCK_M, DV, PADDED_DV, False).to(tl.float32)
    grad = load_rows(GRAD_OUT, grad_row, count, BLOCK_M, DV, PADDED_DV, False).to(tl.float32)
    line = (batch * tl.num_programs(1) + head) * query_count + first
    at = tl.arange(0, BLOCK_M)
    grad_lse = tl.load(GRAD_LSE + line + at, mask=at < count, other=0.0)
    tl.store(ROWS + line + at, tl.sum(out * grad, 1) - grad_lse, mask=at < count)


def launch_row_products(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor, rows: torch.Tensor, config: configs.Config
) -> Launch:
    """Return the launch of the kernel of the row products."""
    batch, heads, queries, width = out.shape
    arguments = {
        "OUT": out, "GRAD_OUT": grad_out, "GRAD_LSE": grad_lse, "ROWS": rows, **strides(out=out, grad=grad_out),
        "query_count": queries, "DV": width, "PADDED_DV": power_of_two(width), "BLOCK_M": config.queries,
    }  # fmt: skip
    return Launch(_row_products, (cdiv(queries, config.queries), heads, batch), arguments, config)


def _results(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Gradients:
    """Return room for the gradients."""
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        query.new_empty(query.shape[:3], dtype=torch.float32),
    )


def _run(
    grad_out: torch.Tensor, grad_lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, structure: Sequence[torch.Tensor], mask: torch.Tensor | None, scale: float,
    softcap: float, causal: bool, window: int, groups: bool, tree: int, size: int,
) -> Gradients:  # fmt: skip
    check_device(query.device)
    grad_out, query, key, value = adjacent(grad_out), adjacent(query), adjacent(key), adjacent(value)
    grad_query, grad_key, grad_value, rows = _results(query, key, value)
    seen = Visibility(list(structure), mask, causal, window, groups, tree, size)
    width = max(query.shape[-1], value.shape[-1])

    def config(operation: str) -> configs.Config:
        return configs.choose(operation, width, query.dtype, query.device)

    common = (query, key, value, grad_out, lse, rows)
    launch_row_products(out, grad_out, grad_lse.contiguous(), rows, config("row_products"))()
    launch_query_gradient(*common, grad_query, seen, scale, softcap, config("query_gradient"))()
    launch_key_value_gradient(*common, grad_key, grad_value, seen, scale, softcap, config("key_value_gradient"))()
    return grad_query, grad_key, grad_value, rows


operator = torch.library.custom_op(
    "hf_ext::attention_backward",
    _run,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor[] structure, Tensor? mask, float scale, float softcap, bool causal, int window, bool groups, int tree, "
    "int size) -> (Tensor, Tensor, Tensor, Tensor)",
)


@operator.register_fake
def _(
    grad_out: torch.Tensor, grad_lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    *_: Any,
) -> Gradients:  # fmt: skip
    return _results(adjacent(query), adjacent(key), adjacent(value))
