"""Semi-causal language modelling (arXiv:2206.06336, section 2.3) as a data collator for the stock Trainer.

Imports torch and transformers only: this file is part of the Hub repository.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, default_data_collator

from .spans_metalm import outside_spans, padded


def random_spans(
    length: int, share: float, min_length: int, max_length: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Draw spans that cover a share of a text, in random places.

    At least one token stands before, between and behind them, so that something is predicted from each.

    Args:
        length: tokens of the text.
        share: of them that spans cover, rounded to whole tokens; a last piece below `min_length` is left out.
        min_length: tokens of a span at least; a text whose share is less has one span of that share.
        max_length: tokens of a span at most.
        generator: of the random numbers.

    Returns:
        Bounds `[start, end)`, in order.

    Example:
        >>> random_spans(20, 0.5, 2, 4, torch.Generator().manual_seed(0))
        [(2, 6), (8, 10), (11, 15)]
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    remaining = round(share * length)
    least, lengths = max(1, min(min_length, remaining)), []
    while remaining >= least:
        lengths.append(draw(least, min(max_length, remaining)))
        remaining -= lengths[-1]
    while lengths and sum(lengths) + len(lengths) + 1 > length:
        lengths.pop()
    free = length - sum(lengths) - len(lengths) - 1
    cuts = sorted(draw(0, free) for _ in lengths)
    spans, taken = [], 1
    for cut, size in zip(cuts, lengths, strict=True):
        spans.append((cut + taken, cut + taken + size))
        taken += size + 1
    return spans


class SemiCausalCollator(TrainerCallback):
    """Choose random spans of every row for the encoder and take the labels inside them away.

    `Trainer(model, args, train_dataset=rows, data_collator=SemiCausalCollator(collator))` is all it takes. What is
    drawn is a function of seed, epoch and the tokens of the row, so that no split of a batch, no order, no number of
    workers or processes and no resumed run changes it. A row has the same spans in every epoch, and in every
    evaluation, unless the collator is given as callback as well (`callbacks=[collator]`), which tells it the epoch.

    Args:
        collator: makes batches of rows, with `input_ids` and, if there is padding, `attention_mask`; without
            `labels` they are the tokens. transformers' `default_data_collator` by default, for rows of one length.
        share: of a row's tokens that spans cover.
        min_length: tokens of a span at least.
        max_length: tokens of a span at most; no more than the encoder has positions for.
        boundary_token_id: a token between documents, such as eos: none stands in a span, and each document has spans
            of its own.
        seed: base of the random numbers.

    Raises:
        ValueError: an option is out of range; a batch without ids, with spans of its own or with packed rows.

    Example:
        >>> rows = [{"input_ids": list(range(12))}]
        >>> batch = SemiCausalCollator(min_length=2, max_length=3)(rows)
        >>> batch["spans"].tolist()
        [[[2, 4]]]
        >>> batch["labels"].tolist()
        [[0, 1, -100, -100, 4, 5, 6, 7, 8, 9, 10, 11]]
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], Any] = default_data_collator,
        share: float = 0.25,
        min_length: int = 64,
        max_length: int = 128,
        boundary_token_id: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"share={share!r} must be a number above 0 and below 1 (0.25: a quarter of each row)")
        for name, value in (("min_length", min_length), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number >= 1")
        if min_length > max_length:
            raise ValueError(f"min_length={min_length} must not be above max_length={max_length}")
        self.collator, self.share, self.seed = collator, share, seed
        self.min_length, self.max_length, self.boundary_token_id = min_length, max_length, boundary_token_id
        self.epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the epoch, if the collator is among the Trainer's callbacks."""
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the batch with `spans`, and with labels outside them only."""
        batch = dict(self.collator(rows))
        ids, positions = batch.get("input_ids"), batch.get("position_ids")
        if ids is None or "spans" in batch:
            raise ValueError(f"expected a batch with input_ids and without spans, got one with {', '.join(batch)}")
        if positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any()):
            raise ValueError("positions go back within a row: spans of packed rows are not known; switch packing off")
        mask = batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        spans = padded([self.spans_of(row, kept) for row, kept in zip(ids, real, strict=True)])
        labels = batch["labels"] if "labels" in batch else ids.masked_fill(~real, -100)
        return {**batch, "spans": spans, "labels": outside_spans(labels, spans)}

    def spans_of(self, ids: torch.Tensor, real: torch.Tensor) -> list[tuple[int, int]]:
        """Draw the spans of one row.

        Args:
            ids: `(columns,)`.
            real: `(columns,)` bool, False on padding.

        Returns:
            Bounds in columns of the row.
        """
        columns = real.nonzero()[:, 0].tolist()
        tokens = ids[real]
        key = f"{self.seed}-{self.epoch}-{tokens.tolist()}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        ends = [] if self.boundary_token_id is None else (tokens == self.boundary_token_id).nonzero()[:, 0].tolist()
        spans, start = [], 0
        for end in (*ends, len(tokens)):
            drawn = random_spans(end - start, self.share, self.min_length, self.max_length, generator)
            spans += [(columns[start + first], columns[start + last - 1] + 1) for first, last in drawn]
            start = end + 1
        return spans
