"""Prompt lookup: what followed the last few tokens where they stood before is the draft."""

from __future__ import annotations

from dataclasses import dataclass

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative_decoding import check_draft_tokens
from hf_ext.generation.strategy import positive


class NgramIndex:
    """Where each n-gram of a growing text stood last, found without searching.

        a b c a b | x      `copy` looks for the longest suffix of the text that stood in it before,
        ^-----> continue   the last place where it did, and reads on from there.

    Args:
        max_ngram: length of the longest n-gram.

    Example:
        >>> index = NgramIndex(max_ngram=3)
        >>> index.copy([1, 2, 3, 1, 2], 4)
        [3, 1, 2, 3]
    """

    def __init__(self, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        # Of every n-gram, by its tokens, the place of the token that followed it last.
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def copy(self, text: list[int], count: int) -> list[int]:
        """Return `count` tokens that followed the longest suffix of `text` before, or none.

        A copy that reaches the end of the text goes on with itself, so that a loop is drafted at full length.

        Args:
            text: the text; that of the last call and maybe more.
            count: tokens to return.
        """
        for place in range(self._indexed, len(text)):
            for n in range(1, min(self.max_ngram, place) + 1):
                self._after[tuple(text[place - n : place])] = place
        self._indexed = len(text)
        for n in range(min(self.max_ngram, len(text) - 1), 0, -1):
            after = self._after.get(tuple(text[-n:]))
            if after is not None:
                found = text[after : after + count]
                period = len(found)
                while len(found) < count:
                    found.append(found[-period])
                return found
        return []


class LookupDrafter(Drafter):
    """Drafts a chain from each row's own text.

    Args:
        length: tokens to draft.
        max_ngram: length of the longest suffix that is looked up.
    """

    def __init__(self, length: int, max_ngram: int) -> None:
        self.length, self.max_ngram = length, max_ngram
        self.ahead = length

    def start(self, context: DraftContext) -> None:
        """Begin an index for every row."""
        self.indices = [NgramIndex(self.max_ngram) for _ in context.lanes]

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft chains; none where nothing is found."""
        depth = context.useful_depth(self.length)
        if depth == 0:
            return DraftTree.empty(len(context.lanes), context.device)
        found = [index.copy(text, depth) for index, text in zip(self.indices, context.texts, strict=True)]
        return DraftTree.from_lists(found, [list(range(-1, len(row) - 1)) for row in found], context.device)

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Go on with the lanes that go on."""
        self.indices = [self.indices[lane] for lane in verified.continues]


@dataclass
class PromptLookup(Speculative):
    """Speculative decoding without a draft model: copy what followed the same tokens before.

    The longest suffix of a row's text, of at most `max_ngram` tokens, that also stands somewhere
    before is looked up; the tokens after its last occurrence are the draft. It pays where texts
    repeat their prompt (code, tables, summaries) or themselves. An index of n-grams grows with the
    text, so that looking up costs the same however long the text is; each row has its own.

    Args:
        draft_tokens: tokens drafted a step; 0 decodes without drafts.
        max_ngram: length of the longest suffix that is looked up; shorter ones follow, down to one token.

    Raises:
        ValueError: the model cannot forget rejected tokens.

    Source:
        Saxena, Prompt Lookup Decoding (2023); in transformers, `prompt_lookup_num_tokens`, which copies
        from the first occurrence and stops at the end of the text.

    Example:
        >>> import torch
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts((6,))
        >>> strategy = PromptLookup(draft_tokens=4)
        >>> ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)).all())
        True
        >>> strategy.report.target_calls < 40  # the text of a tiny model soon repeats itself
        True
    """

    draft_tokens: int = 10
    max_ngram: int = 3

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        check_draft_tokens(self.draft_tokens)
        positive("max_ngram", self.max_ngram)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return a drafter that copies."""
        return LookupDrafter(self.draft_tokens, self.max_ngram)
