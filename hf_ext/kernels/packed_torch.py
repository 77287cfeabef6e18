"""The two products of attention over packed codes, in plain torch: what a CPU does quickest.

    q . (zero + code * scale)  =  q . zero  +  (q * scale) . code        keys: a scale for each group of tokens
    w . (zero + code * scale)  =  w . zero  +  (w * scale) . code        values: a scale for each token

So it is the few queries and weights that are scaled, rather than all keys and values, and codes become floating numbers
and nothing else. They stay plane by plane, as the bytes hold them: converting is quick where numbers lie side by side.
A plane is what is left of the bytes under a mask, not shifted: its codes times a power of two, which the product takes
back. Only a block of tokens is unpacked at a time, into one and the same room.
"""

from __future__ import annotations

import functools
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
    heads, group, planes = rows * key_heads, tokens // groups, 8 // bits
    part = width // planes
    scale, zero = (found.to(query.dtype).view(heads, groups, 1, width) for found in (scale, zero))
    query = query.reshape(heads, 1, lines, width)
    scaled = query * scale
    least = (query[:, 0] @ zero[:, :, 0].mT).mT[..., None].expand(-1, -1, -1, group)
    codes = codes.reshape(heads, groups, group, part)
    out = out.view(heads, lines, groups, group).transpose(1, 2)
    # Blocks are some heads with all of their tokens, or some tokens of one head: they lie side by side.
    many = max(LARGEST // (tokens * part), 1)
    step = groups if tokens * part <= LARGEST else max(LARGEST // (group * part), 1)
    room = query.new_empty(min(many, heads), min(step, groups), group, part)
    for head in range(0, heads, many):
        for first in range(0, groups, step):
            some = [codes, least, scaled, out]
            if len(room) < heads or step < groups:
                some = [whole[head : head + many, first : first + step] for whole in some]
            of, start, by, there = some
            found = start.flatten(0, 1)
            for plane in range(planes):
                numbers = _numbers(of, plane, bits, room).flatten(0, 1)
                own = by[..., plane * part : (plane + 1) * part].flatten(0, 1)
                found = torch.baddbmm(found, own, numbers.mT, alpha=0.5 ** (plane * bits))
            there.copy_(found.view(there.shape))


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
    heads, planes, groups = rows * key_heads, 8 // bits, scale.shape[3]
    part = codes.shape[3]
    width = part * planes
    group = width // groups
    run = math.gcd(part, group)  # so many channels lie in one plane and in one group
    # To multiply numbers that do not lie side by side is slow.
    scale = scale.to(weights.dtype).mT.contiguous()
    least = (weights @ zero.to(weights.dtype)).flatten(0, 1)
    sums = [least[..., first // group, None].expand(-1, -1, run) for first in range(0, width, run)]
    by_group = (weights[:, :, None] * scale[:, :, :, None]).flatten(0, 1)
    codes = codes.reshape(heads, tokens, part)
    step = max(LARGEST // (heads * part), 1)
    room = weights.new_empty(heads, min(step, tokens), part)
    for first in range(0, tokens, step):
        at = slice(first, first + step)
        for plane in range(planes):
            numbers = _numbers(codes[:, at], plane, bits, room)
            for place in range(plane * part // run, (plane + 1) * part // run):
                by, of = by_group[:, place * run // group, :, at], numbers[..., place * run % part :][..., :run]
                sums[place] = torch.baddbmm(sums[place], by, of, alpha=0.5 ** (plane * bits))
    return torch.cat(sums, dim=2).view(rows, key_heads, lines, width)


def _numbers(codes: torch.Tensor, plane: int, bits: int, room: torch.Tensor) -> torch.Tensor:
    """Return one code of every byte as a floating number, times `2 ** (plane * bits)`.

    Args:
        codes: uint8 `(heads, n, ...)`.
        plane: the place of the codes in their bytes.
        bits: of a code.
        room: of the same shape or larger in the first two axes, written to.
    """
    if room.shape != codes.shape:
        room = room[: codes.shape[0], : codes.shape[1]]
    return room.copy_(codes if bits == 8 else codes & _mask(plane, bits, codes.device))


@functools.cache
def _mask(plane: int, bits: int, device: torch.device) -> torch.Tensor:
    """Return the bits of a byte that a code takes; a number of Python would be made a tensor and cast every time."""
    return torch.tensor(2**bits - 1 << plane * bits, dtype=torch.uint8, device=device)
