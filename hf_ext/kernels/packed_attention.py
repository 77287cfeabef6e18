"""Attention over keys and values in 2, 4 or 8 bits, as `packing` packs them.

All queries see all packed entries, which are older than any of them, but for those that `visible` hides. The caller
attends to its recent entries, which are not packed, on its own; `merge.merge_two` makes one result of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.decode_attention import count_splits
from hf_ext.kernels.language import cdiv, check_device
from hf_ext.kernels.merge import launch_merge
from hf_ext.kernels.packed_kernel import launch_packed
from hf_ext.kernels.packed_native import packed_scores, packed_sums
from hf_ext.kernels.packing import check_bits, dequantise_keys, dequantise_values
from hf_ext.kernels.problem import DTYPES
from hf_ext.kernels.scores import adjacent, weigh


def packed_attention(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor,
    *,
    bits: int,
    scale: float | None = None,
    softcap: float | None = None,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over packed keys and values, and the logarithm of the row sums.

    What is read is what is packed: dequantised numbers never lie in memory. There is no gradient.

    Args:
        query: `(rows, heads, queries, width)`, float16, bfloat16 or float32, width up to 256.
        key_codes: uint8 `(rows, key heads, tokens, width * bits / 8)`; heads are a multiple of key heads.
        key_scale: `(rows, key heads, tokens / group, width)`, of a group of tokens.
        key_zero: the same for the least numbers.
        value_codes: uint8 `(rows, key heads, tokens, value width * bits / 8)`.
        value_scale: `(rows, key heads, tokens, value width / group)`, of a group of channels.
        value_zero: the same for the least numbers.
        bits: of a code: 2, 4 or 8.
        scale: of the products of query and key; `width ** -0.5` by default.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        visible: bool `(rows, key heads, tokens)`, which entries are seen; without it all are.
        bias: `(rows, key heads, tokens)`, added to the scores of each entry.

    Returns:
        `(rows, heads, queries, value width)` in the dtype of the query, and float32 `(rows, heads, queries)`. A row
        that sees nothing is 0, and minus infinity.

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)
    _check(query, packed, bits, scale, softcap, visible, bias)
    widest = max(query.shape[-1], value_codes.shape[-1] * 8 // bits)
    if query.dtype not in DTYPES or widest > configs.WIDTHS[-1]:
        raise ValueError(
            f"the kernel takes {', '.join(map(str, DTYPES))} and heads up to a width of {configs.WIDTHS[-1]}, got "
            f"{query.dtype} and {widest}: use packed_attention_torch"
        )
    return torch.ops.hf_ext.packed_attention(query, packed, visible, bias, bits, scale, softcap or 0.0)


def packed_attention_reference(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor,
    *,
    bits: int,
    scale: float | None = None,
    softcap: float | None = None,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `packed_attention` returns, by its definition: everything is dequantised, then attended to.

    Example:
        >>> from hf_ext.kernels.packing import quantise_keys, quantise_values
        >>> keys = torch.zeros(1, 1, 2, 4)
        >>> values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])[None, None]
        >>> packed = (*quantise_keys(keys, 2, 2), *quantise_values(values, 2, 4))
        >>> out, lse = packed_attention_reference(torch.ones(1, 1, 1, 4), *packed, bits=2)
        >>> out.flatten(), lse.exp().flatten()
        (tensor([2., 3., 4., 5.]), tensor([2.]))
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)
    _check(query, packed, bits, scale, softcap, visible, bias)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = dequantise_keys(key_codes, key_scale, key_zero, bits=bits, dtype=wide)
    values = dequantise_values(value_codes, value_scale, value_zero, bits=bits, dtype=wide)
    grouped = query.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)[:, :, None, None]
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None, None], -torch.inf)
    empty = scores.isneginf().all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    weights = (scores - lse.masked_fill(empty, 0)).exp().masked_fill(empty, 0)
    out = weights @ values[:, :, None]
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)[..., 0]


@torch.no_grad()
def packed_attention_torch(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor,
    *,
    bits: int,
    scale: float | None = None,
    softcap: float | None = None,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `packed_attention` returns, by what a CPU does quickest (`packed_native`); there is no gradient.

    Example:
        >>> from hf_ext.kernels.packing import quantise_keys, quantise_values
        >>> keys = torch.zeros(1, 1, 2, 4)
        >>> values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])[None, None]
        >>> packed = (*quantise_keys(keys, 2, 2), *quantise_values(values, 2, 4))
        >>> out, lse = packed_attention_torch(torch.ones(1, 1, 1, 4), *packed, bits=2)
        >>> out.flatten(), lse.exp().flatten()
        (tensor([2., 3., 4., 5.]), tensor([2.]))
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)
    _check(query, packed, bits, scale, softcap, visible, bias)
    rows, heads, count, width = query.shape
    key_heads, tokens = key_codes.shape[1:3]
    lines, value_width = heads // key_heads * count, value_codes.shape[-1] * 8 // bits
    wide = torch.promote_types(query.dtype, torch.float32)
    if not tokens:
        return query.new_zeros(rows, heads, count, value_width), query.new_full(
            (rows, heads, count), -torch.inf, dtype=wide
        )
    # The queries of a group of heads see the same keys and are multiplied together.
    grouped = (query.to(wide) * scale).reshape(rows, key_heads, lines, width)
    scores = grouped.new_empty(rows, key_heads, lines, tokens)
    packed_scores(grouped, key_codes, key_scale, key_zero, bits, scores)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias[:, :, None].to(wide)
    if visible is not None:
        scores.masked_fill_(~visible[:, :, None], -torch.inf)
    weights, lse = weigh(scores)
    out = packed_sums(weights, value_codes, value_scale, value_zero, bits)
    return out.view(rows, heads, count, value_width).to(query.dtype), lse.view(rows, heads, count)


def _check(
    query: torch.Tensor, packed: tuple[torch.Tensor, ...], bits: int, scale: float, softcap: float | None,
    visible: torch.Tensor | None, bias: torch.Tensor | None,
) -> None:  # fmt: skip
    key_codes, key_scale, key_zero, value_codes, value_scale, value_zero = packed
    check_bits(bits, 8)
    rows, heads, _, width = query.shape
    if key_codes.ndim != 4 or value_codes.shape[:3] != key_codes.shape[:3] or len(key_codes) != rows:
        raise ValueError(
            f"codes must be ({rows}, key heads, tokens, bytes) with the same tokens, got {tuple(key_codes.shape)} and "
            f"{tuple(value_codes.shape)}"
        )
    key_heads, tokens = key_codes.shape[1:3]
    value_width = value_codes.shape[-1] * 8 // bits
    if key_codes.dtype != torch.uint8 or value_codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {key_codes.dtype} and {value_codes.dtype}")
    if key_codes.shape[-1] * 8 != width * bits or heads % key_heads:
        raise ValueError(
            f"key codes {tuple(key_codes.shape)} of {bits} bits do not go with {heads} heads of width {width}"
        )
    groups = key_scale.shape[2] if key_scale.ndim == 4 else 0
    if (
        (groups == 0) != (tokens == 0)
        or (groups and tokens % groups)
        or (key_scale.shape != (rows, key_heads, groups, width) or key_zero.shape != key_scale.shape)
    ):
        raise ValueError(
            f"scale and zero of keys must be ({rows}, {key_heads}, tokens / group, {width}) with {tokens} a multiple "
            f"of the groups, got {tuple(key_scale.shape)} and {tuple(key_zero.shape)}"
        )
    groups = value_scale.shape[-1] if value_scale.ndim == 4 else 0
    if (
        not groups
        or value_width % groups
        or (value_scale.shape[:3] != key_codes.shape[:3] or value_zero.shape != value_scale.shape)
    ):
        raise ValueError(
            f"scale and zero of values must be ({rows}, {key_heads}, {tokens}, groups) with {value_width} a multiple "
            f"of the groups, got {tuple(value_scale.shape)} and {tuple(value_zero.shape)}"
        )
    for name, tensor in {"visible": visible, "bias": bias}.items():
        if tensor is not None and tensor.shape != key_codes.shape[:3]:
            raise ValueError(f"{name} must have the shape {tuple(key_codes.shape[:3])}, got {tuple(tensor.shape)}")
    if visible is not None and visible.dtype != torch.bool:
        raise ValueError(f"visible must be bool, got {visible.dtype}")
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0, or None, got {softcap}")


def _run(
    query: torch.Tensor, packed: Sequence[torch.Tensor], visible: torch.Tensor | None, bias: torch.Tensor | None,
    bits: int, scale: float, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check_device(query.device)
    query, packed = adjacent(query), [adjacent(tensor) for tensor in packed]
    out, lse = _results(query, packed, bits)
    rows, heads, queries, width = query.shape
    key_heads, tokens = packed[0].shape[1:3]
    lines = heads // key_heads * queries
    config = configs.choose("packed", max(width, out.shape[-1]), query.dtype, query.device, lines)
    splits = count_splits(rows * key_heads * cdiv(lines, config.queries), tokens, config.keys, query.device)
    parts = query.new_empty(rows, heads, queries, splits, out.shape[-1], dtype=torch.float32)
    part_lse = query.new_empty(rows, heads, queries, splits, dtype=torch.float32)
    visible = None if visible is None else adjacent(visible.view(torch.uint8))
    bias = None if bias is None else adjacent(bias)
    launch_packed(query, packed, visible, bias, parts, part_lse, bits, scale, softcap, config)()
    launch_merge(parts, part_lse, None, out, lse)()
    return out, lse


def _results(query: torch.Tensor, packed: Sequence[torch.Tensor], bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for the results; heads of a token lie side by side, as models go on with them."""
    rows, heads, queries, _ = query.shape
    out = query.new_empty(rows, queries, heads, packed[3].shape[-1] * 8 // bits).transpose(1, 2)
    return out, query.new_empty(rows, heads, queries, dtype=torch.float32)


_operator = torch.library.custom_op(
    "hf_ext::packed_attention",
    _run,
    mutates_args=(),
    schema="(Tensor query, Tensor[] packed, Tensor? visible, Tensor? bias, int bits, float scale, float softcap) "
    "-> (Tensor, Tensor)",
)


@_operator.register_fake
def _(
    query: torch.Tensor, packed: Sequence[torch.Tensor], visible: torch.Tensor | None, bias: torch.Tensor | None,
    bits: int, *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _results(query, packed, bits)
