"""The structure that a mask function of transformers describes.

transformers says who sees whom as a function of indices, put together from causality, windows, chunks,
packed sequences and the like. `adapter.describe_mask_function` names its parts; here they become the
fields of a structure. What has no exact counterpart is refused, and becomes a dense mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_ext.attention.structure import NEVER, AttentionStructure, Tokens

Part = tuple[Any, ...]


def structure_of(
    parts: Sequence[Part],
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> AttentionStructure | None:
    """Return the structure of a mask function, or None if there is none that is exactly the same.

    Args:
        parts: what `adapter.describe_mask_function` returned.
        q_length: number of queries.
        kv_length: number of keys.
        q_offset: index of the first query.
        kv_offset: index of the first key.
        attention_mask: `(rows, tokens)` bool, False on padding, or None; keys beyond it are padding.
        device: where the fields are put.
    """
    read = _Reader(torch.arange(q_length, device=device) + q_offset, torch.arange(kv_length, device=device) + kv_offset)
    if not all(read.part(part, None) for part in parts):
        return None
    keys = read.order[1] if read.order is not None else torch.zeros_like(read.indices[1])[None]
    queries = read.order[0] if read.order is not None else torch.zeros_like(read.indices[0])[None]
    if read.blind:
        queries = torch.full_like(queries, -1)
    if read.position is None:
        # Without a window nobody asks where a token stands.
        read.position = (torch.zeros_like(queries), torch.zeros_like(keys))
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        real = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        keys = torch.where(real.to(device)[:, read.indices[1]].bool(), keys, NEVER)
    segment = read.segment if read.segment is not None else (None, None)
    sides = []
    for order, position, own in zip((queries, keys), read.position, segment, strict=True):
        group = None if own is None else torch.ones_like(own, dtype=torch.int32)
        sides.append(Tokens(order.int(), position.int(), group, None if own is None else own.int()))
    return AttentionStructure(sides[0], sides[1], window=read.window)


class _Reader:
    """Collects the fields while it goes through the parts; pairs are those of queries and of keys."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        self.indices = (queries, keys)
        self.order: tuple[torch.Tensor, torch.Tensor] | None = None
        self.position: tuple[torch.Tensor, torch.Tensor] | None = None
        self.segment: tuple[torch.Tensor, torch.Tensor] | None = None
        self.window: int | None = None
        self.blind = False  # nobody sees anything

    def part(self, part: Part, numbers: torch.Tensor | None) -> bool:
        """Take in a part that counts `numbers` of the indices, or the indices; False if it does not fit."""
        kind, *values = part
        if kind == "everything":
            return True
        if kind == "causal":
            return self._ordered(numbers, 0)
        if kind == "window":
            return self._windowed(numbers, values[0])
        if kind == "near":
            return self._ordered(numbers, values[0]) and self._windowed(numbers, values[0] + 1)
        if kind == "chunks":
            size, left = values
            queries, keys = self._numbered(numbers)
            return self._separate((queries - left[:, None]) // size, (keys - left[:, None]) // size)
        if kind == "sequences" and numbers is None:
            return self._separate(*(values[0][:, index] for index in self.indices))
        if kind == "renumbered" and numbers is None:
            return all(self.part(inner, values[0]) for inner in values[1])
        if kind == "any" and numbers is None:
            return self._blocks(values)
        return False

    def _numbered(self, numbers: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = self.indices
        return (queries[None], keys[None]) if numbers is None else (numbers[:, queries], numbers[:, keys])

    def _ordered(self, numbers: torch.Tensor | None, ahead: int) -> bool:
        if self.order is not None:
            return False
        queries, keys = self._numbered(numbers)
        self.order = (queries + ahead, keys)
        return True

    def _windowed(self, numbers: torch.Tensor | None, window: int) -> bool:
        if self.window is not None:
            return False
        if window < 1:  # so Qwen2-MoE says that it has none, of a mask that no layer of it reads
            self.blind = True
            return True
        self.window, self.position = window, self._numbered(numbers)
        return True

    def _separate(self, queries: torch.Tensor, keys: torch.Tensor) -> bool:
        if self.segment is not None:
            return False
        self.segment = (queries, keys)
        return True

    def _blocks(self, members: Sequence[Sequence[Part]]) -> bool:
        """Take in blocks whose tokens see each other besides plain causality: an order up to the block's end."""
        if len(members) != 2 or list(members[0]) != [("causal",)] or len(members[1]) != 1:
            return False
        kind, *values = members[1][0]
        if kind != "blocks" or self.order is not None or torch.compiler.is_compiling():
            return False
        ends = _ends(values[0])
        if ends is None:
            return False
        self.order = (ends[:, self.indices[0]], self.indices[1][None])
        return True


def _ends(blocks: torch.Tensor) -> torch.Tensor | None:
    """Return the last index of each token's block, its own outside of blocks; None for a block in pieces.

    Args:
        blocks: `(rows, tokens)` int, negative outside of blocks.
    """
    columns = torch.arange(blocks.shape[1], device=blocks.device).expand(blocks.shape)
    last = torch.ones_like(blocks, dtype=torch.bool)
    last[:, :-1] = (blocks[:, 1:] != blocks[:, :-1]) | (blocks[:, :-1] < 0)
    for row, ended in zip(blocks, last & (blocks >= 0), strict=True):
        numbers = row[ended]
        if len(numbers.unique()) != len(numbers):
            return None
    ends = torch.where(last, columns, blocks.shape[1])
    return ends.flip(-1).cummin(-1).values.flip(-1)
