"""Merge what several programs found over several splits of the keys.

Each left its result and the logarithm of its row sums, to base 2. The whole is their mean, weighted by those sums.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.language import LN_2, LOG2_E, Launch, cdiv, jit, power_of_two, tl
from hf_ext.kernels.scores import load_lse, strides


def merge_reference(
    parts: torch.Tensor, part_lse: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of the whole and the natural logarithm of its row sums.

    Args:
        parts: `(batch, heads, queries, splits, width)` results.
        part_lse: `(batch, heads, queries, splits)` logarithms to base 2, minus infinity where nothing was seen.
        sinks: `(heads,)` scores without a value that take part, too.

    Example:
        >>> out, lse = merge_reference(torch.tensor([[1.0], [4.0]])[None, None, None], torch.zeros(1, 1, 1, 2))
        >>> out, lse.exp()
        (tensor([[[[2.5000]]]]), tensor([[[2.]]]))
    """
    natural = part_lse * 0.6931471805599453
    empty = natural.isneginf().all(-1)
    lse = natural.masked_fill(empty[..., None], 0).logsumexp(-1).masked_fill(empty, -torch.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    weights = (natural - lse.masked_fill(lse.isneginf(), torch.inf)[..., None]).exp()
    return (weights[..., None] * parts).sum(-2), lse


def merge_two(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over two sets of keys, given attention over each; in plain torch, on any device.

    Args:
        out: `(..., width)` results over the first keys.
        lse: `(...)` natural logarithms of row sums, minus infinity where nothing was seen.
        other_out: over the other keys.
        other_lse: see `lse`.

    Returns:
        The result in the dtype of `out`, computed in float32 at least, and the logarithm of the row sums of both.

    Example:
        >>> first, second = torch.tensor([[1.0]]), torch.tensor([[4.0]])
        >>> out, lse = merge_two(first, torch.tensor([1.0]).log(), second, torch.tensor([2.0]).log())
        >>> round(out.item(), 4), round(lse.exp().item(), 4)
        (3.0, 3.0)
    """
    whole = torch.logaddexp(lse, other_lse)
    base = whole.masked_fill(whole.isneginf(), 0)
    weight, other_weight = (lse - base).exp()[..., None], (other_lse - base).exp()[..., None]
    return (out * weight + other_out * other_weight).to(out.dtype), whole


@jit(lengths=("query_count", "splits"))
def _merge(
    PARTS, PART_LSE, SINKS, OUT, LSE, out_batch, out_head, out_row, query_count, splits,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    line = (batch * tl.num_programs(1) + head) * query_count + place
    column = tl.arange(0, PADDED_DV)
    top = float("-inf")
    total = 0.0
    if SINKS is not None:
        top = tl.load(SINKS + head).to(tl.float32) * LOG2_E
        total = 1.0
    acc = tl.zeros((PADDED_DV,), tl.float32)
    for first in range(0, splits, BLOCK):
        at = first + tl.arange(0, BLOCK)
        lse = tl.load(PART_LSE + line * splits + at, mask=at < splits, other=float("-inf"))
        inside = (at < splits)[:, None] & (column < DV)[None, :]
        part = tl.load(PARTS + (line * splits + at)[:, None] * DV + column[None, :], mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        top = new_top
    out = acc / tl.where(total > 0, total, 1.0)
    OUT += batch * out_batch + head * out_head + place * out_row
    tl.store(OUT + column, out.to(OUT.dtype.element_ty), mask=column < DV)
    tl.store(LSE + line, tl.where(total > 0, (top + tl.log2(total)) * LN_2, float("-inf")))


@jit(lengths=("rows", "key_count"))
def _columns(SCORES, LSE, SUMS, rows, key_count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    line = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    key_at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        lse = load_lse(LSE + line * rows, row, rows)
        at = SCORES + (line * rows + row)[:, None] * key_count + key_at[None, :]
        inside = (row < rows)[:, None] & (key_at < key_count)[None, :]
        sums += tl.sum(tl.exp2(tl.load(at, mask=inside, other=float("-inf")) - lse[:, None]), 0)
    tl.store(SUMS + line * key_count + key_at, sums, mask=key_at < key_count)


def launch_merge(
    parts: torch.Tensor, part_lse: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> Launch:
    """Return the launch of the kernel that merges splits."""
    batch, heads, queries, width = out.shape
    arguments = {
        "PARTS": parts, "PART_LSE": part_lse, "SINKS": sinks, "OUT": out, "LSE": lse, **strides(out=out),
        "query_count": queries, "splits": part_lse.shape[-1], "DV": width, "PADDED_DV": power_of_two(width),
        "BLOCK": 16,
    }  # fmt: skip
    return Launch(_merge, (queries, heads, batch), arguments, configs.Config(1, 1, 4, 1))


def launch_columns(scores: torch.Tensor, lse: torch.Tensor, sums: torch.Tensor) -> Launch:
    """Return the launch of the kernel that adds up the weights of kept scores."""
    batch, key_heads, keys = sums.shape
    rows = lse.shape[1] * lse.shape[2] // key_heads
    arguments = {
        "SCORES": scores, "LSE": lse, "SUMS": sums, "rows": rows, "key_count": keys, "BLOCK_M": 16, "BLOCK_N": 128,
    }  # fmt: skip
    return Launch(_columns, (cdiv(keys, 128), key_heads, batch), arguments, configs.Config(1, 1, 4, 1))
