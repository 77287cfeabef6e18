"""Claim checks of recursive speculative decoding (arXiv:2402.14160) with the embedded models."""

from __future__ import annotations

import itertools
import math

import torch

from hf_ext.claims import draft_trees, held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import laws
from hf_ext.generation import RecursiveSpeculativeDecoding, SpecTr
from hf_ext.generation.speculative.acceptance import with_replacement, without_replacement
from hf_ext.verify import Claim, Measurement, Threshold

BRANCHING, BEAM, DEPTH = (3, 2, 1, 1), 4, 4
#: Drafts at a place, sets of them drawn there, and tokens that laws are cut down to where all drafts are gone through.
DRAFTS, SETS, FEW = 3, 32, 6


def ours() -> RecursiveSpeculativeDecoding:
    """Return trees of fixed branching with the embedded draft model."""
    return RecursiveSpeculativeDecoding(draft_model=held_out.load("draft")[0], branching=BRANCHING)


def beam() -> RecursiveSpeculativeDecoding:
    """Return stochastic beam search with the embedded draft model."""
    return RecursiveSpeculativeDecoding(draft_model=held_out.load("draft")[0], beam_width=BEAM, beam_depth=DEPTH)


def law_error() -> Measurement:
    """Go through all drafts and coins, for the models' laws on the tokens that both find likeliest."""
    worst, places = 0.0, 0
    for p, q in zip(*laws(), strict=True):
        best = (p + q).topk(FEW).indices
        p, q = p[best] / p[best].sum(), q[best] / q[best].sum()
        emitted = torch.zeros_like(p)
        for drafts in itertools.permutations(range(FEW), DRAFTS):
            left = [1 - math.fsum(float(q[x]) for x in drafts[:i]) for i in range(DRAFTS)]
            weight = math.prod(float(q[x]) / mass for x, mass in zip(drafts, left, strict=True))
            rule = without_replacement(p, q, list(drafts))
            for token in drafts:
                chance = next(rule)
                emitted[token] += weight * chance
                weight *= 1 - chance
                if weight <= 0:
                    break
            else:
                try:
                    next(rule)
                except StopIteration as end:
                    emitted += weight * end.value
        worst, places = max(worst, float((emitted - p).abs().max())), places + 1
        if places == 64:
            break
    return Measurement(worst, details={"places": places, "tokens": FEW, "drafts": DRAFTS})


def replacement_gain() -> Measurement:
    """Compare distinct drafts with independent ones, each under its rule, at the same places.

    Both are taken from the same independent draws: the first ones, and the first different ones, which
    are draws without replacement.
    """
    gains, with_, without = [], [], []
    generator = torch.Generator().manual_seed(0)
    for p, q in itertools.islice(zip(*laws(), strict=True), 0, None, 2):
        draws = torch.multinomial(q.expand(SETS, -1), 64, replacement=True, generator=generator).tolist()
        distinct = [list(dict.fromkeys(row))[:DRAFTS] for row in draws]
        without.append(mean([draft_trees.acceptance_of(without_replacement, p, q, drafts) for drafts in distinct]))
        with_.append(mean([draft_trees.acceptance_of(with_replacement, p, q, row[:DRAFTS]) for row in draws]))
        gains.append(without[-1] - with_[-1])
    return Measurement(
        mean(gains),
        spread=bootstrap(gains),
        spread_of=f"95 % bootstrap interval over {len(gains)} places",
        seeds=(0,),
        details={"distinct drafts": mean(without), "independent drafts": mean(with_)},
    )


def fixed_length() -> Measurement:
    """Compare with a chain as deep as the tree."""
    names = (f"branching {BRANCHING}", f"a chain of {len(BRANCHING)}")
    return draft_trees.gain(ours(), draft_trees.chain(len(BRANCHING)), names, temperature=1.0)


def fixed_budget() -> Measurement:
    """Compare a stochastic beam with independent sequences of as many nodes."""
    independent = SpecTr(draft_model=held_out.load("draft")[0], sequences=BEAM, draft_tokens=DEPTH)
    return draft_trees.gain(beam(), independent, ("stochastic beam", "independent sequences"), temperature=1.0)


def budget_of_chain() -> Measurement:
    """Compare a stochastic beam with a chain of as many nodes."""
    names = (f"a beam of {BEAM} by {DEPTH}", f"a chain of {BEAM * DEPTH}")
    return draft_trees.gain(beam(), draft_trees.chain(BEAM * DEPTH), names, temperature=1.0)


CLAIMS = (
    speculation.identity_claim(ours),
    Claim(
        name="law",
        paper="Recursive rejection sampling recovers the target distribution exactly.",
        measures=f"largest error of a token's probability, all drafts and coins gone through, {DRAFTS} of {FEW} tokens",
        threshold=Threshold("<=", 1e-9),
        check=law_error,
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="without-replacement",
        paper="Drafts drawn without replacement are accepted more often than independent ones.",
        measures=f"acceptance probability of {DRAFTS} distinct drafts less that of independent ones",
        threshold=Threshold(">", 0),
        check=replacement_gain,
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="fixed-length",
        paper="At a fixed draft length it yields more tokens a call than speculative decoding.",
        measures=f"more tokens per call with branching {BRANCHING} than with a chain of that depth, sampling",
        threshold=Threshold(">", 0),
        check=fixed_length,
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="fixed-budget-chain",
        paper="At a fixed number of drafted tokens it mostly yields more than a single sequence.",
        measures=f"more tokens per call with a beam of {BEAM} by {DEPTH} than with as long a chain, sampling",
        threshold=Threshold(">", 0),
        check=budget_of_chain,
        unit="tokens per call",
        seconds=80,
        data=DATA,
    ),
    Claim(
        name="fixed-budget-spectr",
        paper="At a fixed number of drafted tokens it mostly yields more than SpecTr.",
        measures=f"more tokens per call with a beam of {BEAM} by {DEPTH} than with SpecTr, sampling",
        threshold=Threshold(">", 0),
        check=fixed_budget,
        unit="tokens per call",
        seconds=70,
        data=DATA,
    ),
)
