"""Carry text from one tokenizer to another and drafts back, token by token as it grows.

    target ids   [<s>] [def] [ add] [(a]        decode what is new, encode it behind what was encoded
    text               "def add(a"              before, and replace the last tokens where the new text
    draft ids    [<s>] [de] [f] [ add] [(] [a]  has merged with them

Special tokens part a text into segments: no token reaches across one. They go over by their name, and as beginning
and end of a text; others are left out. Bytes of a character that is not complete wait until it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Stands in decoded text for bytes that are no character (yet).
BROKEN = "\ufffd"
#: Tokens before a place that are decoded with those behind it, and characters that are encoded with those behind:
#: what a token is written as depends on its neighbours, hardly on more than these.
TOKENS, CHARACTERS = 8, 96


class Language:
    """A tokenizer as text goes through it.

    Args:
        tokenizer: any tokenizer of transformers.

    Attributes:
        specials: ids of its special tokens, by name.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.specials = {**dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)), **added}
        self.special_ids = set(self.specials.values())

    @property
    def head(self) -> list[int]:
        """The token that its texts begin with, if there is one."""
        first = self.tokenizer("", verbose=False).input_ids[:1]
        return first if first and first[0] == self.tokenizer.bos_token_id else []

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text_of(self, before: list[int], ids: list[int]) -> tuple[str | None, int]:
        """Return what ids add to a text, as far as its characters are complete.

        Args:
            before: ids before them.
            ids: the ids.

        Returns:
            The text, None where these ids change what those before are written as; and how many it took.
        """
        old = self.decode(before[-TOKENS:])
        for count in range(len(ids), max(len(ids) - 4, 0), -1):  # a character has at most four bytes
            new = self.decode(before[-TOKENS:] + ids[:count])
            if not new.endswith(BROKEN):
                return (new[len(old) :], count) if new.startswith(old) else (None, count)
        if len(ids) < 4:
            return "", 0
        new = self.decode(before[-TOKENS:] + ids)  # so it is written
        return (new[len(old) :], len(ids)) if new.startswith(old) else (None, len(ids))

    def follow(self, before: str, text: str) -> tuple[list[int], list[int]] | None:
        """Find how encoding text behind other text changes the ids.

        Args:
            before: what has been encoded.
            text: what follows it.

        Returns:
            The last ids of what was before that are no longer right, and those to put in their place; None where
            that cannot be told from the last characters alone.
        """
        near = before[-CHARACTERS:]
        old, new = self.encode(near), self.encode(near + text)
        same = common_prefix(old, new)
        if old and not same and len(near) < len(before):
            return None
        return old[same:], new[same:]


@dataclass
class Line:
    """A row's text, as the draft model reads it.

    Args:
        ids: the draft model's ids.
        read: tokens of the row that they stand for.
        text: text since the last special token.
        start: place of its first token among `ids`.
        since: likewise among the row's tokens.
    """

    ids: list[int] = field(default_factory=list)
    read: int = 0
    text: str = ""
    start: int = 0
    since: int = 0


class Translator:
    """Carries rows over to a draft model's tokenizer, and its drafts back.

    Args:
        target: the target's tokenizer.
        draft: the draft model's.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> tokenizer = tiny_models.tokenizer()
        >>> translator, row = Translator(tokenizer, tokenizer), tokenizer("a = b").input_ids
        >>> line = translator.line()
        >>> translator.follow(line, row)
        >>> line.ids == row, translator.back(line, row, tokenizer(" + c").input_ids) == tokenizer(" + c").input_ids
        (True, True)
    """

    def __init__(self, target: Any, draft: Any) -> None:
        self.target, self.draft = Language(target), Language(draft)
        self._there = _by_name(self.target, self.draft)
        self._back = _by_name(self.draft, self.target)
        self._head = self.draft.head

    def line(self) -> Line:
        """Return the line of a row of which nothing has been read."""
        return Line(list(self._head), start=len(self._head))

    def follow(self, line: Line, row: list[int]) -> None:
        """Bring a line up to the row's last complete character.

        Args:
            line: the line, changed in place.
            row: the row's tokens, those that were read before included.
        """
        while line.read < len(row):
            end = next((i for i in range(line.read, len(row)) if row[i] in self.target.special_ids), len(row))
            before, new = row[line.since : line.read], row[line.read : end]
            text, count = self.target.text_of(before, new)
            if text is None:  # it is written in another way now: once more from the beginning of the segment
                del line.ids[line.start :]
                line.read, line.text = line.since, ""
                text, count = self.target.text_of([], row[line.since : end])
            self._append(line, text or "")
            line.read += count
            if end == len(row):
                break
            self._pass(line, row[end])
            line.read = line.since = end + 1

    def back(self, line: Line, row: list[int], drafted: list[int]) -> list[int]:
        """Return a draft in the target's tokens, as far as it can follow the row's.

        Args:
            line: the line, which follows the row.
            row: the row's tokens.
            drafted: the draft model's ids that go on with `line.ids`.
        """
        end = next((i for i, token in enumerate(drafted) if token in self.draft.special_ids), len(drafted))
        text, count = self.draft.text_of(line.ids[line.start :], drafted[:end])
        if text is None:
            return []
        waiting = row[line.read :]  # the first bytes of a character
        found = self.target.follow(line.text, text)
        if found is not None and not found[0]:
            tokens = found[1]
            if tokens[: len(waiting)] != waiting:
                return []
            tokens = tokens[len(waiting) :]
        else:  # the row's last token would be another one; what follows it may still be right by itself
            tokens = self.target.encode(text)
            if waiting or self.target.text_of(row[line.since :], tokens)[0] != text:
                return []
        if count == end < len(drafted):
            tokens = tokens + self._back.get(drafted[end], [])
        return tokens

    def _append(self, line: Line, text: str) -> None:
        if not text:
            return
        found = self.draft.follow(line.text, text)
        line.text += text
        if found is not None:
            old, new = found
            kept = len(line.ids) - len(old)
            if kept >= line.start and line.ids[kept:] == old:
                line.ids[kept:] = new
                return
        line.ids[line.start :] = self.draft.encode(line.text)

    def _pass(self, line: Line, special: int) -> None:
        passed = self._there.get(special, [])
        if not (line.ids == self._head == passed):  # the text has begun already
            line.ids += passed
        line.text, line.start = "", len(line.ids)


def _by_name(first: Language, second: Language) -> dict[int, list[int]]:
    """Return for special tokens of one tokenizer the token of the other that stands for it."""
    found = {i: [second.specials[name]] for name, i in first.specials.items() if name in second.specials}
    for name in ("bos_token_id", "eos_token_id"):
        ids = getattr(first.tokenizer, name), getattr(second.tokenizer, name)
        if None not in ids:
            found.setdefault(ids[0], [ids[1]])
    return found


def common_prefix(first: list[int], second: list[int]) -> int:
    """Return how many elements two lists begin with alike.

    Example:
        >>> common_prefix([1, 2, 3], [1, 2, 4])
        2
    """
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
