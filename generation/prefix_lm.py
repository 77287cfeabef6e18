"""Prefix language modelling: a causal model whose prompt sees all of itself (arXiv:2204.05832)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_ext.attention import AttentionStructure
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting


@dataclass
class PrefixLM(StructuredPrompting):
    """Read the prompt without the causal mask: its tokens see each other in both directions.

    What is generated stays causal. Where a prompt has `segment_ids`, they are spans of their own instead: the
    tokens of a span see each other and all before the span, what stands outside of spans stays causal.
    Positions do not change.

    A model that was trained causally only has to be converted first: train it with
    `hf_ext.trainer_callbacks.PrefixLMTraining`.

    Args:
        decode_with: how to go on after the prompt: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: a span in several pieces, or a call with a filled cache.

    Source:
        Wang et al., What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot
        Generalization? (ICML 2022).

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> PrefixLM().generate(model, ids, attention_mask=mask, max_new_tokens=4, do_sample=False).shape
        torch.Size([3, 16])
    """

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return causal attention with spans; the whole prompt is one unless it has segments."""
        has_spans = (prompt.mask & (prompt.segments > 0)).any(-1, keepdim=True)
        spans = torch.where(has_spans, prompt.segments, prompt.mask.long())
        return AttentionStructure.causal(prompt.mask).spans(spans)
