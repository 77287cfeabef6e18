"""Take a training batch apart into documents, and put changed documents together into a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: What a batch may hold for each token. Anything else of that shape cannot follow its token.
KNOWN = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
#: Before the name of a tensor: the batch as it was, for the clean loss.
CLEAN = "clean_"


@dataclass(frozen=True)
class Document:
    """One text of a batch, without padding.

    Args:
        tokens: ids.
        labels: what the model learns at each token, not shifted, -100 for nothing. As long as
            `tokens`, but for encoder-decoders, where they are the decoder's text.
        columns: further tensors of the batch, a value a token, padded with 0.

    Example:
        >>> Document([5, 6, 7], [-100, 6, 7]).trained
        [False, True, True]
    """

    tokens: list[int]
    labels: list[int]
    columns: Mapping[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: list[int], labels: list[int]) -> Document:
        """Make a document of a row of a batch.

        Whether the first token's label counts, a batch does not say: nothing predicts it, and
        collators write what they like. Where it moves, it is trained if the second token is.

        Example:
            >>> Document.of([5, 6, 7], [-100, 6, 7]).labels
            [5, 6, 7]
        """
        if len(labels) == len(tokens) > 1:
            labels = [-100 if labels[1] == -100 else tokens[0], *labels[1:]]
        return cls(tokens, labels)

    @property
    def trained(self) -> list[bool]:
        """Whether each token's label counts."""
        return [label != -100 for label in self.labels]

    def cut(self, longest: int | None) -> Document:
        """Return the first `longest` tokens; the document itself if it is no longer."""
        if longest is None or max(len(self.tokens), len(self.labels)) <= longest:
            return self
        columns = {name: values[:longest] for name, values in self.columns.items()}
        return Document(self.tokens[:longest], self.labels[:longest], columns)


@dataclass(frozen=True)
class Layout:
    """How a batch holds its documents: which side is padded with what, and whether rows hold several."""

    pad: int
    left: bool
    packed: bool
    types: bool
    separate_labels: bool


