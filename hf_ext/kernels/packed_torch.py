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
    scale, zero = (found.to(query.dtype).view(heads, groups, width) for found in (scale, zero))
    query = query.reshape(heads, lines, width)
    least = torch.bmm(query, zero.mT)[..., None]
    scaled = query[:, None] * scale[:, :, None]
    codes = codes.reshape(heads, groups, group, part)
    out = out.view(heads, lines, groups, group)
    # Blocks are some heads with all of their tokens, or some tokens of one head: they lie side by side.
    many = min(max(LARGEST // (tokens * part), 1), heads)
    step = groups if tokens * part <= LARGEST else max(LARGEST // (group * part), 1)
    room = Room(query, (many, step, group, part), bits)
    tiles: list[torch.Tensor] = [codes, scaled, least.transpose(1, 2), out.transpose(1, 2)]
    for head in range(0, heads, many):
        for first in range(0, groups, step):
            some = tiles
            if many < heads or step < groups:
                some = [whole[head : head + many, first : first + step] for whole in tiles]
            of, by, start, there = some
            numbers = room.take(of.shape)
            turned = numbers.flatten(0, 1).mT
            found = query.new_empty(turned.shape[0], lines, group)
            for plane, own in enumerate(by.flatten(0, 1).split(part, dim=-1)):
                room.fill(numbers, of, plane)
                found.baddbmm_(own, turned, beta=min(plane, 1), alpha=0.5 ** (plane * bits))
            torch.add(found.view(there.shape), start, out=there)


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
    weights = weights.flatten(0, 1)
    # To multiply numbers that do not lie side by side is slow.
    scale, zero = (found.to(weights.dtype).view(heads, tokens, groups).mT.contiguous() for found in (scale, zero))
    out = weights.new_empty(heads, lines, width)
    out.view(heads, lines, groups, group).copy_(torch.bmm(weights, zero.mT)[..., None])
    by_group = (weights[:, None] * scale[:, :, None]).unbind(1)
    codes = codes.reshape(heads, tokens, part)
    places = out.split(run, dim=-1)
    each = part // run  # places of a plane
    step = min(max(LARGEST // (heads * part), 1), tokens)
    room = Room(weights, (heads, step, part), bits)
    for first in range(0, tokens, step):
        of, some = codes, list(by_group)
        if step < tokens:
            of, some = codes[:, first : first + step], [by[..., first : first + step] for by in by_group]
        numbers = room.take(of.shape)
        runs = numbers.split(run, dim=-1)
        for plane in range(planes):
            room.fill(numbers, of, plane)
            for place in range(plane * each, (plane + 1) * each):
                by = some[place * run // group]
                places[place].baddbmm_(by, runs[place % each], alpha=0.5 ** (plane * bits))
    return out.view(rows, key_heads, lines, width)


class Room:
    """Where codes become floating numbers, block after block.

    Args:
        like: a tensor of the dtype and the device that the numbers are to have.
        shape: of the bytes of the largest block.
        bits: of a code.
    """

    def __init__(self, like: torch.Tensor, shape: tuple[int, ...], bits: int) -> None:
        self.bits = bits
        self.numbers = like.new_empty(shape)
        self.masked = self.numbers if bits == 8 else like.new_empty(shape, dtype=torch.uint8)
        self.taken = self.masked

    def take(self, shape: torch.Size) -> torch.Tensor:
        """Return the room of a block whose bytes are of this shape."""
        whole = self.numbers.shape == shape
        numbers, self.taken = (
            found if whole else found.flatten()[: shape.numel()].view(shape) for found in (self.numbers, self.masked)
        )
        return numbers

    def fill(self, numbers: torch.Tensor, codes: torch.Tensor, plane: int) -> None:
        """Write one code of every byte as a floating number, times `2 ** (plane * bits)`, to where `take` said."""
        if self.bits < 8:
            codes = torch.bitwise_and(codes, _mask(plane, self.bits, codes.device), out=self.taken)
        numbers.copy_(codes)


@functools.cache
def _mask(plane: int, bits: int, device: torch.device) -> torch.Tensor:
    """Return the bits of a byte that a code takes; a number of Python would be made a tensor and cast every time."""
    return torch.tensor(2**bits - 1 << plane * bits, dtype=torch.uint8, device=device)
