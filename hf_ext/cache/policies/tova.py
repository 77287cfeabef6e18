"""Keep what the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policies.received import received
from hf_ext.cache.policy import CachePolicy, Seen


@dataclass(kw_only=True)
class TOVA(CachePolicy):
    """Keep what the last query attends to, averaged over all heads of a layer, and the last token itself.

    All heads of a layer keep the same tokens, as long as they held the same before.

    Source: Transformers are Multi-State RNNs (arXiv:2401.06104).

    Args:
        budget: what each head may keep; see `CachePolicy`, as for all other options.
        window: last tokens that stay.

    Example:
        >>> import torch
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama").eval()
        >>> model.set_attn_implementation("hf_ext")
        >>> cache = CompressedCache(model.config, TOVA(budget=4))
        >>> _ = model(torch.arange(1, 11)[None], past_key_values=cache)
        >>> bool((cache.columns(0)[0, 0] == cache.columns(0)[0, 1]).all())
        True
    """

    window: int = 1

    queries: ClassVar[int] = 1

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the attention of the last query."""
        votes = received(entries, seen)
        return votes.mean(dim=1, keepdim=True).expand_as(votes)
