"""Repetition and diversity of texts, counted on their n-grams. Needs no model and no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

Tokens = Sequence[Hashable]

_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Split `text` into words and single punctuation signs, which serves prose and code alike.

    Example:
        >>> words("return x+1")
        ['return', 'x', '+', '1']
    """
    return _WORD_OR_SIGN.findall(text)


def ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    """Return the `len(tokens) - n + 1` windows of `n` neighbouring tokens, or none for a shorter text.

    Example:
        >>> ngrams("abc", 2)
        [('a', 'b'), ('b', 'c')]
    """
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def rep_n(tokens: Tokens, n: int) -> float:
    """Return the share of a text's n-grams that repeat an earlier one: 1 - distinct / all.

    Args:
        tokens: one text.
        n: order of the n-grams.

    Returns:
        From 0 (every n-gram occurs once) to almost 1; NaN for a text shorter than `n` tokens.

    Example:
        >>> rep_n("ababab", 2)  # 5 bigrams, 2 of them distinct
        0.6
    """
    found = ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else math.nan


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Return distinct-n: the n-grams that differ, over all texts together, divided by all n-grams.

    Unlike `rep_n` it also falls when different texts say the same.

    Returns:
        From almost 0 to 1; NaN if every text is shorter than `n` tokens.

    Example:
        >>> distinct_n(["ab", "ab"], 1)
        0.5
    """
    found = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else math.nan


def zipf_coefficient(texts: Sequence[Tokens]) -> float:
    """Return the exponent s of the fit frequency ~ rank^-s over the tokens of all texts.

    It is the negated slope of a least-squares line through log frequency against log rank. Text
    of people lies near 1; a repetitive text has a larger one.

    Returns:
        The exponent; NaN if the texts hold fewer than two different tokens.

    Example:
        >>> round(zipf_coefficient(["a" * 12 + "b" * 6 + "c" * 4 + "d" * 3]), 6)  # 12/1, 12/2, 12/3, 12/4
        1.0
    """
    counts = sorted(Counter(token for tokens in texts for token in tokens).values(), reverse=True)
    if len(counts) < 2:
        return math.nan
    x = [math.log(rank) for rank in range(1, len(counts) + 1)]
    y = [math.log(count) for count in counts]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return -slope


def longest_loop(tokens: Tokens) -> int:
    """Return how many tokens at the end of a text only repeat one unit, the first occurrence not counted.

    A decoder that has fallen into a loop ends in it, so a large value is the plain sign of degeneration.

    Example:
        >>> longest_loop("xyzababab"), longest_loop("abc")
        (4, 0)
    """
    best = 0
    for period in range(1, len(tokens) // 2 + 1):
        length = 0
        while length < len(tokens) - period and tokens[-1 - length] == tokens[-1 - length - period]:
            length += 1
        if length >= period:
            best = max(best, length)
    return best


def repetition_diversity(
    texts: Sequence[str | Tokens],
    orders: Sequence[int] = (2, 3, 4),
    tokenize: Callable[[str], Tokens] = words,
) -> dict[str, Any]:
    """Measure how much texts repeat themselves and how varied they are.

    Args:
        texts: strings, or sequences of token ids.
        orders: orders of rep-n; their product of 1 - rep-n is the diversity of Su et al. (2022).
        tokenize: splits a string into tokens; sequences of ids are taken as they are.

    Returns:
        `rep_<n>` for each order: 1 - distinct / all n-grams, counted within each text and summed over texts;
        `seq_rep_4`: the mean over texts of each text's own rep-4 (Welleck et al., 2020);
        `distinct_1`, `distinct_2`, `distinct_3`: over all texts together;
        `diversity`: the product of 1 - rep-n over `orders`; `zipf`: see `zipf_coefficient`;
        `loop`: the mean share of a text that is a loop at its end;
        `diversity_per_text`: the same product for each text alone.
        A figure is NaN where no text is long enough for it.

    Raises:
        ValueError: `texts` is empty, is a single string, or one of them holds no token.

    Example:
        >>> measured = repetition_diversity(["a b a b a b", "a b c d e f"])
        >>> round(measured["rep_2"], 4), round(measured["diversity"], 4)  # 3 of 10 bigrams repeat, 2 of 8, 1 of 6
        (0.3, 0.4375)
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a sequence of texts, got one string; write [text]")
    if not texts:
        raise ValueError("no texts given; repetition of nothing is not defined")
    if not orders or min(orders) < 1:
        raise ValueError(f"orders must be positive numbers, got {tuple(orders)}")
    tokens = [tokenize(text) if isinstance(text, str) else list(text) for text in texts]
    if empty := [index for index, item in enumerate(tokens) if not len(item)]:
        raise ValueError(f"the texts at {empty} hold no token; leave them out or count them yourself")
    measured: dict[str, float] = {}
    for n in orders:
        total = sum(len(ngrams(item, n)) for item in tokens)
        different = sum(len(set(ngrams(item, n))) for item in tokens)
        measured[f"rep_{n}"] = 1 - different / total if total else math.nan
    per_text = [math.prod(1 - rep_n(item, n) for n in orders) for item in tokens]
    four = [value for item in tokens if not math.isnan(value := rep_n(item, 4))]
    return {
        **measured,
        "seq_rep_4": sum(four) / len(four) if four else math.nan,
        **{f"distinct_{n}": distinct_n(tokens, n) for n in (1, 2, 3)},
        "diversity": math.prod(1 - measured[f"rep_{n}"] for n in orders),
        "zipf": zipf_coefficient(tokens),
        "loop": sum(longest_loop(item) / len(item) for item in tokens) / len(tokens),
        "diversity_per_text": per_text,
    }