def documents_of(batch: Mapping[str, Any], *, encoder_decoder: bool = False) -> tuple[list[list[Document]], Layout]:
    """Take a batch apart.

    Args:
        batch: `input_ids` and `labels` (batch, length), and `attention_mask` or `position_ids`
            where padding or packing needs them.
        encoder_decoder: labels are another text than the tokens.

    Returns:
        The documents of each row, and what `batch_of` needs to build the batch again.

    Raises:
        ValueError: the batch has no labels, or tensors that cannot follow their tokens.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 0]]), "labels": torch.tensor([[5, 6, -100]])}
        >>> rows, _ = documents_of({**batch, "attention_mask": torch.tensor([[1, 1, 0]])})
        >>> rows[0][0].tokens
        [5, 6]
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None:
        raise ValueError(f"documents are rewritten by input_ids and labels, but the batch has only: {', '.join(batch)}")
    if batch.get("shift_labels") is not None:
        raise ValueError("the collator shifts the labels; rewriting needs labels as the model takes them")
    for name, value in batch.items():
        if name.startswith(("cu_seq_lens", "seq_idx")):
            raise ValueError(
                f"the collator flattens rows ({name}), so that documents cannot change their length any more; "
                "rewrite the data before packing: dataset.map(objective.map(tokenizer), batched=True); an objective "
                "that changes the attention, too, and has no map, takes a collator that pads rows or gives position_ids"
            )
        if name not in KNOWN and isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            raise ValueError(f"{name} has a value for each token, which cannot follow its token; drop it")
    types = batch.get("token_type_ids")
    if types is not None and bool(types.any()):
        raise ValueError("token_type_ids are not all zero, and cannot follow their tokens; drop them from the batch")
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)}; rewriting needs (batch, length)")
    real = torch.ones_like(ids) if mask is None else mask
    separate = encoder_decoder or labels.shape[1] != ids.shape[1]
    rows = []
    starts = _starts(positions, real)
    for row in range(len(ids)):
        kept = real[row].nonzero().flatten()
        tokens = ids[row, kept].tolist()
        wanted = labels[row].tolist() if separate else labels[row, kept].tolist()
        if separate:
            while wanted and wanted[-1] == -100:
                wanted.pop()
        cuts = [0, *[at for at, new in enumerate(starts[row, kept].tolist()) if new and at], len(tokens)]
        if len(cuts) == 2:
            rows.append([Document(tokens, wanted) if separate else Document.of(tokens, wanted)])
        else:
            rows.append([Document.of(tokens[start:stop], wanted[start:stop]) for start, stop in pairwise(cuts)])
    hidden = (real == 0).nonzero()
    layout = Layout(
        pad=int(ids[tuple(hidden[0])]) if len(hidden) else 0,
        left=bool(((real[:, :1] == 0) & (real[:, -1:] != 0)).any()),
        packed=positions is not None,
        types=types is not None,
        separate_labels=separate,
    )
    return rows, layout


def batch_of(rows: Sequence[Sequence[Document]], layout: Layout, multiple: int | None = None) -> dict[str, Tensor]:
    """Build a batch whose rows hold the given documents.

    Args:
        rows: the documents of each row; several are packed one after another.
        layout: as `documents_of` found it.
        multiple: pad to a multiple of this length.

    Example:
        >>> layout = Layout(pad=0, left=False, packed=False, types=False, separate_labels=False)
        >>> batch_of([[Document([5, 6], [5, 6])], [Document([7], [7])]], layout)["input_ids"]
        tensor([[5, 6],
                [7, 0]])
    """
    values: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    names = {name for row in rows for document in row for name in document.columns}
    separate = layout.separate_labels or any(len(d.tokens) != len(d.labels) for row in rows for d in row)
    if layout.packed:
        names.add("position_ids")
    values.update({name: [] for name in names})
    for row in rows:
        gathered: dict[str, list[int]] = {name: [] for name in values}
        for document in row:
            length = len(document.tokens)
            labels = document.labels
            if (gathered["input_ids"] or layout.left) and labels and not separate:
                # a document's first token is predicted by nothing; the shift of labels drops it at a row's start only
                labels = [-100, *labels[1:]]
            gathered["input_ids"] += document.tokens
            gathered["labels"] += labels
            gathered["attention_mask"] += [1] * length
            for name in names:
                default = list(range(length)) if name == "position_ids" else [0] * length
                gathered[name] += document.columns.get(name, default)
        for name, column in gathered.items():
            values[name].append(column)
    pads = {"input_ids": layout.pad, "labels": -100}
    if layout.types:
        values["token_type_ids"] = [[0] * len(row) for row in values["input_ids"]]
    return {name: _padded(columns, pads.get(name, 0), layout.left, multiple) for name, columns in values.items()}


def split_clean(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Part a batch into what the model shall read and the batch before it was rewritten, if it was.

    Example:
        >>> split_clean({"input_ids": 1, "clean_input_ids": 2})
        ({'input_ids': 1}, {'input_ids': 2})
    """
    clean = {name[len(CLEAN) :]: value for name, value in batch.items() if name in _CLEAN_NAMES}
    return {name: value for name, value in batch.items() if name not in _CLEAN_NAMES}, clean or None


def with_clean(batch: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Put the batch as it was beside the rewritten one, unless an earlier rewriting did."""
    if any(name in batch for name in _CLEAN_NAMES):
        return dict(batch)
    return {**batch, **{CLEAN + name: before[name] for name in KNOWN if name in before}}


_CLEAN_NAMES = frozenset(CLEAN + name for name in KNOWN)


def _starts(positions: Tensor | None, real: Tensor) -> Tensor:
    """Mark the first token of each document of a packed row."""
    starts = torch.zeros_like(real, dtype=torch.bool)
    if positions is not None and positions.dim() == 2:
        positions = positions.expand(real.shape)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts


def _padded(columns: list[list[int]], value: int, left: bool, multiple: int | None) -> Tensor:
    longest = max(map(len, columns))
    if multiple:
        longest = -(-longest // multiple) * multiple
    fill = [[value] * (longest - len(column)) for column in columns]
    pairs = zip(columns, fill, strict=True)
    return torch.tensor([[*pad, *column] if left else [*column, *pad] for column, pad in pairs], dtype=torch.long)
