"""Claim checks of prompt lookup with the embedded target model."""

from __future__ import annotations

from hf_ext.claims import held_out, speculation
from hf_ext.claims.drafts_from_text import GREEDY, PROMPTS, SAMPLED, TEMPERATURE, TOKENS, gain_of, reports
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.generation import PromptLookup
from hf_ext.testing import tiny_models
from hf_ext.verify import Claim, Measurement, Threshold

DRAFTED, NGRAM = 10, 3


def ours() -> PromptLookup:
    """Return the method."""
    return PromptLookup(draft_tokens=DRAFTED, max_ngram=NGRAM)


def over_transformers() -> Measurement:
    """Compare with the prompt lookup of transformers, which takes the first occurrence and stops at the text's end."""
    model, _ = held_out.load()
    theirs = []
    for prompt in held_out.prompts(PROMPTS):
        inputs = held_out.batch([prompt])

        def run(inputs: dict = inputs) -> None:
            model.generate(
                **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                prompt_lookup_num_tokens=DRAFTED, max_matching_ngram_size=NGRAM,
            )  # fmt: skip

        _, calls = tiny_models.calls_of(model, run)
        theirs.append(TOKENS / len(calls))
    found = [TOKENS / details["rows"][0]["target_calls"] for details in reports(ours(), GREEDY)]
    differences = [a - b for a, b in zip(found, theirs, strict=True)]
    return Measurement(
        mean(differences),
        spread=bootstrap(differences),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"tokens per call, ours": mean(found), "of transformers": mean(theirs), "tokens a prompt": TOKENS},
    )


CLAIMS = (
    speculation.identity_claim(ours, "Copying changes no token."),
    Claim(
        name="fewer-calls",
        paper="Where a text repeats tokens of its prompt or its own, a call of the model yields several.",
        measures=f"tokens per call above 1, sampling at temperature {TEMPERATURE}, single prompts",
        threshold=Threshold(">", 0),
        check=gain_of(ours, None, ("prompt lookup", "plain decoding"), SAMPLED),
        unit="tokens per call",
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="over-transformers",
        paper="(not in the paper) The latest occurrence predicts better than the first, and loops can be read on.",
        measures="tokens per call above those of transformers' prompt lookup with the same settings, greedy",
        threshold=Threshold(">=", 0),
        check=over_transformers,
        unit="tokens per call",
        seconds=30,
        data=DATA,
    ),
)
