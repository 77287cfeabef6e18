"""CodeGen2's mixture: half causal language modelling, half span corruption within a file (arXiv:2305.02309).

    a <mask_1> b <mask_2> c <eos> <sep> <mask_1> x <eom> <mask_2> y <eom>

Attention and loss stay those of next-token prediction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_ext.trainer_callbacks.infilling import Pair
from hf_ext.trainer_callbacks.moved_spans import MovedSpans, compose, restore_spans
from hf_ext.trainer_callbacks.token_ids import token_id


def corrupted_spans(length: int, masked: int, count: int, draw: random.Random) -> list[tuple[int, int]]:
    """Draw `count` spans of `masked` tokens in all, with at least one token between any two.

    Every such choice of spans is as likely as any other.

    Args:
        length: of the document.
        masked: tokens in the spans, from `count`; at most `length - count + 1`.
        count: spans.
        draw: random numbers.

    Returns:
        Spans in the order of the document.

    Example:
        >>> corrupted_spans(5, 3, 3, random.Random(0))
        [(0, 1), (2, 3), (4, 5)]
    """
    lengths = compose(masked, count, draw)
    # gaps before, between and after; the outer two may be empty, so they are drawn one longer
    gaps = compose(length - masked + 2, count + 1, draw)
    spans, at = [], gaps[0] - 1
    for span, gap in zip(lengths, gaps[1:], strict=True):
        spans.append((at, at + span))
        at += span + gap
    return spans


@dataclass(eq=False)
class CodeGen2(MovedSpans):
    """Train CodeGen2's mixture: documents as they are, and documents of which spans are to be filled in.

    Each document by itself ("file-level") is left alone with probability `causal_share`, to the bit. Of the
    others, a share of tokens drawn from `mask_ratio` is moved behind the end of the text and a
    separator, in spans of about `mean_span` tokens.

    The paper also tried prefix-LM attention, and found no gain from it. That is another callback here:
    `callbacks=[CodeGen2(train_context=False), PrefixLMTraining()]` lets the corrupted document be read in
    both directions, and trains the spans only.

    Args:
        causal_share: probability that a document stays as it is; 1 is plain next-token prediction, bit for bit.
        mask_ratio: the smallest and the largest share of a document that is moved; drawn for each document.
        mean_span: how long spans are on average, as far as `max_spans` allows; None for one span.
        train_context: whether the corrupted document is learned, too, and not the spans behind it only.
        mask_tokens: see `MovedSpans`; `<mask_1>`, `<mask_2>`, ... by default.
        separator_token: text or id of what stands between the document and its spans.
        end_token: see `MovedSpans`.
        max_spans: no more spans than that; each needs a mask.
        train_masks: see `MovedSpans`.
        level: `"token"`, or `"character"`.
        bos_token: see `Infilling`.
        eos_token: see `Infilling`.
        max_length: see `Rewriting`.
        pad_to_multiple_of: see `Rewriting`.
        seed: base of the random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range; at the beginning, a sentinel is not in the vocabulary, or
            there is no end-of-text token.

    Example:
        >>> from hf_ext.trainer_callbacks.documents import Document
        >>> marks = {"mask_tokens": [5], "separator_token": 6, "end_token": 7, "eos_token": 2}
        >>> objective = CodeGen2(causal_share=0, max_spans=1, **marks)
        >>> objective.resolve(None, None)
        >>> row = objective.rewrite(Document([10, 11, 12, 13], [10, 11, 12, 13]), random.Random(1)).tokens
        >>> row, objective.restore(row)
        ([5, 12, 13, 2, 6, 5, 10, 11, 7], [10, 11, 12, 13, 2])
        >>> CodeGen2(mask_ratio=(0.5, 0.1))
        Traceback (most recent call last):
        ...
        ValueError: mask_ratio must be two shares with 0 < smallest <= largest < 1, got (0.5, 0.1)
    """

    slug: ClassVar[str] = "codegen2"
    paper: ClassVar[str] = "CodeGen2: Lessons for Training LLMs on Programming and Natural Languages (arXiv:2305.02309)"
    first: ClassVar[int] = 1

    causal_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.05, 0.5)
    mean_span: int | None = None
    train_context: bool = True
    mask_tokens: str | Sequence[str | int] = field(default="<mask_{}>", kw_only=True)
    separator_token: str | int = field(default="<sep>", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share, span = self.causal_share, self.mean_span
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"causal_share must be a share from 0 to 1, got {share!r}")
        try:
            smallest, largest = self.mask_ratio
            in_order = 0 < smallest <= largest < 1
        except (TypeError, ValueError):
            in_order = False
        if not in_order:
            raise ValueError(f"mask_ratio must be two shares with 0 < smallest <= largest < 1, got {self.mask_ratio!r}")
        if span is not None and (isinstance(span, bool) or not isinstance(span, int) or span < 1):
            raise ValueError(f"mean_span must be a number of tokens from 1, or None for one span, got {span!r}")

    def find_sentinels(self, tokenizer: Any, config: Any) -> Sequence[int]:
        """Find the masks, the end of a span, and the separator."""
        found = super().find_sentinels(tokenizer, config)
        if self._end_of_text is None:
            raise ValueError(
                f"{self.name} needs an end-of-text token before its separator, but neither tokenizer nor config has "
                "one: eos_token=..."
            )
        self._separator = token_id(self.separator_token, tokenizer, config, purpose="separator")
        return [*found, self._separator]

    def plan(self, draw: random.Random) -> float | None:
        """Draw whether the document is corrupted, and how much of it."""
        if draw.random() < self.causal_share:
            return None
        return draw.uniform(*self.mask_ratio)

    def spans(self, plan: float, length: int, draw: random.Random) -> list[tuple[int, int]]:
        """Draw the spans; none in a document that is too short for one."""
        masked = min(max(1, round(plan * length)), length - 1)
        if masked < 1:
            return []
        wanted = 1 if self.mean_span is None else max(1, round(masked / self.mean_span))
        count = min(wanted, self.max_spans, masked, length - masked + 1)
        return corrupted_spans(length, masked, count, draw)

    def arrange(self, plan: float, parts: list[list[Pair]], tail: list[Pair]) -> list[Pair]:
        """Put masks into the places of the spans, and the spans behind end of text and separator."""
        end = self._end_of_text
        assert end is not None
        return self._arranged(parts, tail or [(end, end)], [(self._separator, self._separator)])

    def _rewritten_text(self, text: list[Pair], draw: random.Random, room: int | None) -> list[Pair]:
        new = super()._rewritten_text(text, draw, room)
        if new is text or self.train_context:
            return new
        spans = [token for token, _ in new].index(self._separator) + 2  # behind the first mask
        return [(token, -100) for token, _ in new[:spans]] + new[spans:]

    def prompt(self, kept: Sequence[list[int]], filled: Sequence[list[int]], ending: Sequence[int] | None) -> list[int]:
        """Return the parts with masks between them, end of text, separator, the filled spans, and the next mask."""
        end = self._end_of_text
        assert end is not None
        return self._prompt(kept, filled, [end] if ending is None else ending, [self._separator])

    def restore(self, tokens: Sequence[int]) -> list[int]:
        """Return a row with all spans in their places.

        Every rewritten document has an end-of-text token, whether or not it had one before, and keeps it here.

        Args:
            tokens: a row; `resolve` must have been called, as training, `map` and `collator` do.
        """
        return restore_spans(tokens, self._masks, self._end, self._separator)
