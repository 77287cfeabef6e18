"""Every policy runs through the conformance suite."""

from __future__ import annotations

from hf_ext.cache import CachePolicy, Knorm, StreamingLLM
from hf_ext.testing.cache import CacheConformance


class TestKnorm(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return Knorm(budget=budget, **options)


class TestStreamingLLM(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return StreamingLLM(budget=budget, sinks=2, **options)
