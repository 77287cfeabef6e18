"""Claim checks of token recycling (arXiv:2408.08696) with the embedded target model."""

from __future__ import annotations

from hf_ext.claims import speculation
from hf_ext.claims.drafts_from_text import GREEDY, SAMPLED, TEMPERATURE, gain_of, reports
from hf_ext.claims.held_out import DATA
from hf_ext.generation import PromptLookup, TokenRecycling
from hf_ext.generation.token_recycling import Successors
from hf_ext.verify import Claim, Measurement, Threshold

#: Vocabulary of the paper's models.
VOCABULARY = 32_000


def memory() -> Measurement:
    """Measure the matrix, as it is and for the paper's vocabulary."""
    embedded = reports(TokenRecycling(), GREEDY, count=1)[0]
    details = {"MB for the embedded vocabulary": embedded["matrix_bytes"] / 1e6, "vocabulary": VOCABULARY}
    return Measurement(Successors(VOCABULARY, TokenRecycling().branches).bytes / 1e6, details=details)


CLAIMS = (
    speculation.identity_claim(TokenRecycling, "Recycling is lossless."),
    Claim(
        name="memory",
        paper="It needs less than 2 MB of extra storage, and no draft model.",
        measures=f"size of the matrix for a vocabulary of {VOCABULARY:,}",
        threshold=Threshold("<", 2),
        check=memory,
        unit="MB",
        seconds=5,
        data=DATA,
    ),
    Claim(
        name="over-lookup",
        paper="It is ahead of other methods that need no training (section 4).",
        measures=f"tokens per call above those of prompt lookup, sampling at temperature {TEMPERATURE}, single prompts",
        threshold=Threshold(">", 0),
        check=gain_of(TokenRecycling, PromptLookup, ("recycling", "prompt lookup"), SAMPLED),
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="wider-trees",
        paper="A tree of more nodes has more of them accepted.",
        measures=f"tokens per call with 80 nodes above those with 16, sampling at temperature {TEMPERATURE}",
        threshold=Threshold(">", 0),
        check=gain_of(TokenRecycling, lambda: TokenRecycling(nodes=16), ("80 nodes", "16 nodes"), SAMPLED),
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="warm-start",
        paper="The matrix is kept from prompt to prompt.",
        measures="tokens per call with the matrix of the prompts before above those with an empty one, greedy: the "
        "same text",
        threshold=Threshold(">", 0),
        check=gain_of(lambda: TokenRecycling(keep=True), TokenRecycling, ("matrix kept", "begun anew"), GREEDY),
        unit="tokens per call",
        seconds=40,
        data=DATA,
    ),
)
