"""The two products of attention over packed codes, in plain torch: what a CPU does quickest.

    q . (zero + code * scale)  =  q . zero  +  (q * scale) . code        keys: a scale for each group of tokens
    w . (zero + code * scale)  =  w . zero  +  (w * scale) . code        values: a scale for each token

So it is the few queries and weights that are scaled, rather than all keys and values, and codes become floating numbers
and nothing else. They stay plane by plane, as the bytes hold them: converting is quick where numbers lie side by side.
Only a block of tokens is unpacked at a time.
"""

from __future__ import annotations

import math

import torch

#: So many numbers are unpacked at a time: 2 MB of them.
LARGEST = 2**19


def packed_scores(
    query: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, out: torch.Tensor
) -> None:
    """Write the products of queries and packed keys.

    Args:
        query: `(rows, key heads, lines, width)`, float32 or float64.
        codes: uint8 `(rows, key heads, tokens, width * bits / 8)`.
        scale: `(rows, key heads, tokens / group, width)`.
        zero: the same for the least numbers.
        bits: of a code.
        out: `(rows, key heads, lines, tokens)`, written to.

    Example:
        >>> from hf_ext.kernels.packing import quantise_keys
        >>> keys = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None]
        >>> out = torch.empty(1, 1, 1, 2)
        >>> packed_scores(torch.tensor([[1.0, 10.0]])[None, None], *quantise_keys(keys, 8, 2), 8, out)
        >>> out.flatten()
        tensor([10., 42.])
    """
    rows, key_heads, lines, width = query.shape
    tokens, groups = codes.shape[2], scale.shape[2]
    if not tokens:
        return
    group, planes = tokens // groups, 8 // bits
    step = max(LARGEST // (rows * key_heads * group * width), 1)
    for first in range(0, groups, step):
        last = min(first + step, groups)
        some, at = slice(first, last), slice(first * group, last * group)
        numbers = _planes(codes[:, :, at], bits, query.dtype).view(planes, -1, group, width // planes)
        scaled = (query[:, :, None] * scale[:, :, some, None].to(query.dtype)).view(-1, lines, planes, width // planes)
        found = (query @ zero[:, :, some].to(query.dtype).mT).transpose(2, 3).reshape(-1, lines, 1)
        found = found.expand(-1, -1, group)
        for plane in range(planes):
            found = torch.baddbmm(found, scaled[:, :, plane], numbers[plane].mT)
        there = out[..., at].unflatten(3, (last - first, group))
        there.copy_(found.view(rows, key_heads, last - first, lines, group).transpose(2, 3))


def packed_sums(
    weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the sums of packed values by their weights, `(rows, key heads, lines, value width)`.

    Args:
        weights: `(rows, key heads, lines, tokens)`, float32 or float64.
        codes: uint8 `(rows, key heads, tokens, value width * bits / 8)`.
        scale: `(rows, key heads, tokens, value width / group)`.
        zero: the same for the least numbers.
        bits: of a code.

    Example:
        >>> from hf_ext.kernels.packing import quantise_values
        >>> values = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None]
        >>> packed_sums(torch.tensor([[0.25, 0.5]])[None, None], *quantise_values(values, 8, 2), 8).flatten()
        tensor([1.0000, 2.2500])
    """
    rows, key_heads, lines, tokens = weights.shape
    planes, groups = 8 // bits, scale.shape[3]
    width = codes.shape[3] * planes
    part, group = width // planes, width // groups
    # All channels of a run lie in one plane and in one group.
    run = math.gcd(part, group)
    of_runs = scale.to(weights.dtype)
    if run < group:
        of_runs = of_runs.repeat_interleave(group // run, dim=3)
    whole = run == part
    if whole:  # to multiply numbers that do not lie side by side is slow
        of_runs = of_runs.mT.contiguous().mT
    of_runs = of_runs.unflatten(3, (planes, -1)).permute(3, 0, 1, 2, 4)  # (planes, rows, key heads, tokens, runs)
    total = weights.new_zeros(planes, rows * key_heads, lines, part) if not tokens else None
    step = max(LARGEST // (rows * key_heads * width), 1)
    for first in range(0, tokens, step):
        at = slice(first, first + step)
        numbers, own = _planes(codes[:, :, at], bits, weights.dtype), weights[..., at]
        if whole:
            room = own.new_empty(planes, *own.shape)
            by_plane = torch.mul(own, of_runs[:, :, :, at].mT, out=room)
        else:
            numbers.unflatten(4, (-1, run)).mul_(of_runs[:, :, :, at, :, None])
            by_plane = own.expand(planes, -1, -1, -1, -1)
        found = by_plane.reshape(-1, lines, own.shape[3]) @ numbers.flatten(0, 2)
        total = found if total is None else total.add_(found)
    assert total is not None
    out = total.view(planes, rows, key_heads, lines, part).permute(1, 2, 3, 0, 4).reshape(rows, key_heads, lines, width)
    out.unflatten(3, (groups, group)).add_((weights @ zero.to(weights.dtype))[..., None])
    return out


def _planes(packed: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return codes as floating numbers, `(planes, rows, key heads, tokens, bytes)`: a place of the bytes is a plane."""
    if bits == 8:
        return packed[None].to(dtype)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1, 1, 1, 1)
    return ((packed >> shifts) & (2**bits - 1)).to(dtype)
