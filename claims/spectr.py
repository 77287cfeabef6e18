"""Claim checks of SpecTr (arXiv:2310.15141) with the embedded models."""

from __future__ import annotations

import math
from typing import Any

import torch

from hf_ext.claims import draft_trees, held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import laws
from hf_ext.generation import SpecTr
from hf_ext.generation.speculative.acceptance import acceptance_rate, solve_rho
from hf_ext.generation.speculative.rho import any_of
from hf_ext.verify import Claim, Measurement, Threshold

SEQUENCES, TOKENS = 4, 4


def ours(sequences: int = SEQUENCES) -> SpecTr:
    """Return the method with the embedded draft model."""
    return SpecTr(draft_model=held_out.load("draft")[0], sequences=sequences, draft_tokens=TOKENS)


def k_seq_acceptance(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    """Return the probability that K-SEQ accepts one of k drafts, in closed form."""
    return any_of(float(torch.minimum(q, p / solve_rho(p, q, k)).sum()), k)


def k_seq_gain() -> Measurement:
    """Compare K-SEQ with one draft at the same places."""
    pairs = [(k_seq_acceptance(p, q, SEQUENCES), acceptance_rate(p, q)) for p, q in zip(*laws(), strict=True)]
    gains = [several - one for several, one in pairs]
    return Measurement(
        mean(gains),
        spread=bootstrap(gains),
        spread_of=f"95 % bootstrap interval over {len(pairs)} places",
        details={"one draft": mean([one for _, one in pairs]), f"{SEQUENCES} drafts": mean([k for k, _ in pairs])},
    )


def share_of_optimum() -> Measurement:
    """Compare K-SEQ with a bound on what any rule could accept: a token that is said must have been drafted."""
    shares = []
    for p, q in zip(*laws(), strict=True):
        bound = float(torch.minimum(p, 1 - (1 - q) ** SEQUENCES).sum())
        shares.append(k_seq_acceptance(p, q, SEQUENCES) / bound)
    return Measurement(min(shares), details={"mean share": mean(shares), "places": len(shares)})


def tokens_gain() -> Measurement:
    """Compare tokens per call with those of one sequence of the same length."""
    names = (f"{SEQUENCES} sequences", "one sequence")
    return draft_trees.gain(ours(), draft_trees.chain(TOKENS), names, temperature=1.0)


def one_sequence() -> Measurement:
    """Compare with speculative decoding under the same random numbers."""
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(8))
    # A prompt that may be read in pieces is read before the first draft, by both.
    length = {"max_new_tokens": 48, "min_new_tokens": 48}
    settings: dict[str, Any] = {"do_sample": True, **length, "prefill_chunk_size": 4096}
    texts = []
    with torch.random.fork_rng(devices=[]):
        for strategy in (ours(1), draft_trees.chain(TOKENS)):
            torch.manual_seed(0)
            texts.append(strategy.generate(model, **inputs, **settings))
    return Measurement(int((texts[0] != texts[1]).sum()), seeds=(0,), details={"tokens compared": 8 * 48})


CLAIMS = (
    speculation.identity_claim(ours),
    Claim(
        name="several-drafts",
        paper="With k drafts K-SEQ accepts more often than speculative decoding with one.",
        measures=f"acceptance probability with {SEQUENCES} drafts less that with one, in closed form",
        threshold=Threshold(">", 0),
        check=k_seq_gain,
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="share-of-optimum",
        paper="K-SEQ accepts at least 1 - 1/e times as often as the optimal transport plan.",
        measures="smallest acceptance probability over a bound on that of any rule, by the models' laws",
        threshold=Threshold(">=", 1 - 1 / math.e),
        check=share_of_optimum,
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="tokens-per-call",
        paper="Several draft sequences yield more tokens a call of the target than one of the same length.",
        measures=f"more tokens per call with {SEQUENCES} sequences of {TOKENS} tokens than with one, sampling",
        threshold=Threshold(">", 0),
        check=tokens_gain,
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="one-sequence",
        paper="With k = 1 the method is speculative decoding.",
        measures="tokens that differ from speculative decoding under the same random numbers, one sequence",
        threshold=Threshold("==", 0),
        check=one_sequence,
        unit="tokens",
        seconds=20,
        data=DATA,
    ),
)
