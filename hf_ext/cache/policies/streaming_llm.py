"""Keep the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen


@dataclass(kw_only=True)
class StreamingLLM(CachePolicy):
    """Keep the first tokens, which serve as sinks of attention, and the last ones.

    Positions stay those the tokens had, as in transformers' own sliding windows; the paper counts them anew in
    the cache.

    Source: Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453).

    Args:
        budget: what each head may keep; see `CachePolicy`, as for all other options.
        sinks: first tokens that are kept.

    Example:
        >>> import torch
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.shared("llama")
        >>> cache = CompressedCache(model.config, StreamingLLM(budget=4, sinks=2))
        >>> _ = model(torch.arange(1, 11)[None], past_key_values=cache)
        >>> cache.columns(0)[0, 0].tolist()
        [0, 1, 8, 9]
    """

    sinks: int = 4

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the columns: the later, the longer it stays."""
        return entries.columns.float()
