"""Claim checks of DySpec (arXiv:2410.11744) with the embedded models."""

from __future__ import annotations

from hf_ext.claims import draft_trees, held_out, speculation
from hf_ext.claims.held_out import DATA, mean
from hf_ext.claims.speculation import sampled_tokens_per_call
from hf_ext.generation import DySpec, RecursiveSpeculativeDecoding
from hf_ext.verify import Claim, Measurement, Threshold

#: A tree of fixed shape, and the number of its nodes.
FIXED = (3, 2, 1, 1)
NODES, DEPTH, CHAIN, LARGE = 21, 4, 16, 60
#: Slots are valued by draft probabilities, which is meant for sharp laws.
TEMPERATURE = 0.6


def ours(nodes: int = NODES, depth: int = 8) -> DySpec:
    """Return the method with the embedded draft model."""
    return DySpec(draft_model=held_out.load("draft")[0], nodes=nodes, depth=depth)


def over_chain() -> Measurement:
    """Compare with a chain of as many nodes, which the tree may become."""
    return draft_trees.gain(
        ours(CHAIN, depth=CHAIN), draft_trees.chain(CHAIN), ("DySpec", "a chain"), temperature=TEMPERATURE
    )


def over_fixed_tree() -> Measurement:
    """Compare with a tree of the same size, depth and rule whose shape is always the same."""
    fixed = RecursiveSpeculativeDecoding(draft_model=held_out.load("draft")[0], branching=FIXED)
    names = ("DySpec", f"branching {FIXED}")
    return draft_trees.gain(ours(depth=DEPTH), fixed, names, temperature=TEMPERATURE)


def by_budget() -> Measurement:
    """Let trees grow."""
    return draft_trees.more_nodes(ours, (4, 16, 60), temperature=TEMPERATURE)


def draft_calls() -> Measurement:
    """Count the draft calls of large trees."""
    strategy = ours(LARGE)
    tokens = mean(sampled_tokens_per_call(strategy, seeds=(0,)))
    assert strategy.report is not None  # set by the call above
    calls = strategy.report.draft_calls / strategy.report.details["steps"]
    return Measurement(calls, seeds=(0,), details={"nodes": LARGE, "levels": strategy.depth, "tokens per call": tokens})


CLAIMS = (
    speculation.identity_claim(ours),
    Claim(
        name="over-chain",
        paper="At the same budget a dynamic tree has more tokens accepted than a chain.",
        measures=f"more tokens per call than with a chain of {CHAIN} nodes, sampling at temperature {TEMPERATURE}",
        threshold=Threshold(">", 0),
        check=over_chain,
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="over-fixed-tree",
        paper="A tree grown at run time has more tokens accepted than one of fixed shape.",
        measures=f"more tokens per call than with branching {FIXED}, both of {NODES} nodes and {DEPTH} levels, "
        f"sampling at temperature {TEMPERATURE}",
        threshold=Threshold(">", 0),
        check=over_fixed_tree,
        unit="tokens per call",
        seconds=70,
        data=DATA,
    ),
    Claim(
        name="more-nodes",
        paper="Larger budgets have more tokens accepted.",
        measures=f"smallest growth of tokens per call among budgets of 4, 16 and 60 nodes, sampling "
        f"at temperature {TEMPERATURE}",
        threshold=Threshold(">", 0),
        check=by_budget,
        unit="tokens per call",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="draft-calls",
        paper="Growing by levels spares the draft model a call for every node.",
        measures=f"draft calls a step for trees of {LARGE} nodes, sampling",
        threshold=Threshold("<=", 8),
        check=draft_calls,
        unit="draft calls per step",
        seconds=40,
        data=DATA,
    ),
)
