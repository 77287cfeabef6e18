"""Claim checks of Jacobi decoding (arXiv:2305.10427) with the embedded target model."""

from __future__ import annotations

from hf_ext.claims import speculation
from hf_ext.claims.drafts_from_text import GREEDY, PROMPTS, TOKENS, gain_of, reports
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.generation import JacobiDecoding
from hf_ext.verify import Claim, Measurement, Threshold


def most_iterations() -> Measurement:
    """Find the prompt that needs the most iterations for its tokens."""
    shares = []
    for block in (4, 8, 16):
        shares += [(1 + run["steps"]) / TOKENS for run in reports(JacobiDecoding(block_tokens=block), GREEDY)]
    return Measurement(max(shares), details={"runs": len(shares), "fewest": min(shares), "tokens a prompt": TOKENS})


def guessed_early() -> Measurement:
    """Count the tokens that were guessed right before the iteration that made them part of the text."""
    shares = []
    for run in reports(JacobiDecoding(), GREEDY):
        pairs = zip(run["guessed_in"][0], run["fixed_in"][0], strict=True)
        shares.append(mean([float(guessed < fixed) for guessed, fixed in pairs]))
    return Measurement(
        mean(shares), spread=bootstrap(shares), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts"
    )


CLAIMS = (
    speculation.identity_claim(JacobiDecoding, "The fixed point is the text of greedy decoding."),
    Claim(
        name="iterations",
        paper="It takes at most as many iterations as greedy decoding takes tokens (proposition 1).",
        measures="calls of the model over tokens, the largest of all prompts and blocks of 4, 8 and 16",
        threshold=Threshold("<=", 1),
        check=most_iterations,
        unit="calls per token",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="fewer-calls",
        paper="Several tokens of a block become right at once.",
        measures="tokens per call above 1, greedy, blocks of 8, single prompts",
        threshold=Threshold(">", 0),
        check=gain_of(JacobiDecoding, None, ("Jacobi iteration", "greedy search"), GREEDY),
        unit="tokens per call",
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="guessed-early",
        paper="The dependency graph shows which tokens do not wait for those before them.",
        measures="share of tokens that were guessed right before the iteration that fixed them",
        threshold=None,
        check=guessed_early,
        seconds=15,
        data=DATA,
    ),
)
