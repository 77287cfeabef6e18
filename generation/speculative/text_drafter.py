"""A draft model with a tokenizer of its own: it reads the rows' text, and its drafts are tokenised anew."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from hf_ext.generation.speculative.acceptance import deterministic
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import as_model
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.speculative.translation import Translator, common_prefix
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.tree_state import TreeState
from hf_ext.generation.speculative.vocabulary import fit_tokens, vocabulary_size

#: Tokens of the target that may come of one of the draft model, at most.
FINER = 2


class TextDrafter(Drafter):
    """Drafts chains in the text: the draft model's likeliest tokens, as the target would tokenise them.

    The same text may be tokenised in several ways, so there is no law from which a token was drawn. The
    draft is a function of the text, and the rule for drafts that were chosen keeps the target's law. What
    the draft model has read of a row stays in its cache up to the first of its tokens that has changed.

    Args:
        model: the draft model.
        length: its tokens to draft.
        confidence: draft no further where its likeliest token has a probability below this.
        tokenizers: the target's and its own.
    """

    def __init__(self, model: Any, length: int, confidence: float, tokenizers: tuple[Any, Any]) -> None:
        self.draft_model, self.length, self.confidence = model, length, confidence
        self.translator = Translator(*tokenizers)
        self.ahead = FINER * length
        self.calls = self.positions = 0

    def start(self, context: DraftContext) -> None:
        """Give the draft model its lanes.

        Raises:
            ValueError: it cannot forget tokens.
        """
        self.draft_model = as_model(self.draft_model, context.run.model)
        problem = tree_problem(self.draft_model)
        if problem is not None:
            raise ValueError(f"{context.run.report.strategy}: draft_model forgets what it drafted: {problem}")
        self.state = TreeState.fresh(self.draft_model, len(context.lanes))
        # A model may have more rows than its tokenizer has tokens, and a tokenizer more tokens than its model has rows.
        self._own = min(vocabulary_size(self.draft_model), len(self.translator.draft.tokenizer))
        self._targets = vocabulary_size(context.run.model)
        self.lines = [self.translator.line() for _ in context.lanes]
        #: For every lane the tokens that are in the draft model's cache.
        self.held: list[list[int]] = [[] for _ in context.lanes]

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a chain under every root; none where its text cannot be tokenised behind the row's tokens."""
        depth = context.useful_depth(self.ahead)
        if not depth:
            return DraftTree.empty(len(context.lanes), context.device)
        for line, text in zip(self.lines, context.texts, strict=True):
            self.translator.follow(line, text)
        drafted = self._draft(min(self.length, FINER * depth))
        found = []
        for line, text, ids in zip(self.lines, context.texts, drafted, strict=True):
            tokens = self.translator.back(line, text, ids)[:depth]
            found.append(list(itertools.takewhile(lambda token: token < self._targets, tokens)))
        tree = DraftTree.from_lists(found, [list(range(-1, len(row) - 1)) for row in found], context.device)
        tree.rule = deterministic
        return tree

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Go on with the lanes that go on."""
        if len(verified.continues) < len(self.lines) and verified.continues:
            self.state.select(verified.continues)
        self.lines = [self.lines[lane] for lane in verified.continues]
        self.held = [self.held[lane] for lane in verified.continues]

    @torch.no_grad()
    def _draft(self, length: int) -> list[list[int]]:
        """Return of every lane the draft model's likeliest tokens, up to a special one."""
        logits, tokens = self._read(), torch.empty(0)
        drafted: list[list[int]] = [[] for _ in self.lines]
        going = set(range(len(self.lines)))
        for place in range(length):
            if place:
                logits = self._counted(self.state.extend(tokens[:, None]).logits[:, 0])
            chance, tokens = logits[:, : self._own].max(-1)
            if self.confidence and place:
                sure = (chance.float() - logits.float().logsumexp(-1)).exp() >= self.confidence
                going &= set(sure.nonzero().flatten().tolist())
            for lane, token in enumerate(tokens.tolist()):
                if lane in going:
                    drafted[lane].append(token)
            going -= {lane for lane in going if drafted[lane][-1] in self.translator.draft.special_ids}
            if not going:
                break
        self.state.rewind()
        return drafted

    def _read(self) -> torch.Tensor:
        """Read what the lines have got since the last time; return the logits that follow."""
        nothing = [self.draft_model.config.get_text_config(decoder=True).bos_token_id or 0]
        rows = [line.ids or nothing for line in self.lines]
        # The last token is read again where nothing is new.
        kept = [min(common_prefix(held, row), len(row) - 1) for held, row in zip(self.held, rows, strict=True)]
        try:
            self.state.forget(kept)
        except ValueError:  # what is needed has left a sliding window: all is read again
            self.state, kept = TreeState.fresh(self.draft_model, len(rows)), [0] * len(rows)
        counts = [len(row) - start for row, start in zip(rows, kept, strict=True)]
        longest = max(counts)
        table = [row[start:] + [0] * (start + longest - len(row)) for row, start in zip(rows, kept, strict=True)]
        ids = fit_tokens(torch.tensor(table, device=self.state.device), vocabulary_size(self.draft_model))
        logits = self.state.read(ids, counts)
        self.held = [list(row) for row in rows]
        return self._counted(logits, longest)

    def _counted(self, logits: torch.Tensor, columns: int = 1) -> torch.Tensor:
        self.calls += 1
        self.positions += len(self.lines) * columns
        return logits
