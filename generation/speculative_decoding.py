"""Speculative decoding: a small model drafts a few tokens, the target checks them in one call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import single_draft
from hf_ext.generation.speculative.adaptive_chain import AdaptiveChainDrafter
from hf_ext.generation.speculative.draft_model import ChainDrafter, as_model
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.stopping import ByConfidence
from hf_ext.generation.speculative.text_drafter import TextDrafter
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative.vocabulary import same_ids
from hf_ext.generation.strategy import share

#: Tokens that `draft_tokens="auto"` drafts a step at most.
LONGEST = 20


@dataclass
class SpeculativeDecoding(Speculative):
    """Speculative decoding with a draft model.

    The draft model continues every row by `draft_tokens` tokens. The target evaluates all of them in
    one forward pass; a token drawn from the draft law q is kept with probability min(1, p / q), and
    the first that is not is replaced by one from the law max(0, p - q), normalised. The text has
    exactly the target's law. With `do_sample=False` tokens are kept as long as they are the likeliest.

    A draft model with another tokenizer drafts through the text: it reads what the target's tokens say and
    goes on with its likeliest ones, and what they say is tokenised for the target. Such drafts have no law; the
    target accepts them with the probability that it gives them itself, which is as exact and accepts less.

    Args:
        draft_model: a causal language model, much cheaper than the target.
        draft_tokens: tokens of the draft model drafted a step; 0 decodes without drafts. "auto" drafts as long as
            one more is likely to bring more than it costs, at least one and at most 20.
        confidence: draft no further where the draft model's likeliest token has a probability below
            this, from 0 (never stop) to 1. Not with "auto".
        tokenizer: the target's tokenizer, needed with `draft_tokenizer`; that given to `Strategy.generate` by default.
        draft_tokenizer: the draft model's, where it is or may be another; `assistant_tokenizer` of
            `Strategy.generate` by default. None says that the draft model has the target's.
        draft_cost: with "auto", the time of a call of the draft model as a share of one of the target; by default
            the share of parameters.

    Raises:
        ValueError: the draft model has another vocabulary and no tokenizers say how to read it, or a model cannot
            forget rejected tokens.

    Source:
        Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192), algorithm 1.

    Example:
        >>> import torch
        >>> from hf_ext.testing import tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = SpeculativeDecoding(draft_model=target, draft_tokens=4)
        >>> ours = target.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=10, do_sample=False)
        >>> bool((ours == target.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
        >>> strategy.report.details["mean_accepted"]  # a draft model that is the target is always right
        4.0
    """

    rule: ClassVar[Rule] = staticmethod(single_draft)

    draft_model: Any
    draft_tokens: int | Literal["auto"] = 5
    confidence: float = 0.0
    tokenizer: Any = field(default=None, repr=False)
    draft_tokenizer: Any = field(default=None, repr=False)
    draft_cost: float | None = None

    def check_options(self) -> None:
        """Raise ValueError for a draft that cannot be."""
        share("confidence", self.confidence)
        if self.draft_tokens != "auto":
            check_draft_tokens(self.draft_tokens, ' or "auto"')
            if self.draft_cost is not None:
                raise ValueError(f'draft_cost is for draft_tokens="auto", got draft_tokens={self.draft_tokens!r}')
            return
        if self.confidence:
            raise ValueError(
                f'draft_tokens="auto" decides itself when to stop: confidence must be 0, got {self.confidence!r}'
            )
        cost = self.draft_cost
        if cost is not None and (
            isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 <= cost < math.inf
        ):
            raise ValueError(f"draft_cost must be a number from 0 on, got {cost!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the draft model, drafting chains of the target's tokens or of its own."""
        mine = run.tokenizer if self.tokenizer is None else self.tokenizer
        other = run.draft_tokenizer if self.draft_tokenizer is None else self.draft_tokenizer
        if other is not None and mine is None:
            raise ValueError("draft_tokenizer is to be compared with the target's tokenizer; pass tokenizer= as well")
        if other is not None and not same_ids(mine, other):
            if self.draft_tokens == "auto":
                raise ValueError(
                    'draft_tokens="auto" needs a draft model with the target\'s tokenizer: what comes of a token of '
                    "another one is not known before it is drafted; pass a number"
                )
            return TextDrafter(self.draft_model, self.draft_tokens, self.confidence, (mine, other))
        if self.draft_tokens == "auto":
            drafter: ChainDrafter = AdaptiveChainDrafter(self.draft_model, LONGEST, self._cost(run))
        else:
            stopping = ByConfidence(self.confidence) if self.confidence else None
            drafter = ChainDrafter(self.draft_model, self.draft_tokens, stopping)
        drafter.tokenizers = (mine, other)
        return drafter

    def _cost(self, run: DecodingRun) -> float:
        if self.draft_cost is not None:
            return float(self.draft_cost)
        return as_model(self.draft_model, run.model).num_parameters() / run.model.num_parameters()


def check_draft_tokens(value: Any, others: str = "") -> None:
    """Raise ValueError unless `value` is a number of tokens, 0 included; `others` names what else it may be."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"draft_tokens must be an int from 0 on{others}, got {value!r}")
