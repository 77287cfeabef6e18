"""Prompts with sets in them, written as parts or with markup, and their tokens.

    SetPrompt("Is ", ["a cat", "a dog"], " an animal?")
    SetPrompt.parse("Is <set><option>a cat</option><option>a dog</option></set> an animal?")

        input_ids    <s> Is | a cat | a dog | an animal ?
        segment_ids   0  0  | 1  1  | 2  2  | 0  0      0
        group_ids     0  0  | 1  1  | 1  1  | 0  0      0

Every piece (text between sets, option) is tokenised by itself, so that no token spans a border and an
option has the same tokens wherever it stands. Spaces belong to the piece in which they are written; no
space is added: a tokenizer that begins every text with one does so for the beginning of a prompt only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import BatchEncoding

_TAG = re.compile(r"(\\*)<(/?)(set|option)>")
#: Behind one of these a tokenizer tokenises a text as it does in the middle of another.
_ANCHORS = ("\n", "(", ".", "=", "a")


class SetPrompt:
    """A prompt in which some parts are sets: options side by side, none before another.

    Args:
        *parts: text as `str`, a set as a list or tuple of its options. `SetPrompt(prefix, options, suffix)`
            is the usual form; there may be any number of sets, one right after another too. Texts that
            follow each other are one.

    Raises:
        ValueError: no parts, a part that is neither text nor a list, a set without options, an option without text, or
            a set within a set.

    Example:
        >>> prompt = SetPrompt("Is ", ["a cat", "a dog"], " an animal?")
        >>> prompt.sets
        (('a cat', 'a dog'),)
        >>> prompt.reordered([1, 0]).text
        'Is a doga cat an animal?'
    """

    def __init__(self, *parts: str | Sequence[str]) -> None:
        if not parts:
            raise ValueError("a SetPrompt needs parts: SetPrompt(prefix, [option, ...], suffix)")
        self.parts: tuple[str | tuple[str, ...], ...] = ()
        for part in parts:
            if isinstance(part, str) and self.parts and isinstance(self.parts[-1], str):
                self.parts = (*self.parts[:-1], self.parts[-1] + part)  # one piece of text
            else:
                self.parts = (*self.parts, part if isinstance(part, str) else _options(part))
        self.special_tokens = True

    @classmethod
    def parse(cls, markup: str) -> SetPrompt:
        r"""Read a prompt in which sets are marked as `<set><option>...</option><option>...</option></set>`.

        Between the options of a set only white space may stand, and it does not count. A tag with a
        backslash before it is text (`\<set>`); to write a backslash before a tag, double it.

        Args:
            markup: the prompt.

        Raises:
            ValueError: no text, a tag that does not fit where it stands, or text between options.

        Example:
            >>> SetPrompt.parse("Pick <set> <option>a</option> <option>b</option> </set>: ").parts
            ('Pick ', ('a', 'b'), ': ')
            >>> SetPrompt.parse(r"no \<set> here").parts
            ('no <set> here',)
        """
        if not isinstance(markup, str):
            raise ValueError(f"a prompt is a str with markup or a SetPrompt, got {markup!r}")
        parts: list[Any] = []
        options: list[str] | None = None
        text, inside, opened = "", False, 0

        def wrong(at: int, why: str) -> ValueError:
            return ValueError(f"character {at} of the prompt, {markup[at : at + 24]!r}: {why}")

        end = 0
        for found in _TAG.finditer(markup):
            text += markup[end : found.start()] + "\\" * (len(found[1]) // 2)
            end = found.end()
            if len(found[1]) % 2:
                text += found[0][len(found[1]) :]
                continue
            tag, at = found[2] + found[3], found.start() + len(found[1])
            if tag == "set" and options is None:
                parts, text, options, opened = [*parts, text], "", [], at
            elif tag == "set":
                raise wrong(at, "sets do not nest; close the set before with </set>")
            elif options is None:
                raise wrong(at, f"<{tag}> stands outside of a set; write \\<{tag}> for the text itself")
            elif tag == "/option" and inside:
                options, text, inside = [*options, text], "", False
            elif inside:
                raise wrong(at, "the option before it is not closed; close it with </option>")
            elif text.strip():
                raise wrong(at, f"{text.strip()!r} stands between the options of a set; put it into an option")
            elif tag == "option":
                text, inside, opened = "", True, at
            elif tag == "/option":
                raise wrong(at, "no option is open here")
            else:
                try:
                    parts, text, options = [*parts, _options(options)], "", None
                except ValueError as error:
                    raise wrong(opened, str(error)) from None
        if options is not None:
            raise wrong(opened, f"this {'option' if inside else 'set'} is never closed")
        parts.append(text + markup[end:])
        return cls(*([part for part in parts if part] or [""]))

    @classmethod
    def from_messages(cls, tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> SetPrompt:
        """Read a conversation whose contents hold markup, through the tokenizer's chat template.

        Args:
            tokenizer: one with a chat template.
            messages: the conversation, as `apply_chat_template` takes it.
            **options: further arguments of `apply_chat_template`; `add_generation_prompt` is true by default.
        """
        options = {"add_generation_prompt": True, **options}
        prompt = cls.parse(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        prompt.special_tokens = False  # the template has written them
        return prompt

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The options of every set."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def text(self) -> str:
        """The prompt as plain text, options one after another: what a plain model would read."""
        return "".join(part if isinstance(part, str) else "".join(part) for part in self.parts)

    @property
    def markup(self) -> str:
        """The prompt as `parse` reads it."""

        def escaped(text: str, before_tag: bool = True) -> str:
            text = _TAG.sub(lambda tag: "\\" * (2 * len(tag[1]) + 1) + tag[0][len(tag[1]) :], text)
            return text + "\\" * (len(text) - len(text.rstrip("\\"))) * before_tag

        def written(part: str | tuple[str, ...], last: bool) -> str:
            if isinstance(part, str):
                return escaped(part, before_tag=not last)
            return "<set>" + "".join(f"<option>{escaped(option)}</option>" for option in part) + "</set>"

        return "".join(written(part, number == len(self.parts)) for number, part in enumerate(self.parts, 1))

    def reordered(self, order: Sequence[int], which: int = 0) -> SetPrompt:
        """Return the prompt with the options of one set in another order.

        Args:
            order: the number of the option that comes first, of the one that comes second, ...
            which: number of the set.

        Raises:
            ValueError: `order` does not name every option once, or there is no such set.
        """
        if not -len(self.sets) <= which < len(self.sets):
            raise ValueError(f"the prompt has {len(self.sets)} sets, there is none of the number {which}")
        options = self.sets[which]
        if sorted(order) != list(range(len(options))):
            raise ValueError(f"order must hold every number from 0 to {len(options) - 1} once, got {list(order)}")
        places = [place for place, part in enumerate(self.parts) if not isinstance(part, str)]
        parts: list[Any] = list(self.parts)
        parts[places[which]] = tuple(options[number] for number in order)
        changed = SetPrompt(*parts)
        changed.special_tokens = self.special_tokens
        return changed

    def encode(self, tokenizer: Any) -> BatchEncoding:
        """Return the tokens of this prompt; see `encode`."""
        return encode(tokenizer, [self])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetPrompt) and (self.parts, self.special_tokens) == (other.parts, other.special_tokens)

    def __hash__(self) -> int:
        return hash((self.parts, self.special_tokens))

    def __repr__(self) -> str:
        return f"SetPrompt({', '.join(repr(p if isinstance(p, str) else list(p)) for p in self.parts)})"


def encode(tokenizer: Any, prompts: SetPrompt | str | Sequence[SetPrompt | str]) -> BatchEncoding:
    """Turn prompts into what strategies over structured prompts take.

    Special tokens that the tokenizer puts before a text stand once, at the front, and are seen by all;
    those that it puts behind a text are left out, since text shall follow.

    Args:
        tokenizer: any tokenizer of transformers.
        prompts: prompts, or text with markup.

    Returns:
        Left-padded `input_ids`, `attention_mask`, `segment_ids` and `group_ids`, all `(batch, length)` int64.

    Raises:
        ValueError: an empty prompt, an option without a token, or a batch for which there is no padding token.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> inputs = encode(tiny_models.tokenizer(), ["<set><option>a</option><option>bc</option></set>?", "d"])
        >>> inputs["segment_ids"]
        tensor([[1, 2, 2, 0],
                [0, 0, 0, 0]])
        >>> inputs["attention_mask"]
        tensor([[1, 1, 1, 1],
                [0, 0, 0, 1]])
    """
    chosen = [prompts] if isinstance(prompts, (SetPrompt, str)) else list(prompts)
    given = [prompt if isinstance(prompt, SetPrompt) else SetPrompt.parse(prompt) for prompt in chosen]
    if not given:
        raise ValueError("no prompts were given")
    pieces = _Pieces(tokenizer)
    rows = [pieces.row(prompt, f"prompt {number}") for number, prompt in enumerate(given)]
    length = max(len(row[0]) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None and any(len(row[0]) < length for row in rows):
        raise ValueError("prompts of different lengths need padding: set tokenizer.pad_token")

    def padded(which: int, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (length - len(row[0])) + row[which] for row in rows])

    mask = torch.tensor([[0] * (length - len(row[0])) + [1] * len(row[0]) for row in rows])
    ids, segments, groups = padded(0, pad or 0), padded(1, 0), padded(2, 0)
    return BatchEncoding({"input_ids": ids, "attention_mask": mask, "segment_ids": segments, "group_ids": groups})


class _Pieces:
    """Tokenises the pieces of prompts, each by itself."""

    def __init__(self, tokenizer: Any) -> None:
        if not callable(tokenizer):
            raise ValueError(f"a prompt is encoded by a tokenizer of transformers, got {tokenizer!r}")
        self.tokenizer = tokenizer
        anchor = next((a for a in _ANCHORS[1:] if self._behind(a, "x") is not None), None)
        #: Whether a text that stands alone begins with a space that nobody wrote.
        self.adds_space = anchor is not None and self._behind(anchor, "x") != self._ids("x")

    def row(self, prompt: SetPrompt, what: str) -> tuple[list[int], list[int], list[int]]:
        """Return ids, segments and groups of a prompt."""
        ids = list(self._front) if prompt.special_tokens else []
        segments, groups = [0] * len(ids), [0] * len(ids)
        first, segment, group = True, 0, 0
        for part in prompt.parts:
            group += not isinstance(part, str)
            for piece in [part] if isinstance(part, str) else part:
                inside = not isinstance(part, str)
                segment += inside
                found = self._ids(piece) if first or not self.adds_space else self._in_the_middle(piece)
                if inside and not found:
                    raise ValueError(f"{what}: the tokenizer makes no token of the option {piece!r}")
                ids += found
                segments += [segment if inside else 0] * len(found)
                groups += [group if inside else 0] * len(found)
            first = first and not part  # the options of a set are all alike
        if not ids:
            raise ValueError(f"{what} is empty; give at least one token")
        return ids, segments, groups

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _behind(self, anchor: str, text: str) -> list[int] | None:
        """Return the tokens of `text` behind an anchor, or None if the two share a token."""
        before, both = self._ids(anchor), self._ids(anchor + text)
        return both[len(before) :] if before and both[: len(before)] == before else None

    def _in_the_middle(self, piece: str) -> list[int]:
        found = next((ids for ids in (self._behind(anchor, piece) for anchor in _ANCHORS) if ids is not None), None)
        if found is None:
            raise ValueError(f"{piece!r} shares a token with whatever stands before it, in this tokenizer")
        return found

    @functools.cached_property
    def _front(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        bare, full = self._ids("x"), list(self.tokenizer("x")["input_ids"])
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:start]


def _options(options: Any) -> tuple[str, ...]:
    if not isinstance(options, Iterable):
        raise ValueError(f"a part of a prompt is text or a list of options, got {options!r}")
    found = tuple(options)
    if not found:
        raise ValueError("a set needs at least one option")
    for option in found:
        if isinstance(option, (SetPrompt, list, tuple, set)):
            raise ValueError("sets do not nest: an option is text")
        if not isinstance(option, str):
            raise ValueError(f"an option must be a str, got {type(option).__name__}: {option!r}")
        if not option:
            raise ValueError("an option is empty; give it text or leave it out")
    return found
