"""Isotropy of a model's token representations (arXiv:2210.14140, section 3)."""

from __future__ import annotations

import inspect

import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel


@torch.no_grad()
def isotropy(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return 1 minus the mean cosine between the representations of a text's tokens.

    Near 1: tokens are told apart and contrastive search can work. Near 0: all
    representations point the same way, and its penalty hardly depends on the candidate.

    Args:
        model: a causal language model.
        input_ids: `(batch, length)` int64.
        attention_mask: `(batch, length)`, 0 on padding.

    Returns:
        `(batch,)` float32, each row's isotropy over pairs of different tokens.

    Raises:
        ValueError: a row has fewer than two tokens.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> value = isotropy(model, torch.arange(10)[None])
        >>> bool(0 < value < 2)  # that of random weights is near 1, on either side
        True
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    count = mask.sum(-1)
    if (count < 2).any():
        raise ValueError("isotropy compares pairs of tokens; every row needs at least two")
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:  # some models count padding otherwise
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    unit = normalize(states.float(), dim=-1) * mask[..., None].to(states.device)
    # The sum over all pairs is the squared length of the sum; the pairs of a token with itself give `count`.
    pairs = unit.sum(1).square().sum(-1) - count
    return 1 - pairs / (count * (count - 1))
