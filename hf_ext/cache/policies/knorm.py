"""Keep the keys of the smallest norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen


@dataclass(kw_only=True)
class Knorm(CachePolicy):
    """Keep what has the keys of the smallest norm: they get the most attention.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv:2406.11430).

    Args:
        budget: what each head may keep; see `CachePolicy`, as for all other options.

    Example:
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.shared("llama")
        >>> cache = CompressedCache(model.config, Knorm(budget=0.5))
        >>> ids, _ = tiny_models.prompts((12,))
        >>> _ = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        >>> cache.get_seq_length(), cache.held()
        (13, [6, 6])
    """

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the negative norm of every key."""
        return -entries.keys.float().norm(dim=-1)
