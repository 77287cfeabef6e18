"""Attention over keys and values in 2, 4 or 8 bits, as `packing` packs them.

All queries see all packed entries, which are older than any of them, but for those that `visible` hides. The caller
attends to its recent entries, which are not packed, on its own; `merge.merge_two` makes one result of both.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from hf_ext.kernels.packing import check_bits, dequantise_keys, dequantise_values

#: Tokens that are dequantised at a time on a CPU: what fits into its caches.
BLOCK = 1024


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
    """Return what `packed_attention` returns, block by block of tokens: what a CPU does quickest.

    Only a block is ever dequantised at a time, and its softmax is put together with that of the blocks before.

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
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scale).reshape(rows, key_heads, heads // key_heads * count, width)
    out = grouped.new_zeros(*grouped.shape[:3], value_codes.shape[-1] * 8 // bits)
    total = grouped.new_zeros(*grouped.shape[:3], 1)
    top = torch.full_like(total, torch.finfo(wide).min)
    group = tokens // max(key_scale.shape[2], 1)
    step = max(BLOCK // max(group, 1), 1) * group
    for start in range(0, tokens, max(step, 1)):
        at = slice(start, min(start + step, tokens))
        groups = slice(at.start // group, at.stop // group)
        keys = dequantise_keys(
            key_codes[:, :, at], key_scale[:, :, groups], key_zero[:, :, groups], bits=bits, dtype=wide
        )
        scores = grouped @ keys.transpose(-1, -2)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            scores += bias[:, :, None, at].to(wide)
        if visible is not None:
            scores.masked_fill_(~visible[:, :, None, at], -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = scores.sub_(higher).exp_()
        shrink = (top - higher).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True)
        values = dequantise_values(
            value_codes[:, :, at], value_scale[:, :, at], value_zero[:, :, at], bits=bits, dtype=wide
        )
        out = out * shrink + weights @ values
        top = higher
    out = out / total.masked_fill(total == 0, 1)
    lse = (total.log() + top)[..., 0]
    return out.view(rows, heads, count, -1).to(query.dtype), lse.view(rows, heads, count)


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
