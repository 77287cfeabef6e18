"""Every policy runs through the conformance suite."""

from __future__ import annotations

from hf_ext.cache import CachePolicy, Knorm, StreamingLLM
from hf_ext.cache.policies.adakv import AdaKV
from hf_ext.cache.policies.h2o import H2O
from hf_ext.cache.policies.keydiff import KeyDiff
from hf_ext.cache.policies.pyramidkv import PyramidKV
from hf_ext.cache.policies.snapkv import SnapKV
from hf_ext.cache.policies.tova import TOVA
from hf_ext.testing.cache import SHAPES, CacheConformance

#: Storage in which heads hold different numbers of entries does not go with sliding windows.
NOT_SLIDING = tuple(name for name in SHAPES if name != "sliding")


class TestKnorm(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return Knorm(budget=budget, **options)


class TestStreamingLLM(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return StreamingLLM(budget=budget, sinks=2, **options)


class TestH2O(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return H2O(budget=budget, **options)


class TestH2OOfMeans(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return H2O(budget=budget, recent=0.0, average=True, **options)


class TestSnapKV(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return SnapKV(budget=budget, window=3, **{"when": "both", **options})


class TestPyramidKV(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return PyramidKV(budget=budget, window=3, slope=1.5, **{"when": "both", **options})


class TestTOVA(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return TOVA(budget=budget, **options)


class TestKeyDiff(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return KeyDiff(budget=budget, **options)


class TestAdaKVOfSnapKV(CacheConformance):
    shapes = NOT_SLIDING

    def policy(self, budget, **options) -> CachePolicy:
        return AdaKV(policy=SnapKV(budget=budget, window=3, **{"when": "both", **options}))


class TestAdaKVOfH2O(CacheConformance):
    shapes = NOT_SLIDING

    def policy(self, budget, **options) -> CachePolicy:
        return AdaKV(policy=H2O(budget=budget, **options))
