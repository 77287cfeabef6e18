"""What the claim checks of methods that draft trees share: two ways of drafting, compared prompt by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.claims.speculation import sampled_tokens_per_call, tokens_per_call
from hf_ext.generation import SpeculativeDecoding
from hf_ext.generation.speculative.acceptance import Rule
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.verify import Measurement

#: Many prompts and few tokens of each: small models soon repeat themselves, which flatters long chains.
PROMPTS, TOKENS, SEEDS = 64, 24, (0,)
#: Temperatures that sampling is compared at.
TEMPERATURES = (1.0, 0.6)


def chain(draft_tokens: int) -> SpeculativeDecoding:
    """Return plain speculative decoding with the embedded draft model."""
    return SpeculativeDecoding(draft_model=held_out.load("draft")[0], draft_tokens=draft_tokens)


def per_prompt(strategy: Speculative, temperature: float) -> list[float]:
    """Return tokens per call of the target for every prompt, greedy where `temperature` is 0."""
    if temperature:
        return sampled_tokens_per_call(strategy, SEEDS, PROMPTS, TOKENS, temperature=temperature)
    return tokens_per_call(strategy, PROMPTS, TOKENS)


def gain(ours: Speculative, theirs: Speculative, names: tuple[str, str], temperature: float = 0) -> Measurement:
    """Measure how many more tokens a call of the target yields with one way of drafting than with another.

    Where tokens are drawn, the details also have the difference at the other of `TEMPERATURES`.

    Args:
        ours: the one.
        theirs: the other.
        names: what to call them.
        temperature: one of `TEMPERATURES`, to draw tokens over `SEEDS`, or 0 for greedy decoding.
    """

    def compare(temperature: float) -> tuple[list[list[float]], list[float]]:
        found = [per_prompt(strategy, temperature) for strategy in (ours, theirs)]
        return found, [a - b for a, b in zip(*found, strict=True)]

    found, differences = compare(temperature)
    details: dict[str, Any] = {
        f"tokens per call, {name}": mean(values) for name, values in zip(names, found, strict=True)
    }
    for other in TEMPERATURES if temperature else ():
        if other != temperature:
            there = compare(other)[1]
            low, high = bootstrap(there)
            details |= {f"difference at temperature {other:g}": mean(there), "its interval": f"{low:.3g} to {high:.3g}"}
    return Measurement(
        mean(differences),
        spread=bootstrap(differences),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=SEEDS if temperature else (),
        details=details,
    )


def more_nodes(build: Callable[[int], Speculative], budgets: tuple[int, ...], temperature: float = 0) -> Measurement:
    """Measure the smallest step in tokens per call from one number of nodes to the next larger one.

    Args:
        build: makes the strategy for a number of nodes.
        budgets: numbers of nodes, rising.
        temperature: as in `gain`.
    """
    found = [mean(per_prompt(build(nodes), temperature)) for nodes in budgets]
    return Measurement(
        min(b - a for a, b in itertools.pairwise(found)),
        seeds=SEEDS if temperature else (),
        details={f"tokens per call, {nodes} nodes": value for nodes, value in zip(budgets, found, strict=True)},
    )


def acceptance_of(rule: Rule, p: torch.Tensor, q: torch.Tensor, drafts: list[int]) -> float:
    """Return the probability that one of these drafts is accepted, the coins gone through."""
    rejected = 1.0
    for chance in rule(p, q, drafts):
        rejected *= 1 - chance
    return 1 - rejected
