"""What the claim checks of methods that draft trees share: two ways of drafting, compared prompt by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, sampled_tokens_per_call, tokens_per_call
from hf_ext.generation import SpeculativeDecoding
from hf_ext.generation.speculative.acceptance import Rule
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.verify import Measurement

SEEDS = (0, 1, 2)


def chain(draft_tokens: int) -> SpeculativeDecoding:
    """Return plain speculative decoding with the embedded draft model."""
    return SpeculativeDecoding(draft_model=held_out.load("draft")[0], draft_tokens=draft_tokens)


def gain(ours: Speculative, theirs: Speculative, names: tuple[str, str], sampled: bool, **settings: Any) -> Measurement:
    """Measure how many more tokens a call of the target yields with one way of drafting than with another.

    Args:
        ours: the one.
        theirs: the other.
        names: what to call them.
        sampled: draw tokens, over `SEEDS`, rather than decode greedily.
        **settings: of `generate`.
    """
    count = sampled_tokens_per_call if sampled else tokens_per_call
    found = [count(ours, **settings), count(theirs, **settings)]
    differences = [a - b for a, b in zip(*found, strict=True)]
    return Measurement(
        mean(differences),
        spread=bootstrap(differences),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=SEEDS if sampled else (),
        details={f"tokens per call, {name}": mean(values) for name, values in zip(names, found, strict=True)},
    )


def more_nodes(build: Callable[[int], Speculative], budgets: tuple[int, ...], sampled: bool) -> Measurement:
    """Measure the smallest step in tokens per call from one number of nodes to the next larger one.

    Args:
        build: makes the strategy for a number of nodes.
        budgets: numbers of nodes, rising.
        sampled: as in `gain`.
    """
    count = sampled_tokens_per_call if sampled else tokens_per_call
    found = [mean(count(build(nodes))) for nodes in budgets]
    return Measurement(
        min(b - a for a, b in itertools.pairwise(found)),
        seeds=SEEDS if sampled else (),
        details={f"tokens per call, {nodes} nodes": value for nodes, value in zip(budgets, found, strict=True)},
    )


def acceptance_of(rule: Rule, p: torch.Tensor, q: torch.Tensor, drafts: list[int]) -> float:
    """Return the probability that one of these drafts is accepted, the coins gone through."""
    rejected = 1.0
    for chance in rule(p, q, drafts):
        rejected *= 1 - chance
    return 1 - rejected
