"""KV caches that keep what a policy says: `model.generate(..., past_key_values=CompressedCache(config, policy))`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_ext.lazy import lazy_attributes

if TYPE_CHECKING:
    from hf_ext.cache.cache import CompressedCache as CompressedCache
    from hf_ext.cache.entries import Entries as Entries
    from hf_ext.cache.policies.knorm import Knorm as Knorm
    from hf_ext.cache.policies.streaming_llm import StreamingLLM as StreamingLLM
    from hf_ext.cache.policy import CachePolicy as CachePolicy
    from hf_ext.cache.policy import Seen as Seen
    from hf_ext.cache.policy import Selection as Selection

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "CachePolicy": "policy",
        "CompressedCache": "cache",
        "Entries": "entries",
        "Knorm": "policies.knorm",
        "Seen": "policy",
        "Selection": "policy",
        "StreamingLLM": "policies.streaming_llm",
    },
)
