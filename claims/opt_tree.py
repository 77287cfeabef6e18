"""Claim checks of OPT-Tree (arXiv:2406.17276) with the embedded models."""

from __future__ import annotations

from hf_ext.claims import draft_trees, held_out, speculation
from hf_ext.claims.held_out import DATA, mean
from hf_ext.claims.speculation import tokens_per_call
from hf_ext.generation import OptTree, RecursiveSpeculativeDecoding
from hf_ext.verify import Claim, Measurement, Threshold

#: A tree of fixed shape, and the number of its nodes.
FIXED = (4, 2, 1, 1)
NODES, DEPTH, CHAIN = 28, 4, 24
BUDGETS = (4, 8, 16, 32)


def ours(nodes: int = NODES, depth: int = 8, threshold: float = 0.0) -> OptTree:
    """Return the method with the embedded draft model."""
    return OptTree(draft_model=held_out.load("draft")[0], nodes=nodes, depth=depth, threshold=threshold)


def over_chain() -> Measurement:
    """Compare with a chain of as many nodes, which the tree may become."""
    names = ("OPT-Tree", "a chain")
    return draft_trees.gain(ours(CHAIN, depth=CHAIN), draft_trees.chain(CHAIN), names)


def over_fixed_tree() -> Measurement:
    """Compare with a tree of the same size and depth whose shape is always the same."""
    fixed = RecursiveSpeculativeDecoding(draft_model=held_out.load("draft")[0], branching=FIXED)
    names = ("OPT-Tree", f"branching {FIXED}")
    return draft_trees.gain(ours(depth=DEPTH), fixed, names)


def by_budget() -> Measurement:
    """Let trees grow."""
    return draft_trees.more_nodes(ours, BUDGETS)


def calls_saved() -> Measurement:
    """Count draft calls a step with and without a threshold."""
    found, details = [], {}
    for threshold in (0.0, 0.2):
        strategy = ours(threshold=threshold)
        details[f"tokens per call, threshold {threshold}"] = mean(tokens_per_call(strategy))
        assert strategy.report is not None  # set by the call above
        found.append(strategy.report.draft_calls / strategy.report.details["steps"])
        details[f"draft calls a step, threshold {threshold}"] = found[-1]
    return Measurement(found[1] / found[0], details=details)


CLAIMS = (
    speculation.identity_claim(lambda: ours(threshold=0.2)),
    Claim(
        name="over-chain",
        paper="At the same budget a tree has more tokens accepted than a chain.",
        measures=f"more tokens per call than with a chain of {CHAIN} nodes, greedy",
        threshold=Threshold(">", 0),
        check=over_chain,
        unit="tokens per call",
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="over-fixed-tree",
        paper="A tree that adapts at every step has more tokens accepted than one of fixed shape.",
        measures=f"more tokens per call than with branching {FIXED}, both of {NODES} nodes and {DEPTH} levels, greedy",
        threshold=Threshold(">", 0),
        check=over_fixed_tree,
        unit="tokens per call",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="more-nodes",
        paper="The expected acceptance length grows with the number of nodes.",
        measures=f"smallest growth of tokens per call from one budget to the next among {BUDGETS}, greedy",
        threshold=Threshold(">=", 0),
        check=by_budget,
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="threshold",
        paper="A threshold on the gain of a level trades acceptance for draft calls.",
        measures="draft calls a step with threshold 0.2 over those without, greedy",
        threshold=Threshold("<", 1),
        check=calls_saved,
        seconds=40,
        data=DATA,
    ),
)
