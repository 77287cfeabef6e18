"""Rows that an in-context autoencoder learns from: texts to repeat or to continue, and questions about a context."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ICAECollator:
    """Make batches for `ICAEModel` of tokenised texts, or of contexts with instructions.

    A row with nothing but `input_ids` is a text. Some of the texts are to be repeated from their slots (the
    autoencoding loss), the others to be continued (the language-modelling loss). Which, and where a text is cut,
    depends on the text and the seed only: not on the batch, its split by accumulation, or the number of processes.

    A row with `context_ids`, `input_ids` and `labels` is an instruction: what is compressed, the prompt and its
    answer, and the answer's labels with -100 on the prompt. The Trainer drops `context_ids` unless
    `TrainingArguments(remove_unused_columns=False)`.

    Args:
        pad_token_id: what padding is filled with.
        eos_token_id: ends a context that is repeated; none by default.
        continued: share of the texts that are continued rather than repeated.
        context: tokens of a context at most.
        left_out: first tokens of a continuation that no loss is taken of.
        shortest: tokens of a continuation at least; shorter texts are repeated.
        seed: of the cuts.

    Raises:
        ValueError: a share outside of 0 to 1, or lengths that are not positive.

    Example:
        >>> batch = ICAECollator(eos_token_id=2, continued=0)([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
        >>> batch["context_ids"].tolist(), batch["input_ids"].tolist()
        ([[5, 6, 7], [0, 0, 8]], [[0, 5, 6, 7, 2], [0, 0, 0, 8, 2]])
        >>> batch["labels"].tolist()[1], batch["reconstruct"].tolist()
        ([-100, -100, -100, 8, 2], [True, True])
    """

    pad_token_id: int = 0
    eos_token_id: int | None = None
    continued: float = 0.5
    context: int = 512
    left_out: int = 8
    shortest: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.continued <= 1:
            raise ValueError(f"continued is a share from 0 to 1, got {self.continued!r}")
        if self.context < 1 or self.shortest < 1 or self.left_out < 0:
            raise ValueError("context and shortest are numbers of tokens from 1, left_out from 0")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch, padded on the left, and always by a column at least.

        The first token is predicted too; without a column before it, the Trainer would not count it as a target.
        """
        made = [self._row(row) for row in rows]
        contexts, read, labels = [row[0] for row in made], [row[1] for row in made], [row[2] for row in made]
        widest = max(map(len, read)) + 1
        return {
            "context_ids": _padded(contexts, self.pad_token_id),
            "context_mask": _padded([[1] * len(row) for row in contexts], 0),
            "input_ids": _padded(read, self.pad_token_id, widest),
            "attention_mask": _padded([[1] * len(row) for row in read], 0, widest),
            "labels": _padded(labels, -100, widest),
            "reconstruct": torch.tensor([row[3] for row in made]),
        }

    def _row(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int], bool]:
        """Return context, what is read after it, labels, and whether the context is to be repeated."""
        ids = [int(token) for token in row["input_ids"]]
        if "context_ids" in row:
            labels = [int(label) for label in row["labels"]]
            if len(labels) != len(ids):
                raise ValueError(f"a row has {len(ids)} input_ids and {len(labels)} labels")
            return [int(token) for token in row["context_ids"]], ids, labels, False
        if "labels" in row:
            raise ValueError(
                "a row has labels and no context_ids. A text has input_ids only; for instructions set "
                "TrainingArguments(remove_unused_columns=False), or the Trainer drops context_ids"
            )
        if not ids:
            raise ValueError("a text has no tokens; drop empty rows")
        return self._text(ids)

    def _text(self, ids: list[int]) -> tuple[list[int], list[int], list[int], bool]:
        draw = random.Random(zlib.crc32(repr((self.seed, ids)).encode()))
        repeated = draw.random() >= self.continued
        if not repeated and len(ids) > self.shortest:
            end = draw.randint(1, len(ids) - self.shortest)
            rest = ids[end : end + self.context]
            labels = [-100] * min(self.left_out, len(rest)) + rest[self.left_out :]
            return ids[max(end - self.context, 0) : end], rest, labels, False
        start = draw.randint(0, max(len(ids) - self.context, 0))
        context = ids[start : start + self.context]
        read = context if self.eos_token_id is None else [*context, self.eos_token_id]
        return context, read, list(read), True


def _padded(rows: Sequence[Sequence[int]], value: int, width: int | None = None) -> Tensor:
    """Pad on the left."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
