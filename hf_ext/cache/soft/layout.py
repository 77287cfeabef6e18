"""Rows made of pieces: vectors, learned tokens and real tokens side by side, with the padding of all of them in front.

    given    piece 0: slots | piece 1: tokens, padded on either side
             a b c          | p . .                      row 0
             a . .          | . q r                      row 1
    laid     a b c p
             . a q r

Every row is contiguous, so a row reads the same whatever stands beside it in the batch, sliding windows included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: The position of a column that has none; see `hf_ext.cache.soft.positions`.
NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of each row.

    Args:
        vectors: `(rows, columns, width)`, what the model reads.
        mask: `(rows, columns)` bool, False on padding, which may be anywhere.
        counted: whether its columns count as positions; those that do not have none.
    """

    vectors: Tensor
    mask: Tensor
    counted: bool = True


class Layout:
    """Pieces laid out as one batch, and the way back from its columns to those of a piece.

    Args:
        pieces: in the order in which they are read.

    Example:
        >>> slots = Piece(torch.zeros(2, 2, 4), torch.tensor([[True, True], [True, False]]))
        >>> tokens = Piece(torch.ones(2, 3, 4), torch.tensor([[True, False, False], [False, True, True]]))
        >>> layout = Layout([slots, tokens])
        >>> layout.attention_mask.tolist(), layout.position_ids.tolist()
        ([[1, 1, 1], [1, 1, 1]], [[0, 1, 2], [0, 1, 2]])
        >>> layout.places(1).tolist()
        [[2, 2, 2], [0, 1, 2]]
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        dtype = pieces[0].vectors.dtype
        vectors = torch.cat([piece.vectors.to(dtype) for piece in pieces], dim=1)
        mask = torch.cat([piece.mask for piece in pieces], dim=1)
        counted = torch.cat([piece.mask & piece.counted for piece in pieces], dim=1)
        self.widths = [piece.mask.shape[1] for piece in pieces]
        self.columns = max(int(mask.sum(-1).max()), 1)
        order = mask.long().argsort(dim=1, stable=True)[:, -self.columns :]
        positions = (counted.long().cumsum(-1) - 1).masked_fill(~counted & mask, NOWHERE)
        # The last real column up to each given one, in its place among those that were laid.
        self._places = (mask.long().cumsum(-1) - 1 + self.columns - mask.sum(-1, keepdim=True)).clamp_min(0)
        self.inputs_embeds = vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1]))
        self.attention_mask = mask.gather(1, order).long()
        self.position_ids = positions.gather(1, order).masked_fill(self.attention_mask == 0, 0)

    def places(self, number: int) -> Tensor:
        """Return `(rows, columns)`, where a piece's columns were laid; for padding, the last real one before it."""
        start = sum(self.widths[:number])
        return self._places[:, start : start + self.widths[number]]

    def take(self, values: Tensor, places: Tensor) -> Tensor:
        """Return the values `(rows, n, ...)` at `(rows, n)` places."""
        return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))

    def inputs(self) -> dict[str, Any]:
        """Return embeddings, mask and positions, as a model takes them."""
        return {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
