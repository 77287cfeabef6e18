"""Claim checks of adaptive draft-verification (arXiv:2407.12021) with the embedded target model."""

from __future__ import annotations

from hf_ext.claims import speculation
from hf_ext.claims.drafts_from_text import GREEDY, SAMPLED, TEMPERATURE, gain_of
from hf_ext.claims.held_out import DATA
from hf_ext.generation import ADED, PromptLookup
from hf_ext.verify import Claim, Threshold

CLAIMS = (
    speculation.identity_claim(ADED, "The distribution of the text is the model's."),
    Claim(
        name="adapts",
        paper="The statistics adapt while the model decodes: as they fill, drafts get better.",
        measures="tokens per call when the statistics are kept from prompt to prompt above those when each begins "
        "anew, greedy: the same text",
        threshold=Threshold(">", 0),
        check=gain_of(lambda: ADED(keep=True), ADED, ("statistics kept", "statistics begun anew"), GREEDY),
        unit="tokens per call",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="over-lookup",
        paper="Drafts that adapt are ahead of drafts that are looked up.",
        measures=f"tokens per call above those of prompt lookup, sampling at temperature {TEMPERATURE}, single prompts",
        threshold=Threshold(">", 0),
        check=gain_of(ADED, PromptLookup, ("ADED", "prompt lookup"), SAMPLED),
        unit="tokens per call",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="exploration",
        paper="Balancing exploration and exploitation makes better drafts than exploitation alone.",
        measures="tokens per call with exploration=1 above those with 0, greedy: the same text",
        threshold=Threshold(">", 0),
        check=gain_of(ADED, lambda: ADED(exploration=0.0), ("exploration", "none"), GREEDY),
        unit="tokens per call",
        seconds=40,
        data=DATA,
    ),
)
