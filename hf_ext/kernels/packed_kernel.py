"""The kernel of attention over packed keys and values: each program dequantises and sees a split of the tokens."""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.language import Launch, cdiv, jit, power_of_two, product, tl
from hf_ext.kernels.scores import strides, tanh, units

#: Strides of values' scales change with the length in a way that Triton would compile for.
SCALES = ("vs_batch", "vs_head", "vz_batch", "vz_head")


@jit
def _codes(CODES, row, count, column, WIDTH: tl.constexpr, BITS: tl.constexpr, stride):
    """Load codes of some tokens as float32: `column` names channels, `row` tokens; zero behind either's end."""
    BYTES: tl.constexpr = WIDTH * BITS // 8
    inside = (row < count) & (column < WIDTH)
    # Several channels share a byte, which the device's cache serves; from its memory it is read once.
    found = tl.load(CODES + row * stride + column % BYTES, mask=inside, other=0).to(tl.int32)
    return ((found >> (column // BYTES * BITS)) & (2**BITS - 1)).to(tl.float32)


@jit(lengths=("query_count", "token_count", "splits", "seen_batch", "seen_head", "bias_batch", "bias_head", *SCALES))
def _packed(
    Q, KEY_CODES, KEY_SCALE, KEY_ZERO, VALUE_CODES, VALUE_SCALE, VALUE_ZERO, VISIBLE, BIAS, PARTS, PART_LSE,
    q_batch, q_head, q_row, kc_batch, kc_head, kc_row, ks_batch, ks_head, ks_row, kz_batch, kz_head, kz_row,
    vc_batch, vc_head, vc_row, vs_batch, vs_head, vs_row, vz_batch, vz_head, vz_row, seen_batch, seen_head,
    bias_batch, bias_head, query_count, token_count, multiplier, inner, bias_unit, splits,
    BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    place = (row % query_count).to(tl.int64)
    wide_head = key_head.to(tl.int64)
    KEY_CODES += batch * kc_batch + wide_head * kc_head
    KEY_SCALE += batch * ks_batch + wide_head * ks_head
    KEY_ZERO += batch * kz_batch + wide_head * kz_head
    VALUE_CODES += batch * vc_batch + wide_head * vc_head
    VALUE_SCALE += batch * vs_batch + wide_head * vs_head
    VALUE_ZERO += batch * vz_batch + wide_head * vz_head
    column = tl.arange(0, PADDED_D)[None, :]
    value_column = tl.arange(0, PADDED_DV)[None, :]
    at = Q + (batch * q_batch + head * q_head + place * q_row)[:, None] + column
    q = tl.load(at, mask=there[:, None] & (column < D), other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DV), tl.float32)
    blocks = tl.cdiv(token_count, BLOCK_N)
    each = tl.cdiv(blocks, splits)
    for step in range(split * each, tl.minimum((split + 1) * each, blocks)):
        begin = step * BLOCK_N
        left = token_count - begin
        token = tl.arange(0, BLOCK_N)[:, None]
        if KEY_GROUP % BLOCK_N == 0:
            # All tokens of the block are of one group.
            of_group = (begin // KEY_GROUP).to(tl.int64)
            inside = column < D
            key_scale = tl.load(KEY_SCALE + of_group * ks_row + column, mask=inside, other=0.0)
            key_zero = tl.load(KEY_ZERO + of_group * kz_row + column, mask=inside, other=0.0)
        else:
            of_token = ((begin + token) // KEY_GROUP).to(tl.int64)
            inside = (token < left) & (column < D)
            key_scale = tl.load(KEY_SCALE + of_token * ks_row + column, mask=inside, other=0.0)
            key_zero = tl.load(KEY_ZERO + of_token * kz_row + column, mask=inside, other=0.0)
        wide_begin = begin.to(tl.int64)
        k = _codes(KEY_CODES + wide_begin * kc_row, token, left, column, D, BITS, kc_row)
        k = k * key_scale.to(tl.float32) + key_zero.to(tl.float32)
        scores = product(q, tl.trans(k.to(q.dtype)), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if SOFTCAP:
            scores = tanh(scores * inner)
        key_at = begin + tl.arange(0, BLOCK_N)[None, :]
        seen = key_at < token_count
        if BIAS is not None:
            added = tl.load(BIAS + batch * bias_batch + wide_head * bias_head + key_at, mask=seen, other=0.0)
            scores += added.to(tl.float32) * bias_unit
        if VISIBLE is not None:
            seen = seen & (
                tl.load(VISIBLE + batch * seen_batch + wide_head * seen_head + key_at, mask=seen, other=0) != 0
            )
        scores = tl.where(seen, scores, float("-inf")) * multiplier
        new_top = tl.maximum(top, tl.max(scores, 1))
        # The top of a row that has seen nothing yet is minus infinity, which would subtract to NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        inside = (token < left) & (value_column < DV)
        of_channel = value_column // VALUE_GROUP
        value_scale = tl.load(VALUE_SCALE + (wide_begin + token) * vs_row + of_channel, mask=inside, other=0.0)
        value_zero = tl.load(VALUE_ZERO + (wide_begin + token) * vz_row + of_channel, mask=inside, other=0.0)
        v = _codes(VALUE_CODES + wide_begin * vc_row, token, left, value_column, DV, BITS, vc_row)
        v = (v * value_scale.to(tl.float32) + value_zero.to(tl.float32)).to(q.dtype)
        acc = product(weights.to(q.dtype), v, acc * shrink[:, None])
        top = new_top
    line = ((batch * key_heads * GROUP + head) * query_count + place) * splits + split
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(PARTS + line[:, None] * DV + value_column, acc, mask=there[:, None] & (value_column < DV))
    tl.store(PART_LSE + line, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=there)


def launch_packed(
    query: torch.Tensor, packed: Sequence[torch.Tensor], visible: torch.Tensor | None, bias: torch.Tensor | None,
    parts: torch.Tensor, part_lse: torch.Tensor, bits: int, scale: float, softcap: float, config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel whose programs see a split of the tokens each."""
    rows, heads, queries, width = query.shape
    key_codes, key_scale, key_zero, value_codes, value_scale, value_zero = packed
    key_heads, tokens = key_codes.shape[1:3]
    value_width = value_codes.shape[-1] * 8 // bits
    inner, multiplier = units(scale, softcap or None)
    splits = part_lse.shape[-1]
    arguments = {
        "Q": query, "KEY_CODES": key_codes, "KEY_SCALE": key_scale, "KEY_ZERO": key_zero, "VALUE_CODES": value_codes,
        "VALUE_SCALE": value_scale, "VALUE_ZERO": value_zero, "VISIBLE": visible, "BIAS": bias, "PARTS": parts,
        "PART_LSE": part_lse,
        **strides(
            q=query, kc=key_codes, ks=key_scale, kz=key_zero, vc=value_codes, vs=value_scale, vz=value_zero
        ),
        "seen_batch": 0 if visible is None else visible.stride(0),
        "seen_head": 0 if visible is None else visible.stride(1),
        "bias_batch": 0 if bias is None else bias.stride(0), "bias_head": 0 if bias is None else bias.stride(1),
        "query_count": queries, "token_count": tokens, "multiplier": multiplier, "inner": inner,
        "bias_unit": 1.4426950408889634 / multiplier, "splits": splits, "BITS": bits,
        "KEY_GROUP": tokens // max(key_scale.shape[2], 1) or 1, "VALUE_GROUP": value_width // value_scale.shape[-1],
        "SOFTCAP": softcap > 0, "GROUP": heads // key_heads, "D": width, "DV": value_width,
        "PADDED_D": power_of_two(width), "PADDED_DV": power_of_two(value_width), "BLOCK_M": config.queries,
        "BLOCK_N": config.keys,
    }  # fmt: skip
    tiles = cdiv(heads // key_heads * queries, config.queries)
    return Launch(_packed, (splits, tiles * key_heads, rows), arguments, config)
