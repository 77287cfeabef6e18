"""Keep the keys that are least like the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen


@dataclass(kw_only=True)
class KeyDiff(CachePolicy):
    """Keep the keys that are least like the mean direction of all keys; looks at nothing but keys.

    The score of a key is its negative cosine to the mean of the normalised keys of its head.

    Source: KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments (arXiv:2504.15364).

    Args:
        budget: what each head may keep; see `CachePolicy`, as for all other options.

    Example:
        >>> import torch
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.shared("llama")
        >>> cache = CompressedCache(model.config, KeyDiff(budget=4))
        >>> _ = model(torch.arange(1, 11)[None], past_key_values=cache)
        >>> cache.held()
        [4, 4]
    """

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the negative cosine to the mean direction."""
        keys = functional.normalize(entries.keys.float(), dim=-1)
        real = entries.real[..., None]
        anchor = (keys * real).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True).clamp(min=1)
        return -functional.cosine_similarity(keys, anchor, dim=-1)
