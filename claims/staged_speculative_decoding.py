"""Claim checks of staged speculative decoding (arXiv:2308.04623) with the embedded models."""

from __future__ import annotations

from typing import Any

import torch

from hf_ext.claims import draft_trees, held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.generation import StagedSpeculativeDecoding
from hf_ext.verify import Claim, Measurement, Threshold

NODES, CHAIN, PROMPTS, TOKENS = 16, 16, 8, 64


def ours(nodes: int = NODES, ngram_tokens: int = 4, depth: int = 8) -> StagedSpeculativeDecoding:
    """Return the method with the embedded draft model."""
    return StagedSpeculativeDecoding(
        draft_model=held_out.load("draft")[0], nodes=nodes, depth=depth, ngram_tokens=ngram_tokens, threshold=0.0
    )


def one_by_one(strategy: StagedSpeculativeDecoding, **settings: Any) -> tuple[list[float], list[float]]:
    """Return draft calls a token and tokens a target call, of every prompt alone."""
    model, _ = held_out.load()
    calls, tokens = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for prompt in held_out.prompts(PROMPTS):
            settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, **settings}
            strategy.generate(model, **held_out.batch([prompt]), **settings)
            assert strategy.report is not None  # set by the call above
            calls.append(strategy.report.draft_calls / TOKENS)
            tokens.append((TOKENS - 1) / strategy.report.details["steps"])
    return calls, tokens


def calls_saved(**settings: Any) -> Measurement:
    """Compare draft calls with and without the n-grams."""
    with_grams, tokens = one_by_one(ours(), **settings)
    without, tokens_without = one_by_one(ours(ngram_tokens=0), **settings)
    ratios = [a / b for a, b in zip(with_grams, without, strict=True)]
    return Measurement(
        mean(ratios),
        spread=bootstrap(ratios),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=(0,) if settings["do_sample"] else (),
        details={
            "draft calls per token with n-grams": mean(with_grams),
            "without": mean(without),
            "tokens per target call with n-grams": mean(tokens),
            "tokens per target call without": mean(tokens_without),
        },
    )


def over_chain() -> Measurement:
    """Compare with a chain of as many nodes."""
    return draft_trees.gain(ours(CHAIN, depth=CHAIN), draft_trees.chain(CHAIN), ("the tree", "a chain"))


CLAIMS = (
    speculation.identity_claim(ours, "Output quality is preserved perfectly."),
    Claim(
        name="second-stage",
        paper="Speculation makes the draft model cheaper as well.",
        measures="draft calls per token with n-grams over those without, single prompts, greedy",
        threshold=Threshold("<", 1),
        check=lambda: calls_saved(do_sample=False),
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="second-stage-sampling",
        paper="Speculation makes the draft model cheaper as well.",
        measures="draft calls per token with n-grams over those without, single prompts, sampling at temperature 0.7",
        threshold=Threshold("<", 1),
        check=lambda: calls_saved(do_sample=True, top_k=0, temperature=0.7),
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="tree-over-chain",
        paper="Speculative tokens organised as a tree have more of them accepted than a sequence.",
        measures=f"more tokens per call than with a chain of {CHAIN} nodes, greedy",
        threshold=Threshold(">", 0),
        check=over_chain,
        unit="tokens per call",
        seconds=40,
        data=DATA,
    ),
)
