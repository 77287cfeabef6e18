"""Spans of a batch, as MetaLM takes them: reading, checking, and masking the labels inside.

Imports torch only: this file is part of the Hub repository.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

#: Start and end of an entry that stands for no span, in rows that have fewer spans than others.
ABSENT = -1


class Span(NamedTuple):
    """A span: its row, which entry of the row it is, and its columns `[start, end)`."""

    row: int
    entry: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"the span [{self.start}, {self.end}) of row {self.row}"


def bounds_of(spans: torch.Tensor, name: str = "spans") -> torch.Tensor:
    """Return spans as bounds.

    Args:
        spans: `(batch, entries, 2)` columns `[start, end)`, entries of `-1, -1` being none; or `(batch, columns)`
            with 0 outside spans and the same positive number in all columns of a span.
        name: how errors call it.

    Returns:
        `(batch, entries, 2)` int64.

    Raises:
        ValueError: another shape or type, a negative number, a number that stands in two places of a row.

    Example:
        >>> bounds_of(torch.tensor([[0, 1, 1, 0, 2], [0, 0, 0, 3, 3]])).tolist()
        [[[1, 3], [4, 5]], [[3, 5], [-1, -1]]]
    """
    if not isinstance(spans, torch.Tensor) or spans.is_floating_point() or spans.dtype == torch.bool:
        raise ValueError(f"{name} must be a tensor of whole numbers, got {getattr(spans, 'dtype', type(spans))}")
    if spans.ndim == 3 and spans.shape[2] == 2:
        return spans.long()
    if spans.ndim != 2:
        raise ValueError(
            f"{name} has the shape {tuple(spans.shape)}; expected (batch, entries, 2) with the first column of each "
            "span and the one after its last, or (batch, columns) with a number for each span and 0 outside"
        )
    rows = [_runs(row, number, name) for number, row in enumerate(spans.tolist())]
    return padded(rows).to(spans.device)


def padded(rows: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """Return the bounds of each row as one tensor.

    Example:
        >>> padded([[(0, 2)], []]).tolist()
        [[[0, 2]], [[-1, -1]]]
    """
    entries = max(map(len, rows), default=0)
    filled = [[*row, *[(ABSENT, ABSENT)] * (entries - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long).reshape(len(rows), entries, 2)


def _runs(numbers: list[int], row: int, name: str) -> list[tuple[int, int]]:
    """Return where each positive number stands."""
    found: dict[int, tuple[int, int]] = {}
    for column, number in enumerate(numbers):
        if number < 0:
            raise ValueError(f"{name} has {number} in row {row}; expected 0 outside spans and positive numbers inside")
        if number == 0:
            continue
        start, end = found.get(number, (column, column))
        if end != column:
            raise ValueError(f"{name} has the span {number} of row {row} in several pieces; give each piece a number")
        found[number] = (start, column + 1)
    return list(found.values())


def find(bounds: torch.Tensor, shape: tuple[int, int], name: str = "spans") -> list[Span]:
    """Return the spans of a batch, in the order of their entries.

    Args:
        bounds: `(batch, entries, 2)`.
        shape: rows and columns of the batch.
        name: how errors call it.

    Raises:
        ValueError: another number of rows, an empty span, one outside the text.

    Example:
        >>> find(torch.tensor([[[1, 3], [-1, -1]]]), (1, 4))
        [Span(row=0, entry=0, start=1, end=3)]
        >>> find(torch.tensor([[[2, 2]]]), (1, 4))
        Traceback (most recent call last):
        ...
        ValueError: the span [2, 2) of row 0 is empty; leave it out (an entry of -1, -1 is none)
    """
    if len(bounds) != shape[0]:
        raise ValueError(f"{name} has {len(bounds)} rows, the batch {shape[0]}")
    found = []
    for row, entries in enumerate(bounds.tolist()):
        for entry, (start, end) in enumerate(entries):
            if start == end == ABSENT:
                continue
            span = Span(row, entry, start, end)
            if start == end:
                raise ValueError(f"{span} is empty; leave it out (an entry of -1, -1 is none)")
            if start < 0 or end > shape[1] or start > end:
                raise ValueError(f"{span} lies outside the text, which has {shape[1]} columns, padding included")
            found.append(span)
    return found


def check(
    found: Sequence[Span], attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
) -> None:
    """Check spans of all kinds against each other and against the batch.

    Args:
        found: all spans, of text and of images.
        attention_mask: `(batch, columns)` with 0 on padding.
        labels: `(batch, columns)`, -100 where there is no target.

    Raises:
        ValueError: spans overlap, one holds another, one covers padding, or there are labels inside.

    Example:
        >>> check([Span(0, 0, 1, 4), Span(0, 1, 2, 3)])
        Traceback (most recent call last):
        ...
        ValueError: the span [2, 3) of row 0 lies inside the span [1, 4) of row 0; spans must not be nested
    """
    ordered = sorted(found, key=lambda span: (span.row, span.start, -span.end))
    for before, after in itertools.pairwise(ordered):
        if before.row == after.row and after.start < before.end:
            nested = after.end <= before.end
            raise ValueError(
                f"{after} {'lies inside' if nested else 'overlaps'} {before}; spans must not "
                f"{'be nested' if nested else 'overlap'}"
            )
    if attention_mask is not None:
        shown = attention_mask.bool().tolist()
        for span in found:
            if not all(shown[span.row][span.start : span.end]):
                raise ValueError(
                    f"{span} covers padding; spans are columns of the batch as it is, padding on the left included"
                )
    if labels is not None:
        targets = (labels != -100).tolist()
        for span in found:
            if any(targets[span.row][span.start : span.end]):
                raise ValueError(
                    f"{span} has labels inside, but what an encoder has read is not predicted: use SemiCausalCollator, "
                    "or outside_spans(labels, spans), before the Trainer counts the labels"
                )


def outside_spans(labels: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Return labels with -100 inside spans.

    Args:
        labels: `(batch, columns)`; left as it is.
        spans: in either form of `bounds_of`.

    Example:
        >>> outside_spans(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[[1, 3]]])).tolist()
        [[5, -100, -100, 8]]
    """
    masked = labels.clone()
    for span in find(bounds_of(spans), (labels.shape[0], labels.shape[1])):
        masked[span.row, span.start : span.end] = -100
    return masked


def places(spans: Sequence[Span], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and the columns of all tokens of all spans.

    Example:
        >>> places([Span(0, 0, 1, 3), Span(1, 0, 0, 1)], torch.device("cpu"))
        (tensor([0, 0, 1]), tensor([1, 2, 0]))
    """
    rows = [span.row for span in spans for _ in range(span.start, span.end)]
    columns = [column for span in spans for column in range(span.start, span.end)]
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)
