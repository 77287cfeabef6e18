"""Batches for a `Nugget2DModel`: texts cut into contexts and what follows them, or contexts to be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class NuggetCollator:
    """Make batches of contexts and of what is to be said after them.

    A row is `{"input_ids": text}`, which is cut: the first tokens are the context and the others are learnt (language
    modelling), or the context is learnt again after `start_token_id` (autoencoding). Or it has `context_ids`,
    `input_ids` and `labels` already.

    Args:
        context: most tokens of a context; at least two of a text that is cut are left to be learnt.
        autoencode: whether texts are repeated rather than continued.
        start_token_id: what stands before a repeated text, such as the tokenizer's bos token.
        pad_token_id: where there is nothing.

    Raises:
        ValueError: an option that is none, or a text too short to be cut.

    Example:
        >>> batch = NuggetCollator(context=3, autoencode=True, start_token_id=1)([{"input_ids": [5, 6, 7]}])
        >>> batch["context_ids"].tolist(), batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7]], [[1, 5, 6, 7]], [[-100, 5, 6, 7]])
    """

    context: int = 512
    autoencode: bool = False
    start_token_id: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 1:
            raise ValueError(f"context must be a number of tokens from 1, got {self.context!r}")
        if self.autoencode and self.start_token_id is None:
            raise ValueError("a text that is repeated begins with a token of its own: give start_token_id")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch: contexts padded on the left, what follows them on the right."""
        cut = [self._cut(row) for row in rows]

        def padded(name: str, fill: int, left: bool) -> Tensor:
            longest = max(len(row[name]) for row in cut)
            gaps = [[fill] * (longest - len(row[name])) for row in cut]
            return torch.tensor(
                [gap + row[name] if left else row[name] + gap for gap, row in zip(gaps, cut, strict=True)]
            )

        for row in cut:
            row |= {"context_mask": [1] * len(row["context_ids"]), "attention_mask": [1] * len(row["input_ids"])}
        return {
            "context_ids": padded("context_ids", self.pad_token_id, True),
            "context_mask": padded("context_mask", 0, True),
            "input_ids": padded("input_ids", self.pad_token_id, False),
            "attention_mask": padded("attention_mask", 0, False),
            "labels": padded("labels", -100, False),
        }

    def _cut(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        if "context_ids" in row:
            return {name: list(map(int, row[name])) for name in ("context_ids", "input_ids", "labels")}
        text = list(map(int, row["input_ids"]))
        if self.autoencode:
            context = text[: self.context]
            if not context:
                raise ValueError("a text to be repeated needs a token")
            return {
                "context_ids": context,
                "input_ids": [int(self.start_token_id or 0), *context],
                "labels": [-100, *context],
            }
        if len(text) < 3:
            raise ValueError(
                f"a text of {len(text)} tokens is too short to be cut into a context and two tokens after it"
            )
        place = min(self.context, len(text) - 2)
        rest = text[place:]
        return {"context_ids": text[:place], "input_ids": rest, "labels": [-100, *rest[1:]]}
