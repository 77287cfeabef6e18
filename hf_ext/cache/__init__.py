"""KV caches that keep what a policy says: `model.generate(..., past_key_values=CompressedCache(config, policy))`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_ext.lazy import lazy_attributes

if TYPE_CHECKING:
    from hf_ext.cache.cache import CompressedCache as CompressedCache
    from hf_ext.cache.entries import Entries as Entries
    from hf_ext.cache.policies.adakv import AdaKV as AdaKV
    from hf_ext.cache.policies.expected_attention import ExpectedAttention as ExpectedAttention
    from hf_ext.cache.policies.filters import Filters as Filters
    from hf_ext.cache.policies.h2o import H2O as H2O
    from hf_ext.cache.policies.keydiff import KeyDiff as KeyDiff
    from hf_ext.cache.policies.kivi import KIVI as KIVI
    from hf_ext.cache.policies.knorm import Knorm as Knorm
    from hf_ext.cache.policies.kvmerger import KVMerger as KVMerger
    from hf_ext.cache.policies.pyramidkv import PyramidKV as PyramidKV
    from hf_ext.cache.policies.q_filters import QFilters as QFilters
    from hf_ext.cache.policies.snapkv import SnapKV as SnapKV
    from hf_ext.cache.policies.streaming_llm import StreamingLLM as StreamingLLM
    from hf_ext.cache.policies.tova import TOVA as TOVA
    from hf_ext.cache.policy import CachePolicy as CachePolicy
    from hf_ext.cache.policy import Seen as Seen
    from hf_ext.cache.policy import Selection as Selection
    from hf_ext.cache.quantisation import Quantisation as Quantisation
    from hf_ext.cache.trained.dynamic_context_pruning import DynamicContextPruning as DynamicContextPruning
    from hf_ext.cache.trained.dynamic_context_pruning_model import (
        DynamicContextPruningModel as DynamicContextPruningModel,
    )
    from hf_ext.cache.trained.dynamic_context_pruning_training import (
        DynamicContextPruningTraining as DynamicContextPruningTraining,
    )
    from hf_ext.cache.trained.nugget2d import Nugget2D as Nugget2D
    from hf_ext.cache.trained.nugget2d_model import Nugget2DModel as Nugget2DModel
    from hf_ext.cache.trained.nugget_collator import NuggetCollator as NuggetCollator

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "AdaKV": "policies.adakv",
        "CachePolicy": "policy",
        "CompressedCache": "cache",
        "DynamicContextPruning": "trained.dynamic_context_pruning",
        "DynamicContextPruningModel": "trained.dynamic_context_pruning_model",
        "DynamicContextPruningTraining": "trained.dynamic_context_pruning_training",
        "Entries": "entries",
        "ExpectedAttention": "policies.expected_attention",
        "Filters": "policies.filters",
        "H2O": "policies.h2o",
        "KIVI": "policies.kivi",
        "KVMerger": "policies.kvmerger",
        "KeyDiff": "policies.keydiff",
        "Knorm": "policies.knorm",
        "Nugget2D": "trained.nugget2d",
        "Nugget2DModel": "trained.nugget2d_model",
        "NuggetCollator": "trained.nugget_collator",
        "PyramidKV": "policies.pyramidkv",
        "QFilters": "policies.q_filters",
        "Quantisation": "quantisation",
        "Seen": "policy",
        "Selection": "policy",
        "SnapKV": "policies.snapkv",
        "StreamingLLM": "policies.streaming_llm",
        "TOVA": "policies.tova",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
