"""Staged speculative decoding: the draft model is sped up by speculation as well, and drafts a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import without_replacement
from hf_ext.generation.speculative.best_first import BestFirstDrafter
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.growing import GrowingTrees
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.strategy import positive, share


class NGrams:
    """What followed the last few tokens when they were last seen, backing off to fewer of them.

    Args:
        order: tokens looked back at, at most.

    Example:
        >>> grams = NGrams(order=2)
        >>> grams.learn([1, 2, 3, 1, 2])
        >>> grams.go_on([9, 1], 3)
        [2, 3, 1]
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.next: dict[tuple[int, ...], int] = {}

    def learn(self, text: Sequence[int], start: int = 1) -> None:
        """Note what stands after what in a text, for its tokens from place `start` on."""
        for place in range(max(start, 1), len(text)):
            self.note(tuple(text[max(place - self.order, 0) : place]), text[place])

    def note(self, before: tuple[int, ...], token: int) -> None:
        """Note that `token` stands after `before`, at most `order` tokens, and after all endings of it."""
        following = self.next
        for start in range(len(before)):
            following[before[start:]] = token

    def go_on(self, text: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may follow a text; fewer where a token was never seen."""
        last, found = tuple(text[-self.order :]), []
        for _ in range(count):
            for start in range(len(last)):
                token = self.next.get(last[start:])
                if token is not None:
                    break
            else:
                break
            found.append(token)
            last = (*last, token)[-self.order :]
        return found


class StagedDrafter(BestFirstDrafter):
    """Grows trees as `BestFirstDrafter` does, with fewer calls of the draft model.

    A call also reads a chain of tokens that n-grams propose below the most valuable node. Children are
    then drawn from the draft model's own law as ever; where one turns out to be a token that was read
    ahead, the law below it is known already and costs no call. To draw and compare is to accept a
    proposed token with its probability under the draft model, the rule for deterministic drafts.

    The n-grams learn from the texts and from what the draft model finds likeliest.

    Args:
        model: the draft model.
        nodes: nodes of a tree.
        depth: levels of a tree.
        guessed: tokens to read ahead.
        order: tokens that n-grams look back at.
        threshold: a slot worth no more than this is not filled.
    """

    def __init__(self, model: Any, nodes: int, depth: int, guessed: int, order: int, threshold: float) -> None:
        super().__init__(model, nodes, depth, threshold=threshold)
        self.guessed, self.grams = guessed, NGrams(order)

    def start(self, context: DraftContext) -> None:
        """Give the draft model its lanes, and forget the texts of an earlier call."""
        super().start(context)
        self.grams = NGrams(self.grams.order)
        self._learned = [0] * len(context.run.input_ids)  # tokens learned of each row

    def guess(self, context: DraftContext, lane: int, prefix: list[int]) -> list[int]:
        """Return what n-grams propose."""
        if not self.guessed:
            return []
        text, row = context.texts[lane], context.lanes[lane]
        if self._learned[row] < len(text):
            self.grams.learn(text, self._learned[row])
            self._learned[row] = len(text)
        return self.grams.go_on([*text[-self.grams.order :], *prefix], self.guessed)

    def heard(
        self, context: DraftContext, trees: GrowingTrees, where: list[tuple[int, int]], law: torch.Tensor
    ) -> None:
        """Learn the draft model's likeliest tokens, which are what the next trees will draw most often."""
        if self.guessed:
            order = self.grams.order
            texts = [tuple(text[-order:]) for text in context.texts]
            for (lane, node), token in zip(where, _likeliest(law), strict=True):
                prefix = trees.prefixes[lane][node + 1]
                self.grams.note((texts[lane] + tuple(prefix))[-order:], token)


def _likeliest(law: torch.Tensor) -> list[int]:
    """Return the likeliest token of each line; on a CPU numpy finds it several times faster than torch."""
    found: list[int] = (law.numpy() if law.device.type == "cpu" else law).argmax(-1).tolist()
    return found


@dataclass
class StagedSpeculativeDecoding(Speculative):
    """Speculative decoding in two stages: n-grams draft for the draft model, which drafts a tree for the target.

    The draft model grows a tree of `nodes` nodes where it expects them to be accepted, branching where
    it is unsure, and the target evaluates the tree in one forward pass. Growing would take the draft
    model a call for every level; n-grams of the text, which cost next to nothing, propose the next few
    tokens, and a call reads them along. What is drafted has exactly the draft model's law, whatever the
    n-grams say: children are drawn from it without replacement, and the target tries them by recursive
    rejection. So the text has exactly the target's law.

    With `do_sample=False` children are the likeliest tokens of the draft model, and nodes are placed by
    the product of its probabilities.

    Args:
        draft_model: a causal language model with the target's tokenizer, much cheaper than the target.
        nodes: nodes of a tree.
        depth: levels of a tree at most.
        ngram_tokens: tokens that n-grams propose a draft call; 0 does without the second stage.
        ngram_order: tokens that n-grams look back at, at most.
        threshold: nodes expected to be reached with a probability of no more than this are not drafted.

    Raises:
        ValueError: the draft model has another tokenizer, or a model cannot forget rejected tokens.

    Source:
        Accelerating LLM Inference with Staged Speculative Decoding (arXiv:2308.04623). Its second
        stage is an n-gram model fitted beforehand; here n-grams learn during the call.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = StagedSpeculativeDecoding(draft_model=target, nodes=12, depth=4)
        >>> ours = target.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=10, do_sample=False)
        >>> bool((ours == target.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
    """

    rule: ClassVar[Rule] = staticmethod(without_replacement)

    draft_model: Any
    nodes: int = 16
    depth: int = 8
    ngram_tokens: int = 4
    ngram_order: int = 3
    threshold: float = 0.02

    def check_options(self) -> None:
        """Raise ValueError for drafts that cannot be."""
        positive("nodes", self.nodes)
        positive("depth", self.depth)
        positive("ngram_order", self.ngram_order)
        if isinstance(self.ngram_tokens, bool) or not isinstance(self.ngram_tokens, int) or self.ngram_tokens < 0:
            raise ValueError(f"ngram_tokens must be an int from 0 on, got {self.ngram_tokens!r}")
        share("threshold", self.threshold)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the draft model with its n-grams, growing the trees."""
        return StagedDrafter(
            self.draft_model, self.nodes, self.depth, self.ngram_tokens, self.ngram_order, self.threshold
        )
