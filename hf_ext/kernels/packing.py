"""Keys and values in 2, 4 or 8 bits a number, as in KIVI.

Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750), section 3. Keys have channels
whose numbers are large for all tokens, so they are quantised channel by channel, in groups of tokens; values are
quantised token by token, in groups of channels. A group's codes count steps from its least number: a number is
`zero + code * scale`.

Several codes share a byte. Byte `b` of a token holds the channels `b`, `b + bytes`, `b + 2 * bytes` and so on, from its
lowest bits up: what one shift takes out of a row of bytes is a run of neighbouring channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BITS = (2, 4, 8)


class Packed(NamedTuple):
    """Codes of a tensor with what brings them back.

    Args:
        codes: uint8 `(rows, heads, tokens, width * bits / 8)`.
        scale: of a step; `(rows, heads, tokens / group, width)` for keys, `(rows, heads, tokens, width / group)` for
            values.
        zero: the least number of each group, in the shape of `scale`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into bytes along the last axis.

    Args:
        codes: uint8 `(..., width)`, each less than `2 ** bits`.
        bits: 2, 4 or 8.

    Returns:
        uint8 `(..., width * bits / 8)`.

    Raises:
        ValueError: other bits or another dtype, or codes that do not fill whole bytes.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4)
        tensor([49, 66], dtype=torch.uint8)
        >>> unpack(pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4), 4)
        tensor([1, 2, 3, 4], dtype=torch.uint8)
    """
    check_bits(bits, codes.shape[-1])
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    first, *others = codes.chunk(8 // bits, -1)
    packed = first.clone(memory_format=torch.contiguous_format)
    for place, plane in enumerate(others, 1):
        packed |= plane << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes that `pack` packed: uint8 `(..., bytes * 8 / bits)`."""
    check_bits(bits, 8)
    if bits == 8:
        return packed
    largest = 2**bits - 1
    return torch.cat([(packed >> shift) & largest for shift in range(0, 8, bits)], -1)


def quantise_keys(keys: torch.Tensor, bits: int, group: int, dtype: torch.dtype | None = None) -> Packed:
    """Quantise keys channel by channel, in groups of tokens.

    What comes back is off by half a step at most, whatever the dtype of the scale; a group of one and the same number
    comes back exactly if the dtype holds that number.

    Args:
        keys: `(rows, heads, tokens, width)`.
        bits: 2, 4 or 8.
        group: tokens of a group, of which `tokens` is a multiple.
        dtype: of scale and zero; that of the keys by default, which loses nothing.

    Raises:
        ValueError: other bits, or lengths that are no multiples.

    Example:
        >>> packed = quantise_keys(torch.tensor([0.0, 1.0, 2.0, 6.0]).view(1, 1, 4, 1).expand(1, 1, 4, 4), 2, 4)
        >>> packed.codes.shape, dequantise_keys(*packed, bits=2)[0, 0, :, 0]
        (torch.Size([1, 1, 4, 1]), tensor([0., 0., 2., 6.]))
    """
    if group < 1 or keys.shape[-2] % group:
        raise ValueError(f"{keys.shape[-2]} tokens are no multiple of groups of {group}")
    groups = keys.unflatten(-2, (keys.shape[-2] // group, group))
    codes, scale, zero = _quantise(groups, -2, bits, dtype)
    return Packed(pack(codes.reshape(keys.shape), bits), scale.squeeze(-2), zero.squeeze(-2))


def quantise_values(values: torch.Tensor, bits: int, group: int, dtype: torch.dtype | None = None) -> Packed:
    """Quantise values token by token, in groups of channels.

    Args:
        values: `(rows, heads, tokens, width)`.
        bits: 2, 4 or 8.
        group: channels of a group, of which the width is a multiple.
        dtype: of scale and zero; that of the values by default, which loses nothing.

    Raises:
        ValueError: other bits, or lengths that are no multiples.

    Example:
        >>> packed = quantise_values(torch.tensor([[0.0, 3.0, 7.0, 7.0]])[None, None], 2, 2)
        >>> dequantise_values(*packed, bits=2)
        tensor([[[[0., 3., 7., 7.]]]])
    """
    if group < 1 or values.shape[-1] % group:
        raise ValueError(f"a width of {values.shape[-1]} is no multiple of groups of {group}")
    groups = values.unflatten(-1, (values.shape[-1] // group, group))
    codes, scale, zero = _quantise(groups, -1, bits, dtype)
    return Packed(pack(codes.reshape(values.shape), bits), scale.squeeze(-1), zero.squeeze(-1))


def dequantise_keys(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, bits: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the keys of what `quantise_keys` returned, in `dtype` or that of the scale; float32 at least inside."""
    kept = unpack(codes, bits)
    if not scale.shape[-2]:
        return kept.to(dtype or scale.dtype)
    wide = torch.promote_types(dtype or scale.dtype, torch.float32)
    steps = kept.unflatten(-2, (scale.shape[-2], -1)).to(wide)
    found = torch.addcmul(zero.to(wide).unsqueeze(-2), steps, scale.to(wide).unsqueeze(-2))
    return found.flatten(-3, -2).to(dtype or scale.dtype)


def dequantise_values(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, bits: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the values of what `quantise_values` returned, as `dequantise_keys`."""
    wide = torch.promote_types(dtype or scale.dtype, torch.float32)
    steps = unpack(codes, bits).unflatten(-1, (scale.shape[-1], -1)).to(wide)
    found = torch.addcmul(zero.to(wide).unsqueeze(-1), steps, scale.to(wide).unsqueeze(-1))
    return found.flatten(-2, -1).to(dtype or scale.dtype)


def check_bits(bits: int, width: int) -> None:
    """Raise a ValueError for bits that are not packed, and widths that do not fill bytes."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if width % (8 // bits):
        raise ValueError(
            f"{width} codes of {bits} bits do not fill whole bytes: the width must be a multiple of {8 // bits}"
        )


def _quantise(
    grouped: torch.Tensor, axis: int, bits: int, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scale and zero of groups that lie along an axis."""
    check_bits(bits, 8)
    dtype = dtype or grouped.dtype
    wide = torch.promote_types(grouped.dtype, torch.float32)
    least, largest = grouped.aminmax(dim=axis, keepdim=True)
    zero = _rounded(least.to(wide), dtype, up=False)
    # Rounded up, the steps reach the largest number; rounded to the nearest they might stop short of it.
    scale = _rounded((largest.to(wide) - zero.to(wide)) / (2**bits - 1), dtype, up=True)
    step = scale.to(wide)
    steps = (grouped.to(wide) - zero.to(wide)).div_(step.masked_fill(step == 0, 1))
    codes = steps.round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def _rounded(number: torch.Tensor, dtype: torch.dtype, up: bool) -> torch.Tensor:
    """Return numbers in a dtype, none less than it was (or, not `up`, none greater)."""
    near = number.to(dtype)
    if torch.promote_types(dtype, number.dtype) == dtype:
        return near
    back = near.to(number.dtype)
    return torch.where(back < number if up else back > number, _next(near, up), near)


def _next(number: torch.Tensor, up: bool) -> torch.Tensor:
    """Return the next number that the dtype has; `torch.nextafter` knows no float16."""
    if number.dtype.itemsize != 2:
        return torch.nextafter(number, torch.full_like(number, torch.inf if up else -torch.inf))
    bits = number.view(torch.int16)  # as whole numbers, those of one sign are in the order of their size
    beside = torch.where((number > 0) == up, bits + 1, bits - 1)
    return torch.where(number == 0, torch.full_like(bits, 1 if up else 1 - 2**15), beside).view(number.dtype)
