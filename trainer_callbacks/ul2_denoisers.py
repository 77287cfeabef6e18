"""UL2's denoisers: what each takes out of a text, how it is written down, and how it is put back (arXiv:2205.05131)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hf_ext.trainer_callbacks.codegen2 import corrupted_spans

MODES = ("R", "X", "S")


@dataclass(frozen=True)
class Denoiser:
    """One of the ways in which a text is corrupted.

    Args:
        mode: `"R"` and `"X"` take out spans, `"S"` the end of the text.
        mean: mean length of a span in tokens; not used by `"S"`.
        rate: share of the tokens that is taken out; of `"S"` on average.
        weight: how often this one is drawn, relative to the others.

    Example:
        >>> Denoiser("R", 3, 0.15).rate
        0.15
    """

    mode: str
    mean: float
    rate: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode of a denoiser must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not self.mean >= 1 or not 0 < self.rate < 1 or not self.weight >= 0:
            raise ValueError(f"a denoiser needs a mean from 1, a rate between 0 and 1 and a weight from 0, got {self}")


#: Table 1 of the paper, with 40 % R, 40 % X and 20 % S.
DENOISERS = (
    Denoiser("R", 3, 0.15, 0.2),
    Denoiser("R", 8, 0.15, 0.2),
    Denoiser("X", 3, 0.5, 0.1),
    Denoiser("X", 8, 0.5, 0.1),
    Denoiser("X", 64, 0.15, 0.1),
    Denoiser("X", 64, 0.5, 0.1),
    Denoiser("S", 1, 0.25, 0.2),
)


def draw_spans(length: int, denoiser: Denoiser, draw: random.Random) -> list[tuple[int, int]]:
    """Draw the spans that a denoiser takes out of a text.

    R and X take `rate * length` tokens in `rate * length / mean` spans, both rounded, that do not touch; every such
    choice is as likely as any other. (T5's code begins with text that stays and ends with a span, so that a single
    span would always be the end.) S takes the last `1` to `2 * rate * length` tokens, each number as likely as any.

    Args:
        length: of the text, at least 2.
        denoiser: which one.
        draw: random numbers.

    Returns:
        Disjoint spans in order.

    Example:
        >>> draw_spans(20, Denoiser("R", 3, 0.15), random.Random(0))
        [(12, 15)]
        >>> sum(stop - start for start, stop in draw_spans(20, Denoiser("X", 3, 0.5), random.Random(0)))
        10
    """
    if denoiser.mode == "S":
        return [(length - draw.randint(1, min(length - 1, max(1, round(2 * denoiser.rate * length)))), length)]
    taken = min(max(1, round(denoiser.rate * length)), length - 1)
    count = min(max(1, round(taken / denoiser.mean)), taken, length - taken + 1)
    return corrupted_spans(length, taken, count, draw)


def corrupt_spans(
    tokens: Sequence[int], spans: Sequence[tuple[int, int]], sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Replace each span by a sentinel, and list the spans behind theirs.

    Args:
        tokens: the text.
        spans: disjoint, in order.
        sentinels: ids, one a span at least.

    Returns:
        The text with sentinels, and the spans.

    Example:
        >>> corrupt_spans([5, 6, 7, 8, 9], [(1, 3), (4, 5)], [90, 91])
        ([5, 90, 8, 91], [90, 6, 7, 91, 9])
    """
    kept: list[int] = []
    moved: list[int] = []
    at = 0
    for (start, stop), sentinel in zip(spans, sentinels, strict=False):
        kept += [*tokens[at:start], sentinel]
        moved += [sentinel, *tokens[start:stop]]
        at = stop
    return [*kept, *tokens[at:]], moved


def restore_spans(kept: Sequence[int], moved: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """Undo `corrupt_spans`.

    Args:
        kept: the text with sentinels.
        moved: the spans, each behind its sentinel; spans that are missing are left out.
        sentinels: ids.

    Example:
        >>> restore_spans([5, 90, 8, 91], [90, 6, 7, 91, 9], [90, 91])
        [5, 6, 7, 8, 9]
    """
    spans: dict[int, list[int]] = {}
    known, last = set(sentinels), None
    for token in moved:
        if token in known:
            last = spans.setdefault(token, [])
        elif last is not None:
            last.append(token)
    return list(itertools.chain.from_iterable(spans.get(t, []) if t in known else [t] for t in kept))
