"""Contrastive search keeps to the contract of strategies and chooses the right tokens."""

from __future__ import annotations

from hf_ext.generation import ContrastiveSearch
from hf_ext.testing.strategy import StrategyConformance


class TestConformance(StrategyConformance):
    def strategy(self) -> ContrastiveSearch:
        return ContrastiveSearch(penalty_alpha=0.6, top_k=4)
