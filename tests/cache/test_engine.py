"""The engine, through policies made for the purpose: each uses what a real one may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_ext.attention.intercept import intercept
from hf_ext.cache import CachePolicy, CompressedCache, Entries, Seen
from hf_ext.testing import tiny_models
from hf_ext.testing.cache import SHAPES, CacheConformance


def noise(entries: Entries, seen: Seen) -> Tensor:
    """Scores that look like chance and are the same for the same entry."""
    head = torch.arange(entries.columns.shape[1])[None, :, None]
    column = entries.columns - entries.padding[:, None, None]
    return torch.sin(1e3 * (column + 17.0 * head + 5.0 * seen.layer))


@dataclass(kw_only=True)
class Uneven(CachePolicy):
    """Another number of entries in every head."""

    storage: ClassVar[Literal["dense", "ragged"]] = "ragged"

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        return noise(entries, seen)

    def head_budgets(self, scores: Tensor, keep: Tensor) -> Tensor:
        heads = scores.shape[1]
        shift = (torch.arange(heads) - (heads - 1) / 2) / heads
        return (keep[:, None] * (1 + shift)).floor().long().clamp(min=1)


@dataclass(kw_only=True)
class Mass(CachePolicy):
    """The attention that each entry has got so far, from all queries."""

    column_sums: ClassVar[bool] = True

    def field_names(self) -> tuple[str, ...]:
        return ("mass",)

    def observe(self, entries: Entries, seen: Seen) -> dict[str, Tensor]:
        assert seen.column_sums is not None
        return {"mass": entries.fields["mass"] + seen.column_sums}

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        return entries.fields["mass"]


@dataclass(kw_only=True)
class UnevenMass(Mass, Uneven):
    """Both at once."""

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        return Mass.scores(self, entries, seen)


@dataclass(kw_only=True)
class LastQueries(CachePolicy):
    """The scores of the last three queries."""

    queries: ClassVar[int] = 3

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        assert seen.queries is not None
        assert seen.query_real is not None
        queries = seen.queries.unflatten(1, (entries.keys.shape[1], -1)) * seen.query_real[:, None, None, :, None]
        return torch.einsum("bhgqd,bhnd->bhn", queries, entries.keys)


class TestUneven(CacheConformance):
    shapes = tuple(name for name in SHAPES if name != "sliding")

    def policy(self, budget, **options) -> CachePolicy:
        return Uneven(budget=budget, **options)


class TestMass(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return Mass(budget=budget, **options)


class TestUnevenMass(CacheConformance):
    shapes = tuple(name for name in SHAPES if name != "sliding")

    def policy(self, budget, **options) -> CachePolicy:
        return UnevenMass(budget=budget, **options)


class TestLastQueries(CacheConformance):
    def policy(self, budget, **options) -> CachePolicy:
        return LastQueries(budget=budget, **options)


class Told(LastQueries):
    """Notes what the first layer is told."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.told: list[Seen] = []

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        if seen.layer == 0:
            self.told.append(seen)
        return super().scores(entries, seen)


def test_a_policy_is_told_the_last_queries_whatever_the_passes_were():
    """Those of the first layer do not depend on what is held; chunks, steps and recorded drafts give the same."""
    model = tiny_models.build("llama")
    ids, mask = tiny_models.prompts((20, 16))
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    queries = []

    def note(module, query, key, value, mask, plain, **call):
        queries.append(query)
        return plain(module, query, key, value, mask, **call)

    with torch.no_grad(), intercept(model, note):
        model(ids, attention_mask=mask, position_ids=where)
    wanted = queries[0]
    model.set_attn_implementation("hf_ext")
    policy = Told(budget=4, interval=1)
    cache = CompressedCache(model.config, policy)
    with torch.no_grad():
        start = 0
        for size, wrong in ((5, 0), (2, 0), (1, 0), (1, 0), (5, 3), (6, 2), (1, 0), (1, 0)):
            part = slice(start, start + size)
            if size == 5 and start:
                cache.activate_past_recording()
            model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=where[:, part], past_key_values=cache)
            if cache.layers[0].record_past:
                cache.crop(-wrong)
            start += size - wrong
            seen = policy.told[-1]
            count = min(start, 3)
            assert seen.query_columns.tolist() == list(range(start - count, start))
            assert seen.query_real.tolist() == mask[:, start - count : start].bool().tolist()
            gap = (seen.queries - wanted[:, :, start - count : start]).abs().max().item()
            assert gap < 1e-5, f"after {start} tokens the largest difference is {gap:.2e}"
    assert len(policy.told) == 8
