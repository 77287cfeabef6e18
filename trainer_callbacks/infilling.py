"""What the objectives that teach infilling share: which part of a row is a document, and where it is cut.

A row is `head body tail` once or several times. The head is the bos token and the prompt (a leading run
of untrained tokens), the tail is the end-of-text token; both stay outside the body, which alone is cut.
End-of-text tokens within a row separate documents, so that a packed row is rewritten document by
document, whether or not its positions start again.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_ext.trainer_callbacks.characters import Characters
from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.rewriting import Rewriting
from hf_ext.trainer_callbacks.token_ids import token_id

#: A token and its label. What moves a token moves its label along.
Pair = tuple[int, int]
LEVELS = ("character", "token")


@dataclass(eq=False)
class Infilling(Rewriting):
    """Base of the objectives that move spans of a document behind what followed them.

    A subclass finds its sentinels in `find_sentinels`, and defines `plan`, `spans` and `arrange`;
    for generation, `prompt` and `restore`.

    Args:
        level: `"character"` cuts anywhere in the text and tokenises each part by itself, as a prompt is
            at generation; `"token"` cuts between tokens and needs no tokenizer.
        bos_token: text or id of what begins a document; None for the tokenizer's and the model's.
        eos_token: text or id of what ends a document; None likewise.
        max_length: longest row. A text that would become longer loses as many tokens at its end, before its spans
            are moved, so that no span is cut. With the length of rows that are cut out of longer texts, training
            reads as many tokens as before. See `Rewriting`.
        pad_to_multiple_of: see `Rewriting`.
        seed: see `Rewriting`.
        clean_loss_every: see `Objective`.
    """

    level: str = field(default="token", kw_only=True)
    bos_token: str | int | None = field(default=None, kw_only=True)
    eos_token: str | int | None = field(default=None, kw_only=True)
    #: Spans that may be moved out of one document.
    holes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        self._warned = False

    # -- what a subclass defines --------------------------------------------------------------------

    def find_sentinels(self, tokenizer: Any, config: Any) -> Sequence[int]:
        """Find and keep the ids of the sentinels, and return those that no plain document holds."""
        raise NotImplementedError

    def plan(self, draw: random.Random) -> Any:
        """Draw what is done with a document, before its length is known; None leaves it as it is."""
        raise NotImplementedError

    def spans(self, plan: Any, length: int, draw: random.Random) -> list[tuple[int, int]]:
        """Draw the disjoint spans, in order, that are moved out of a body of this length; none leaves it as it is."""
        raise NotImplementedError

    def arrange(self, plan: Any, parts: list[list[Pair]], tail: list[Pair]) -> list[Pair]:
        """Put the parts together: kept, moved, kept, moved, ..., kept."""
        raise NotImplementedError

    def prompt(self, kept: Sequence[list[int]], filled: Sequence[list[int]], ending: Sequence[int] | None) -> list[int]:
        """Return the prompt after which a model that was trained so generates the next span.

        Args:
            kept: the parts around the holes, in order.
            filled: the spans that were generated already.
            ending: what stands after the last part; None for what the objective puts there in training.
        """
        raise NotImplementedError

    def restore(self, tokens: Sequence[int]) -> list[int]:
        """Return a row as it was before it was rewritten (see the subclass for end-of-text tokens)."""
        raise NotImplementedError

    @property
    def end_of_span(self) -> int:
        """Id of the token that ends a generated span."""
        raise NotImplementedError

    # -- the engine ---------------------------------------------------------------------------------

    @property
    def sentinels(self) -> frozenset[int]:
        """Ids that no plain document holds; known once `resolve` was called."""
        return self._sentinels

    @property
    def characters(self) -> Characters | None:
        """The tokenizer of parts of texts; None without a tokenizer."""
        return self._characters

    def resolve(self, tokenizer: Any, config: Any) -> None:
        """Find the sentinels, and the tokens at which documents begin and end."""
        if config is not None and getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} puts what is to be filled in behind its context, for decoder-only models; an "
                "encoder-decoder reads the context in its encoder"
            )
        if self.level == "character" and tokenizer is None:
            raise ValueError(
                f"{self.name} cuts texts at characters and needs the tokenizer for it: pass "
                "processing_class=tokenizer to the Trainer, or tokenizer to map or collator, or cut between tokens "
                'with level="token"'
            )
        self._begins = self._known("bos_token", tokenizer, config)
        self._ends = self._known("eos_token", tokenizer, config)
        own = self._ends & special_ids("eos_token_id", tokenizer, None)
        self._end_of_text = min(own or self._ends, default=None)
        found = list(self.find_sentinels(tokenizer, config))
        if len(set(found)) < len(found):
            raise ValueError(f"{self.name} needs sentinels that differ from each other, got the ids {found}")
        self._sentinels = frozenset(found)
        self._characters = None if tokenizer is None else Characters(tokenizer, found[0])

    def _known(self, name: str, tokenizer: Any, config: Any) -> frozenset[int]:
        given = getattr(self, name)
        if given is None:
            return special_ids(f"{name}_id", tokenizer, config)
        return frozenset({token_id(given, tokenizer, config, purpose=name)})

    def rewrite(self, document: Document, draw: random.Random) -> Document:
        """Rewrite each document of a row."""
        if len(document.tokens) != len(document.labels):
            raise ValueError(f"{self.name} needs a label for each token, as decoder-only models have them")
        if document.columns:
            raise ValueError(
                f"{self.name} moves tokens, and what another objective says of each ({', '.join(document.columns)}) "
                f"cannot follow them: put {type(self).__name__} first among the callbacks, or leave one out"
            )
        given = list(self._texts(list(zip(document.tokens, document.labels, strict=True))))
        new: list[list[Pair]] = []
        room = self._limit
        for text in given:
            new.append(self._rewritten_text(text, draw, room))
            room = None if room is None else max(0, room - len(new[-1]))
        if all(after is before for after, before in zip(new, given, strict=True)):
            return document
        pairs = list(itertools.chain.from_iterable(new))
        return Document([token for token, _ in pairs], [label for _, label in pairs])

    def _texts(self, row: list[Pair]) -> Iterator[list[Pair]]:
        start = 0
        for at, (token, _) in enumerate(row):
            if token in self._ends:
                yield row[start : at + 1]
                start = at + 1
        if start < len(row):
            yield row[start:]

    def _rewritten_text(self, text: list[Pair], draw: random.Random, room: int | None) -> list[Pair]:
        """Rewrite one text within the room that the row has left: what does not fit is missing at the text's end.

        A row that was cut after it was rewritten would lose the end of a span.
        """
        if any(token in self._sentinels for token, _ in text):
            return text  # rewritten before, or about sentinels: no inverse could tell which are whose
        start = self._prompt_length(text)
        stop = len(text) - (text[-1][0] in self._ends)
        if all(label == -100 for _, label in text[start:stop]):
            return text
        plan = self.plan(draw)
        if plan is None:
            return text
        body = text[start : stop if room is None else min(stop, room)]
        tail = text[stop:] if len(body) == stop - start else []
        parts = self._cut_characters(plan, body, draw) if self.level == "character" else None
        if parts is None:
            spans = self.spans(plan, len(body), draw)
            parts = [body[a:b] for a, b in itertools.pairwise([0, *itertools.chain(*spans), len(body)])]
        if len(parts) == 1:
            return text
        new = text[:start] + self.arrange(plan, parts, tail)
        if room is None or len(new) <= room:
            return new
        excess = len(new) - room - len(tail)
        shorter = text[:start] + self.arrange(plan, without_end(parts, max(0, excess)), [])
        if len(shorter) > room:  # what the objective puts at the end in place of the tail
            shorter = text[:start] + self.arrange(plan, without_end(parts, excess + len(shorter) - room), [])
        return shorter if len(shorter) <= room else text

    def _prompt_length(self, text: list[Pair]) -> int:
        """Count the tokens that stay in front: bos and prompt."""
        untrained = sum(1 for _ in itertools.takewhile(lambda pair: pair[1] == -100, text))
        # a lone first label of -100 is how packed rows are cut apart; nothing was ever predicted there
        return max(int(text[0][0] in self._begins), untrained if untrained > 1 else 0)

    def _cut_characters(self, plan: Any, body: list[Pair], draw: random.Random) -> list[list[Pair]] | None:
        if any(label == -100 for _, label in body[1:]):
            return None  # labels belong to tokens, and the parts will have other tokens
        assert self._characters is not None
        tokens = [token for token, _ in body]
        text = self._characters.text(tokens)
        spans = [] if text is None else self.spans(plan, len(text), draw)
        parts = None if text is None else self._characters.cut(tokens, list(itertools.chain(*spans)))
        if parts is None:
            self._warn()
            return None
        cut = [[(token, token) for token in part] for part in parts]
        if body[0][1] == -100 and (first := next((part for part in cut if part), None)):
            first[0] = (first[0][0], -100)
        return cut

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: the tokenizer does not give a document back as it was after cutting it at characters "
                "(it changes spaces, the document holds half a character, or spells out a special token). Such "
                "documents are cut between tokens.",
                stacklevel=2,
            )


def without_end(parts: Sequence[list[Pair]], count: int) -> list[list[Pair]]:
    """Return the parts of a text without its last tokens.

    Args:
        parts: in the order of the text.
        count: of these tokens.

    Example:
        >>> without_end([[(5, 5), (6, 6)], [(7, 7)], [(8, 8)]], 2)
        [[(5, 5), (6, 6)], [], []]
    """
    kept, left = [], count
    for part in reversed(parts):
        gone = min(left, len(part))
        kept.append(part[: len(part) - gone])
        left -= gone
    return kept[::-1]


def special_ids(name: str, tokenizer: Any, config: Any) -> frozenset[int]:
    """Collect what tokenizer and config call `name`.

    Args:
        name: such as `"eos_token_id"`.
        tokenizer: may be None.
        config: may be None.

    Example:
        >>> from transformers import LlamaConfig
        >>> sorted(special_ids("eos_token_id", None, LlamaConfig(eos_token_id=[2, 7])))
        [2, 7]
    """
    sources = [tokenizer, config.get_text_config() if config is not None else None]
    values = [getattr(source, name, None) for source in sources if source is not None]
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return frozenset(int(item) for item in flat if item is not None)
