"""Speculative contrastive decoding: the amateur whose faults are subtracted also drafts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import single_draft
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import ChainDrafter
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative.vocabulary import fit_logits
from hf_ext.generation.speculative_decoding import check_draft_tokens
from hf_ext.generation.strategy import share

#: What implausible tokens are lowered by: enough for no chance, and finite, since a logits processor may
#: forbid all that are plausible.
OUT_OF_REACH = 1e5


def contrastive_logits(expert: torch.Tensor, amateur: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """Return the logits of contrastive decoding, `(1 + beta) log p_expert - beta log p_amateur`.

    Tokens to which the expert gives less than `alpha` times its highest probability are out of reach
    of any temperature; they come into play only if a logits processor forbids all others.

    Args:
        expert: `(..., vocabulary)` logits of the expert.
        amateur: likewise of the amateur.
        beta: strength of the contrast; 0 for the expert alone.
        alpha: the plausibility threshold, from 0 (none) to 1.

    Example:
        >>> expert, amateur = torch.tensor([2.0, 1.9, -5.0]), torch.tensor([3.0, 0.0, -9.0])
        >>> contrastive_logits(expert, amateur, beta=0.5, alpha=0.1).softmax(-1).argmax().item()
        1
    """
    # Logits differ from log-probabilities by a number that is the same for all tokens.
    contrast = (1 + beta) * expert - beta * amateur if beta else expert
    if alpha == 0:
        return contrast
    implausible = expert < expert.amax(-1, keepdim=True) + math.log(alpha)
    return torch.where(implausible, contrast - OUT_OF_REACH, contrast)


class AmateurDrafter(ChainDrafter):
    """Drafts a chain and hands over the amateur's logits at every node, the last one included."""

    def first(self, context: DraftContext) -> DraftTree:
        """Let the amateur read the prompts, so that the first token is contrasted as well."""
        if not all(context.texts):
            raise ValueError(
                f"{context.run.report.strategy}: the amateur reads the prompt as tokens, which inputs_embeds does not "
                "give; pass input_ids"
            )
        tree = super().first(context)
        tree.scores = self._contrasted(self.draft.catch_up(context)[:, None])
        return tree

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a chain under every root."""
        tree = super().propose(context)
        if not tree.nodes:
            tree.scores = self._contrasted(self.draft.catch_up(context)[:, None])
            return tree
        last = self.draft.extend(tree.tokens[:, -1:], [[tree.nodes - 1]] * tree.lanes)
        tree.scores = self._contrasted(torch.stack([*self.seen, last[:, 0]], dim=1))
        return tree

    def _contrasted(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave out what stands for tokens that the amateur does not have."""
        return logits[..., : self.draft.common]


@dataclass
class SpeculativeContrastiveDecoding(Speculative):
    """Contrastive decoding at the price of speculative decoding.

    The text follows the law softmax((1 + beta) log p_expert - beta log p_amateur) over the tokens to
    which the expert gives at least `alpha` times its highest probability, exactly as if both models
    had been asked for every single token; logits processors apply to that law. The amateur drafts
    `draft_tokens` tokens, which are accepted and replaced as in speculative decoding.

    Unlike the other speculative methods this one changes the text: that of the expert alone comes
    out with `beta=0, alpha=0` only. A token that the amateur has no row for (the target's vocabulary may
    be padded further) cannot be contrasted and is not written.

    Args:
        draft_model: the amateur, a causal language model with the target's tokenizer.
        draft_tokens: tokens drafted a step.
        beta: strength of the contrast, 0 or more.
        alpha: plausibility threshold, from 0 (none) to 1.

    Raises:
        ValueError: the amateur has another tokenizer, or a model cannot forget rejected tokens.

    Source:
        Speculative Contrastive Decoding (arXiv:2311.08981), algorithm 1, with the contrast written as
        in Contrastive Decoding Improves Reasoning in Large Language Models (arXiv:2309.09117).

    Example:
        >>> from hf_ext.testing import exactness, tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = SpeculativeContrastiveDecoding(exactness.perturbed(target), beta=0.5, alpha=0.1)
        >>> strategy.generate(target, ids, attention_mask=mask, max_new_tokens=10, do_sample=False).shape
        torch.Size([3, 22])
    """

    rule: ClassVar[Rule] = staticmethod(single_draft)

    draft_model: Any
    draft_tokens: int = 4
    beta: float = 0.5
    alpha: float = 0.1

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        check_draft_tokens(self.draft_tokens)
        share("alpha", self.alpha)
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be a number from 0 on, got {self.beta!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the amateur."""
        return AmateurDrafter(self.draft_model, self.draft_tokens)

    def law(self, logits: torch.Tensor, tree: DraftTree, context: DraftContext) -> torch.Tensor:
        """Contrast the expert with the amateur at every node."""
        assert tree.scores is not None  # AmateurDrafter fills them in
        contrast = contrastive_logits(logits[..., : tree.scores.shape[-1]], tree.scores, self.beta, self.alpha)
        return fit_logits(contrast, logits.shape[-1])
