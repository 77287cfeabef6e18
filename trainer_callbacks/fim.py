"""Fill-in-the-middle: documents of which a part is read last (arXiv:2207.14255).

A document is cut at two characters into prefix, middle and suffix, which are put into another order with
sentinels between them. Attention and loss stay those of next-token prediction, on all tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from hf_ext.trainer_callbacks.infilling import Infilling, Pair
from hf_ext.trainer_callbacks.token_ids import token_id

T = TypeVar("T")

#: Orders of the parts: prefix, suffix, middle; suffix, prefix, middle; the same with one middle sentinel before both.
MODES = ("psm", "spm", "joint")
#: How tokenizers spell the sentinels of prefix, suffix, middle and end; no end means the end-of-text token.
SPELLINGS: tuple[tuple[str, str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", None),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", None),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", None),
    ("<PRE>", "<SUF>", "<MID>", "<EOT>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", None),
)


@dataclass(frozen=True)
class FIMTokens(Generic[T]):
    """The four sentinels.

    Args:
        prefix: stands before the prefix.
        suffix: stands before the suffix.
        middle: stands before the middle.
        end: stands after the middle, where it joins the suffix.
    """

    prefix: T
    suffix: T
    middle: T
    end: T


def fim(prefix: list[T], middle: list[T], suffix: list[T], sentinels: FIMTokens[T], mode: str = "psm") -> list[T]:
    """Put the parts of a document into an order in which the middle comes last (arXiv:2207.14255, section 3).

    Args:
        prefix: tokens before the first cut.
        middle: tokens between the cuts.
        suffix: tokens after the second cut.
        sentinels: the four sentinels.
        mode: `"psm"`, `<PRE> p <SUF> s <MID> m <EOT>`; `"spm"`, `<SUF> s <PRE> p <MID> m <EOT>`; `"joint"`, the form
            of SPM that the paper trains together with PSM, `<PRE> <SUF> s <MID> p m <EOT>`.

    Raises:
        ValueError: `mode` is unknown.

    Example:
        >>> marks = FIMTokens("<PRE>", "<SUF>", "<MID>", "<EOT>")
        >>> " ".join(fim(["a"], ["b"], ["c"], marks, "joint"))
        '<PRE> <SUF> c <MID> a b <EOT>'
    """
    s = sentinels
    if mode == "psm":
        return [s.prefix, *prefix, s.suffix, *suffix, s.middle, *middle, s.end]
    if mode == "spm":
        return [s.suffix, *suffix, s.prefix, *prefix, s.middle, *middle, s.end]
    if mode == "joint":
        return [s.prefix, s.suffix, *suffix, s.middle, *prefix, *middle, s.end]
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def unfim(tokens: Sequence[T], sentinels: FIMTokens[T]) -> list[T]:
    """Return the document that `fim` has put into any of its orders.

    Args:
        tokens: from the first sentinel to the end sentinel, which may be missing if the row was cut off.
        sentinels: the four sentinels.

    Raises:
        ValueError: the sentinels do not stand as in any of the orders.

    Example:
        >>> marks = FIMTokens("<PRE>", "<SUF>", "<MID>", "<EOT>")
        >>> unfim("<SUF> c <PRE> a <MID> b <EOT>".split(), marks)
        ['a', 'b', 'c']
    """
    s, row = sentinels, list(tokens)
    try:
        middle = row.index(s.middle)
        before, last = row[:middle], row[middle + 1 :]
        first, second = sorted((before.index(s.prefix), before.index(s.suffix)))
    except ValueError:
        raise ValueError(f"no document in the order of fill-in-the-middle, its sentinels missing: {row}") from None
    if first != 0 or any(before.count(mark) != 1 for mark in (s.prefix, s.suffix)):
        raise ValueError(f"no document in the order of fill-in-the-middle, its sentinels misplaced: {row}")
    last = last[: last.index(s.end)] if s.end in last else last
    one, two = before[1:second], before[second + 1 :]
    prefix, suffix = (one, two) if before[0] == s.prefix else (two, one)
    return [*prefix, *last, *suffix]  # under "joint" the prefix is empty here and stands before the middle


@dataclass(eq=False)
class FIM(Infilling):
    """Train fill-in-the-middle: a share of the documents is read with its middle last.

    As in the paper, the cuts are two uniform characters (`level="character"`; parts are tokenised by
    themselves), all tokens are trained, the sentinels too, and the end sentinel after the middle says that
    it has reached the suffix. Prompts (leading labels of -100) and the bos token stay in front.

    As a callback it works on what the collator gives: with packed rows that is the paper's context-level
    FIM, each document within the context by itself. `dataset.map(FIM().map(tokenizer), batched=True)`
    before packing is its document-level FIM, where packing may cut a document's parts from each other.

    Args:
        fim_rate: probability that a document is rewritten; 0 is plain next-token prediction, bit for bit.
        spm_rate: probability that a rewritten document has its suffix first.
        spm: `"joint"` (`<PRE> <SUF> s <MID> p m`, which the paper trains beside PSM) or `"spm"` (`<SUF> s <PRE> p
            <MID> m`).
        prefix_token: text or id of the sentinel before the prefix. None for all of these takes the first of
            `SPELLINGS` that the tokenizer has.
        suffix_token: likewise before the suffix.
        middle_token: likewise before the middle.
        end_token: likewise after the middle; None for the end-of-text token.
        level: `"character"`, or `"token"` to cut between tokens.
        bos_token: see `Infilling`.
        eos_token: see `Infilling`.
        max_length: see `Rewriting`.
        pad_to_multiple_of: see `Rewriting`.
        seed: base of the random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range; at the beginning, a sentinel is not in the vocabulary.

    Example:
        >>> marks = {"prefix_token": 1, "suffix_token": 2, "middle_token": 3, "end_token": 4}
        >>> rewrite = FIM(fim_rate=1, spm_rate=0, level="token", **marks).map()
        >>> row = rewrite({"input_ids": [[10, 11, 12, 13, 14, 15]]})["input_ids"][0]
        >>> row, unfim(row, FIMTokens(1, 2, 3, 4))
        ([1, 10, 2, 11, 12, 13, 14, 15, 3, 4], [10, 11, 12, 13, 14, 15])
        >>> FIM(fim_rate=50)
        Traceback (most recent call last):
        ...
        ValueError: fim_rate must be a share from 0 to 1 (0.5 for half of the documents), got 50
    """

    slug: ClassVar[str] = "fim"
    paper: ClassVar[str] = "Efficient Training of Language Models to Fill in the Middle (arXiv:2207.14255)"

    fim_rate: float = 0.5
    spm_rate: float = 0.5
    spm: str = "joint"
    prefix_token: str | int | None = None
    suffix_token: str | int | None = None
    middle_token: str | int | None = None
    end_token: str | int | None = None
    level: str = field(default="character", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fim_rate", "spm_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1 (0.5 for half of the documents), got {value!r}")
        if self.spm not in MODES[1:]:
            raise ValueError(f"spm must be one of {', '.join(MODES[1:])}, got {self.spm!r}")
        given = [self.prefix_token, self.suffix_token, self.middle_token]
        if None in given and any(value is not None for value in (*given, self.end_token)):
            raise ValueError("name prefix_token, suffix_token and middle_token, or none of the sentinels")

    def find_sentinels(self, tokenizer: Any, config: Any) -> Sequence[int]:
        """Find the four ids; the end may be the end-of-text token and then is no sentinel."""
        *names, last = self._spelling(tokenizer)
        purposes = ("prefix", "suffix", "middle")
        marks = [
            token_id(name, tokenizer, config, purpose=purpose)
            for name, purpose in zip(names, purposes, strict=True)
            if name is not None
        ]
        if last is not None:
            end = token_id(last, tokenizer, config, purpose="end of the middle")
        else:
            if self._end_of_text is None:
                raise ValueError(
                    f"{self.name} needs a token that ends the middle, but neither tokenizer nor config has an "
                    "end-of-text token: name it with end_token=... or eos_token=..."
                )
            end = self._end_of_text
        prefix, suffix, middle = marks
        self._marks = FIMTokens(prefix, suffix, middle, end)
        return marks if end in self._ends else [*marks, end]

    def _spelling(self, tokenizer: Any) -> Sequence[str | int | None]:
        if self.prefix_token is not None:
            return self.prefix_token, self.suffix_token, self.middle_token, self.end_token
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        for spelling in SPELLINGS:
            if all(name is None or name in known for name in spelling):
                return spelling
        raise ValueError(
            f"{self.name} found no sentinels that it knows in the tokenizer. Either tokenizer.add_special_tokens("
            f"{{'additional_special_tokens': {list(SPELLINGS[0][:3])}}}), model.resize_token_embeddings(len("
            "tokenizer)) and Trainer(..., processing_class=tokenizer), or name them: FIM(prefix_token=..., "
            "suffix_token=..., middle_token=...)"
        )

    def plan(self, draw: random.Random) -> str | None:
        """Draw the order of the parts."""
        if draw.random() >= self.fim_rate:
            return None
        return self.spm if draw.random() < self.spm_rate else "psm"

    def spans(self, plan: str, length: int, draw: random.Random) -> list[tuple[int, int]]:
        """Draw two cuts, each uniform from the beginning to the end; any part may be empty."""
        start, stop = sorted((draw.randint(0, length), draw.randint(0, length)))
        return [(start, stop)]

    def arrange(self, plan: str, parts: list[list[Pair]], tail: list[Pair]) -> list[Pair]:
        """Put prefix, middle and suffix into the order `plan`, and an end-of-text token at the very end."""
        prefix, middle, suffix = parts
        marks = self._marks
        pre, suf, mid, end = ((mark, mark) for mark in (marks.prefix, marks.suffix, marks.middle, marks.end))
        pairs = FIMTokens(pre, suf, mid, end)
        return fim(prefix, middle, suffix, pairs, plan) + [pair for pair in tail if pair[0] != marks.end]

    def prompt(self, kept: Sequence[list[int]], filled: Sequence[list[int]], ending: Sequence[int] | None) -> list[int]:
        """Return prefix and suffix in the order of training, with the suffix first if `spm_rate` is 1."""
        (prefix, suffix), mode = kept, self.spm if self.spm_rate == 1 else "psm"
        # what follows the middle sentinel in training comes last here, without the end
        return fim(prefix, [], [*suffix, *(ending or [])], self._marks, mode)[:-1]

    def restore(self, tokens: Sequence[int]) -> list[int]:
        """Return a row with every document in its natural order.

        If the end of the middle is the end-of-text token, every rewritten document ends in one,
        whether or not it did before, and so it does here.

        Args:
            tokens: a row; `resolve` must have been called, as training, `map` and `collator` do.
        """
        marks, row, out = self._marks, list(tokens), []
        while row:
            start = next((at for at, token in enumerate(row) if token in (marks.prefix, marks.suffix)), len(row))
            out += row[:start]
            stop = row.index(marks.end, start) + 1 if marks.end in row[start:] else len(row)
            if start < len(row):
                out += unfim(row[start:stop], marks)
                if marks.end in self._ends and row[stop - 1] == marks.end:
                    out.append(marks.end)
            row = row[stop:]
        return out

    @property
    def end_of_span(self) -> int:
        """Id of the token that ends the middle."""
        return self._marks.end
