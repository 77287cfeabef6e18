"""Claim checks of Kangaroo (arXiv:2404.18911) with the embedded head."""

from __future__ import annotations

from typing import Any

from hf_ext.claims import draft_heads, held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, tokens_per_call
from hf_ext.generation.heads.kangaroo import KangarooHead
from hf_ext.generation.kangaroo import Kangaroo
from hf_ext.generation.layerskip import LayerSkip
from hf_ext.verify import Claim, Measurement, Threshold

#: The threshold of the checks: the embedded target is less sure of anything than the models of the paper.
CONFIDENCE, LENGTH = 0.2, 6
ROWS, TOKENS = 8, 48


def head() -> Any:
    """Return the embedded head."""
    return draft_heads.embedded(KangarooHead, "kangaroo")


def ours(which: Any = None, confidence: float = CONFIDENCE) -> Kangaroo:
    """Return the method."""
    return Kangaroo(which or head(), draft_tokens=LENGTH, confidence=confidence)


def one_by_one(confidence: float) -> list[tuple[float, float]]:
    """Decode prompts alone; return for each the draft passes and the calls of the target per token."""
    model, _ = held_out.load()
    found = []
    for prompt in held_out.prompts(ROWS):
        strategy = ours(confidence=confidence)
        strategy.generate(
            model, **held_out.batch([prompt]), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
        report = strategy.report
        assert report is not None  # set by the call above
        found.append((report.draft_calls / TOKENS, report.target_calls / TOKENS))
    return found


def early_stop() -> Measurement:
    """Compare draft passes with the threshold and without; and target calls, which must hardly grow."""
    stopping, blind = one_by_one(CONFIDENCE), one_by_one(0.0)
    share = [a[0] / b[0] for a, b in zip(stopping, blind, strict=True)]
    calls = [mean([run[1] for run in runs]) for runs in (stopping, blind)]
    passes = [mean([run[0] for run in runs]) for runs in (stopping, blind)]
    by_threshold = {
        f"threshold {confidence}": "{:.2f} draft passes and {:.3f} target calls a token".format(
            *(mean(list(values)) for values in zip(*one_by_one(confidence), strict=True))
        )
        for confidence in (0.4, 0.6)
    }
    return Measurement(
        mean(share), spread=bootstrap(share), spread_of=f"95 % bootstrap interval over {ROWS} prompts",
        details={
            "draft passes a token": f"{passes[0]:.2f} with the threshold {CONFIDENCE}, {passes[1]:.2f} without",
            "target calls a token": f"{calls[0]:.3f} with it, {calls[1]:.3f} without", **by_threshold,
        },
    )  # fmt: skip


def kept_acceptance() -> Measurement:
    """Compare tokens per call with the threshold and without."""
    stopping, blind = (tokens_per_call(ours(confidence=c), tokens=TOKENS) for c in (CONFIDENCE, 0.0))
    share = [a / b for a, b in zip(stopping, blind, strict=True)]
    return Measurement(
        mean(share), spread=bootstrap(share), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"with the threshold": mean(stopping), "without": mean(blind)},
    )  # fmt: skip


def adapter_gain() -> Measurement:
    """Compare with the bare exit: the same layers, but the target's LM head reads their state as it is."""
    bare = LayerSkip(exit_layer=head().config.exit_layer, draft_tokens=LENGTH)
    with_adapter, without = (tokens_per_call(s, tokens=TOKENS) for s in (ours(confidence=0.0), bare))
    gain = [a - b for a, b in zip(with_adapter, without, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"with the adapter": mean(with_adapter), "bare exit": mean(without)},
    )  # fmt: skip


CLAIMS = (
    speculation.identity_claim(ours, "Kangaroo is lossless."),
    Claim(
        name="early-stop",
        paper="Stopping where the draft is unsure avoids draft steps at difficult tokens.",
        measures=f"draft passes a token with the threshold {CONFIDENCE}, as a share of those without one, batch of one",
        threshold=Threshold("<", 0.9),
        check=early_stop,
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="early-stop-acceptance",
        paper="And hardly fewer tokens are accepted.",
        measures=f"tokens per call of the target with the threshold {CONFIDENCE}, as a share of those without one",
        threshold=Threshold(">=", 0.85),
        check=kept_acceptance,
        seconds=20,
        data=DATA,
    ),
    Claim(
        name="adapter",
        paper="The adapter bridges the gap between the shallow layers and the whole model.",
        measures="more tokens per call of the target than with the bare exit of the same layers, greedy",
        threshold=Threshold(">", 0),
        check=adapter_gain,
        unit="tokens per call",
        seconds=25,
        data=DATA,
    ),
    *draft_heads.head_claims(ours, head, share=0.1),
)
