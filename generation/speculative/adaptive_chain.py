"""Draft a chain as long as it pays, and learn from every step how long that is."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import ChainDrafter
from hf_ext.generation.speculative.drafter import Verified
from hf_ext.generation.speculative.stopping import ByWorth
from hf_ext.generation.speculative.tree import DraftTree


class AdaptiveChainDrafter(ChainDrafter):
    """Drafts chains whose length `ByWorth` decides.

    Args:
        model: the draft model.
        longest: tokens to draft at most.
        draft_cost: a call of the draft model, as a share of one of the target.
    """

    def __init__(self, model: PreTrainedModel, longest: int, draft_cost: float) -> None:
        self.worth = ByWorth(draft_cost)
        self._drafted: torch.Tensor | None = None
        super().__init__(model, longest, self.worth)

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a chain under every root."""
        self.worth.begin(len(context.lanes))
        tree = super().propose(context)
        self._drafted = tree.tokens
        return tree

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Follow the rows, and learn how good the chains were."""
        super().observe(context, verified)
        # As one of several arms it is told of the others' trees as well.
        if verified.tree.tokens is self._drafted:
            self.worth.learn(verified.outcomes)
