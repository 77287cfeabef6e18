"""Where texts are cut into segments, and batches of texts with their cuts."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def lengths_of(segments: int | Sequence[int] | Tensor, real: Tensor) -> Tensor:
    """Return the number of tokens of each segment of each row.

    Args:
        segments: the length of all segments; or lengths, for all rows or `(rows, segments)`, in which case the last
            segment of a row takes what is left over.
        real: `(rows, columns)` bool, the tokens.

    Returns:
        `(rows, segments)` int64; 0 where a row has ended.

    Raises:
        ValueError: lengths below 1, or of another number of rows.

    Example:
        >>> lengths_of(3, torch.ones(1, 7, dtype=torch.bool)).tolist()
        [[3, 3, 1]]
        >>> lengths_of([2, 9], torch.tensor([[True] * 4, [True] + [False] * 3])).tolist()
        [[2, 2], [1, 0]]
    """
    totals = real.sum(-1, keepdim=True)
    if isinstance(segments, int) and not isinstance(segments, bool):
        if segments < 1:
            raise ValueError(f"a segment has one token at least, got the length {segments}")
        segments = [segments] * max(-(-int(totals.max()) // segments), 1)
    lengths = torch.as_tensor(segments, device=real.device).long()
    lengths = lengths.expand(len(real), -1) if lengths.ndim == 1 else lengths
    if lengths.ndim != 2 or len(lengths) != len(real) or lengths.shape[1] == 0:
        raise ValueError(
            f"segments must be a length, a list of lengths, or (rows, segments) lengths for {len(real)} rows, got the "
            f"shape {tuple(lengths.shape)}"
        )
    if bool((lengths < 0).any()) or not bool((lengths[:, 0] > 0).all()):
        raise ValueError(f"segments have one token at least, got {lengths.tolist()}")
    ends = lengths.cumsum(-1)
    ends[:, -1] = torch.maximum(ends[:, -1], totals[:, 0])
    ends = torch.minimum(ends, totals)
    return ends.diff(dim=-1, prepend=torch.zeros_like(totals))


@dataclass
class SegmentCollator:
    """Make batches for an `AutoCompressorModel` of tokenised texts, cut into segments of random lengths.

    Where a text is cut depends on the text and the seed only: not on the batch, its split by accumulation, or the
    number of processes. Rows have `input_ids`, and `labels` if these are others.

    Args:
        shortest: tokens of a segment at least, but for a text's last one.
        longest: at most.
        pad_token_id: what padding, on the right, is filled with.
        seed: of the cuts.

    Raises:
        ValueError: lengths that are no range, or a row without tokens.

    Example:
        >>> batch = SegmentCollator(2, 4)([{"input_ids": list(range(9))}, {"input_ids": [7, 8, 9]}])
        >>> batch["segments"].sum(-1).tolist(), batch["attention_mask"].sum(-1).tolist()
        ([9, 3], [9, 3])
    """

    shortest: int = 1024
    longest: int = 2048
    pad_token_id: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"segments have from shortest to longest tokens, one at least; got {self.shortest} and {self.longest}"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `labels` and `segments`, padded on the right."""
        ids = [[int(token) for token in row["input_ids"]] for row in rows]
        labels = [
            [int(label) for label in row["labels"]] if "labels" in row else own
            for row, own in zip(rows, ids, strict=True)
        ]
        if empty := [number for number, row in enumerate(ids) if not row]:
            raise ValueError(f"row {empty[0]} of the batch has no tokens; drop empty rows")
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "labels": _padded(labels, -100),
            "segments": _padded([self.cut(row) for row in ids], 0),
        }

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the lengths of a text's segments."""
        draw, left, lengths = random.Random(zlib.crc32(repr((self.seed, list(ids))).encode())), len(ids), []
        while left:
            lengths.append(min(draw.randint(self.shortest, self.longest), left))
            left -= lengths[-1]
        return lengths


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows])
