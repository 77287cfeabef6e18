"""Where the segments of a prompt's sets lie, as ranges of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_ext.attention import AttentionStructure


@dataclass(frozen=True)
class Members:
    """One set of segments of one row.

    Args:
        spans: first column of every segment, and the column after its last.
        ranks: the place of every segment when they are sorted by their tokens; equal ones stand as given.

    Example:
        >>> members = Members(((2, 5), (5, 6)), (1, 0))
        >>> members.first, members.last, members.lengths
        (2, 6, (3, 1))
    """

    spans: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]

    @property
    def first(self) -> int:
        """First column of the set."""
        return self.spans[0][0]

    @property
    def last(self) -> int:
        """The column after the set."""
        return self.spans[-1][1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(stop - start for start, stop in self.spans)


def sets_of(structure: AttentionStructure, ids: torch.Tensor) -> list[list[Members]]:
    """Return the sets of every row, in the order of their columns.

    Args:
        structure: as `AttentionStructure.segments` makes it, left-padded.
        ids: `(batch, columns)` int64, the tokens.

    Example:
        >>> structure = AttentionStructure.causal(torch.ones(1, 6)).segments(torch.tensor([[0, 1, 1, 2, 0, 3]]))
        >>> [members.spans for members in sets_of(structure, torch.arange(6)[None])[0]]
        [((1, 3), (3, 4)), ((5, 6),)]
    """
    assert structure.keys.group is not None  # made by `segments`
    assert structure.keys.segment is not None
    groups, segments = structure.keys.group.tolist(), structure.keys.segment.tolist()
    return [_row(*row) for row in zip(groups, segments, ids.tolist(), strict=True)]


def _row(groups: list[int], segments: list[int], ids: list[int]) -> list[Members]:
    spans: dict[int, list[tuple[int, int]]] = {}
    column = 0
    while column < len(groups):
        start, owner = column, (groups[column], segments[column])
        while column < len(groups) and (groups[column], segments[column]) == owner:
            column += 1
        if owner[0]:
            spans.setdefault(owner[0], []).append((start, column))
    found = []
    for own in spans.values():
        order = sorted(range(len(own)), key=lambda number: ids[slice(*own[number])])
        found.append(Members(tuple(own), tuple(order.index(number) for number in range(len(own)))))
    return found
