"""What CM3 and CodeGen2 share: spans are moved to the end, and numbered masks stand where they were."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hf_ext.trainer_callbacks.infilling import Infilling, Pair
from hf_ext.trainer_callbacks.token_ids import token_id

T = TypeVar("T")


def move_spans(parts: Sequence[list[T]], masks: Sequence[T], end: T, between: Sequence[T] = ()) -> list[T]:
    """Move every second part to the end and leave a mask in its place.

    Args:
        parts: kept, moved, kept, moved, ..., kept.
        masks: one for each moved part, or more.
        end: stands after each moved part.
        between: stands between what was kept and what was moved.

    Example:
        >>> " ".join(move_spans([["a"], ["b"], ["c"], ["d"], []], ["<0>", "<1>"], "<eom>", ["<sep>"]))
        'a <0> c <1> <sep> <0> b <eom> <1> d <eom>'
    """
    kept, moved = parts[::2], parts[1::2]
    out = list(kept[0])
    for mask, part in zip(masks, kept[1:], strict=False):
        out += [mask, *part]
    out += between
    for mask, part in zip(masks, moved, strict=False):
        out += [mask, *part, end]
    return out


def restore_spans(tokens: Sequence[T], masks: Sequence[T], end: T, between: T | None = None) -> list[T]:
    """Put moved spans back. Several documents may follow each other.

    Args:
        tokens: what `move_spans` made.
        masks: the masks.
        end: what ends each moved part.
        between: a token that is left out, such as CodeGen2's separator.

    Raises:
        ValueError: a mask has no span, or a span has no end, as in a row that was cut off.

    Example:
        >>> restore_spans("a <0> c <1> <0> b <eom> <1> d <eom>".split(), ["<0>", "<1>"], "<eom>")
        ['a', 'b', 'c', 'd']
    """
    known = set(masks)
    out: list[list[T]] = [[]]  # runs of tokens, with an empty run for each mask that waits for its span
    waiting: dict[T, int] = {}
    row = list(tokens)
    at = 0
    while at < len(row):
        token = row[at]
        at += 1
        if token in known and token in waiting:
            if end not in row[at:]:
                raise ValueError(f"the span of {token!r} has no end {end!r}: the row was cut off")
            stop = row.index(end, at)
            out[waiting.pop(token)] = row[at:stop]
            at = stop + 1
        elif token in known:
            waiting[token] = len(out)
            out += [[], []]
        elif between is None or token != between:
            out[-1].append(token)
    if waiting:
        raise ValueError(f"no span for the masks {sorted(map(str, waiting))}: the row was cut off")
    return [token for run in out for token in run]


@dataclass(eq=False)
class MovedSpans(Infilling):
    """Base of the objectives with numbered masks.

    Args:
        mask_tokens: ids or texts of the masks, in order; or one text with `{}` for the number.
        end_token: text or id of what ends a moved span.
        max_spans: spans moved out of a document at most; with a list of masks, no more than these.
        train_masks: whether the masks are labels, too. Without, a model is never taught to produce one.
        level: see `Infilling`.
        bos_token: see `Infilling`.
        eos_token: see `Infilling`.
        max_length: see `Rewriting`.
        pad_to_multiple_of: see `Rewriting`.
        seed: see `Rewriting`.
        clean_loss_every: see `Objective`.
    """

    #: Number of the first mask, where `mask_tokens` is one text.
    first: ClassVar[int] = 0

    mask_tokens: str | Sequence[str | int] = field(default="<mask:{}>", kw_only=True)
    end_token: str | int = field(default="<eom>", kw_only=True)
    max_spans: int = field(default=8, kw_only=True)
    train_masks: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_spans, bool) or not isinstance(self.max_spans, int) or self.max_spans < 1:
            raise ValueError(f"max_spans must be a number from 1, got {self.max_spans!r}")
        if isinstance(self.mask_tokens, str):
            if "{}" not in self.mask_tokens:
                raise ValueError(
                    f"mask_tokens must be a list of masks, or a text with {{}} for the number, got {self.mask_tokens!r}"
                )
        elif len(self.mask_tokens) < self.max_spans:
            raise ValueError(
                f"max_spans={self.max_spans} needs as many masks, but mask_tokens has {len(self.mask_tokens)}"
            )

    def find_sentinels(self, tokenizer: Any, config: Any) -> Sequence[int]:
        """Find the ids of the masks and of the end of a span."""
        names: Sequence[str | int] = (
            [self.mask_tokens.replace("{}", str(self.first + at)) for at in range(self.max_spans)]
            if isinstance(self.mask_tokens, str)
            else self.mask_tokens
        )
        self._masks = [token_id(name, tokenizer, config, purpose="mask") for name in names]
        self._end = token_id(self.end_token, tokenizer, config, purpose="end of a span")
        return [*self._masks, self._end]

    def _arranged(self, parts: list[list[Pair]], tail: list[Pair], between: list[Pair]) -> list[Pair]:
        masks = [(mask, mask if self.train_masks else -100) for mask in self._masks]
        parts = [*parts[:-1], parts[-1] + tail]
        return move_spans(parts, masks, (self._end, self._end), between)

    def _prompt(
        self, kept: Sequence[list[int]], filled: Sequence[list[int]], ending: Sequence[int], between: Sequence[int]
    ) -> list[int]:
        holes = len(kept) - 1
        if holes > len(self._masks):
            raise ValueError(f"{holes} holes need as many masks, but {self.name} has {len(self._masks)}: max_spans")
        spans = [*filled, *[[] for _ in range(holes - len(filled))]]
        parts = [part for pair in zip(kept, spans, strict=False) for part in pair] + [[*kept[-1], *ending]]
        whole = move_spans(parts, self._masks, self._end, between)
        left = sum(2 + len(span) for span in spans[len(filled) :])  # mask and end of each span that is not there yet
        return [*whole[: len(whole) - left], self._masks[len(filled)]]

    @property
    def end_of_span(self) -> int:
        """Id of the token that ends a span."""
        return self._end

    @property
    def holes(self) -> int:  # type: ignore[override]
        """Spans that one prompt may ask for."""
        return self.max_spans if isinstance(self.mask_tokens, str) else len(self.mask_tokens)


def compose(total: int, parts: int, draw: random.Random) -> list[int]:
    """Draw a way to write `total` as a sum of `parts` positive numbers, each way as likely as any other.

    Args:
        total: the sum.
        parts: how many numbers, from 1 to `total`.
        draw: random numbers.

    Example:
        >>> compose(3, 3, random.Random(0)), sum(compose(10, 4, random.Random(0)))
        ([1, 1, 1], 10)
    """
    cuts = [0, *sorted(draw.sample(range(1, total), parts - 1)), total]
    return [stop - start for start, stop in itertools.pairwise(cuts)]
