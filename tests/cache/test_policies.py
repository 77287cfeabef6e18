"""Every policy runs through the conformance suite."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hf_ext.cache import (
    H2O,
    TOVA,
    AdaKV,
    CachePolicy,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    PyramidKV,
    QFilters,
    SnapKV,
    StreamingLLM,
)
from hf_ext.cache.policies.rotations import rotations_of
from hf_ext.testing import tiny_models
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


class OfAModel(CacheConformance):
    """Checks of a policy that is made for one model: it is told the shape first."""

    shape = "wide"  # the model of the check of memory, which does not ask for one by its shape

    def script(self, shape, budget, rows=3, **options) -> Any:
        self.shape = shape
        return super().script(shape, budget, rows, **options)

    def model(self, shape) -> Any:
        self.shape = shape
        return super().model(shape)


def build(shape: str) -> Any:
    """Return a model of a shape of the suite."""
    if shape == "wide":
        return tiny_models.build("llama", head_dim=64, max_position_embeddings=1024)
    kind, changes = SHAPES[shape]
    return tiny_models.build(kind, **changes)


@functools.cache
def rotations(shape: str) -> Tensor | None:
    """Return how a model turns its queries; None for learned positions."""
    return None if shape in ("learned-positions", "offset-positions") else rotations_of(build(shape))


@functools.cache
def directions(shape: str) -> Tensor:
    """Return filters that look like chance for a model of a shape."""
    config = build(shape).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.randn(config.num_hidden_layers, heads, width, generator=torch.Generator().manual_seed(1))


class TestExpectedAttention(OfAModel):
    def policy(self, budget, **options) -> CachePolicy:
        kept = {"when": "both", "samples": 3, **options}
        return ExpectedAttention(rotations=rotations(self.shape), budget=budget, sinks=2, horizon=8, **kept)


class TestQFilters(OfAModel):
    def policy(self, budget, **options) -> CachePolicy:
        return QFilters(filters=directions(self.shape), budget=budget, window=2, **options)


class TestAdaKVOfQFilters(OfAModel):
    shapes = ("grouped", "learned-positions", "alternating")

    def policy(self, budget, **options) -> CachePolicy:
        return AdaKV(policy=QFilters(filters=directions(self.shape), budget=budget, **options), floor=0.5)
