"""Claim checks of contrastive search (arXiv:2210.14140) on the embedded target model."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.generation import ContrastiveSearch
from hf_ext.generation.isotropy import isotropy
from hf_ext.metrics import coherence, repetition_diversity
from hf_ext.verify import Claim, Measurement, Threshold

PROMPTS, TOKENS, SEEDS, TOP_P = 24, 96, (0, 1, 2), 0.95
#: The exact properties need fewer of both.
EXACT_PROMPTS, EXACT_TOKENS = 8, 48


def continue_prompts(
    strategy: ContrastiveSearch | None = None, count: int = PROMPTS, tokens: int = TOKENS, **options: Any
) -> torch.Tensor:
    """Return `(count, tokens)` new ids; all rows go on to the full length, since repetition grows with it."""
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(count))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **options}
    out = model.generate(**inputs, **options) if strategy is None else strategy.generate(model, **inputs, **options)
    return out[:, inputs["input_ids"].shape[1] :]


@functools.cache
def texts() -> dict[str, list[torch.Tensor]]:
    """Return the continuations that the checks compare, one tensor per seed."""
    nucleus = functools.partial(continue_prompts, do_sample=True, top_p=TOP_P, top_k=0)
    return {
        "greedy": [continue_prompts()],
        "contrastive": [continue_prompts(ContrastiveSearch())],
        "nucleus": held_out.per_seed(nucleus, SEEDS),
    }


def diversities(method: str) -> list[float]:
    """Return each prompt's diversity, the mean over seeds."""
    runs = [repetition_diversity(out.tolist())["diversity_per_text"] for out in texts()[method]]
    return [mean(values) for values in zip(*runs, strict=True)]


def coherences(method: str, judge: str) -> list[float]:
    """Return each prompt's coherence under the embedded model `judge`, the mean over seeds."""
    model, _ = held_out.load(judge)
    before = held_out.prompt_ids(held_out.batch(held_out.prompts(PROMPTS)))
    runs = [coherence(model, before, out.tolist())["per_text"] for out in texts()[method]]
    return [mean(values) for values in zip(*runs, strict=True)]


def greedy_limits() -> Measurement:
    """Compare token for token with greedy search, in one left-padded batch."""
    exact = functools.partial(continue_prompts, count=EXACT_PROMPTS, tokens=EXACT_TOKENS)
    greedy = exact()
    different = {
        "at penalty_alpha=0": int((exact(ContrastiveSearch(penalty_alpha=0.0)) != greedy).sum()),
        "at top_k=1": int((exact(ContrastiveSearch(top_k=1)) != greedy).sum()),
        "with the defaults": int((exact(ContrastiveSearch()) != greedy).sum()),
    }
    value = different["at penalty_alpha=0"] + different["at top_k=1"]
    return Measurement(value, details={"tokens compared each time": greedy.numel(), **different})


def one_look_ahead() -> Measurement:
    """Count the positions that the model evaluates beyond the prompts."""
    strategy = ContrastiveSearch(top_k=4)
    new = continue_prompts(strategy, EXACT_PROMPTS, EXACT_TOKENS)
    inputs = held_out.batch(held_out.prompts(EXACT_PROMPTS))
    assert strategy.report is not None  # set by the call above
    positions = strategy.report.target_positions - inputs["input_ids"].numel()
    return Measurement(
        positions / new.numel(), details={"model calls": strategy.report.target_calls, "new tokens a row": EXACT_TOKENS}
    )


def diversity_gain() -> Measurement:
    """Compare how varied continuations are, prompt by prompt."""
    gain = [ours - plain for ours, plain in zip(diversities("contrastive"), diversities("greedy"), strict=True)]
    details = {f"{method} diversity": mean(diversities(method)) for method in texts()}
    rep = {method: mean([repetition_diversity(o.tolist())["rep_4"] for o in outs]) for method, outs in texts().items()}
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=SEEDS,
        details={**details, **{f"{method} rep-4": value for method, value in rep.items()}, "tokens a prompt": TOKENS},
    )


def coherence_gain() -> Measurement:
    """Compare how likely continuations are under the draft model, which wrote none of them."""
    ours, theirs = coherences("contrastive", "draft"), coherences("nucleus", "draft")
    gain = [a - b for a, b in zip(ours, theirs, strict=True)]
    details = {
        f"{method} under the {judge}": mean(coherences(method, judge))
        for judge in ("draft", "target")
        for method in texts()
    }
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=SEEDS,
        details=details,
    )


def isotropy_of_target() -> Measurement:
    """Measure the isotropy of the embedded target on the prompts."""
    inputs = held_out.batch(held_out.prompts(PROMPTS))
    values = isotropy(held_out.load()[0], **inputs).tolist()
    draft = isotropy(held_out.load("draft")[0], **inputs).tolist()
    return Measurement(
        mean(values),
        spread=bootstrap(values),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"embedded draft": mean(draft)},
    )


CLAIMS = (
    Claim(
        name="greedy-limits",
        paper="Without penalty, or with one candidate, contrastive search is greedy search (equation 5).",
        measures="tokens that differ from greedy search, at penalty_alpha=0 and at top_k=1",
        threshold=Threshold("==", 0),
        check=greedy_limits,
        unit="tokens",
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="one-look-ahead",
        paper="A step costs one forward pass over the candidates; the text before is not run again.",
        measures="positions the model evaluates per new token, with top_k=4",
        threshold=Threshold("==", 4),
        check=one_look_ahead,
        unit="positions per token",
        seconds=8,
        data=DATA,
    ),
    Claim(
        name="diversity-over-greedy",
        paper="Greedy search degenerates into repetition, contrastive search does not (section 4).",
        measures="diversity of contrastive search minus that of greedy search (product of 1 - rep-n, n = 2, 3, 4)",
        threshold=Threshold(">=", 0.2),
        check=diversity_gain,
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="coherence-over-nucleus",
        paper="Its text is more coherent with the prompt than that of nucleus sampling (section 4).",
        measures=f"coherence of contrastive search minus that of nucleus sampling (top_p={TOP_P}), under another model",
        threshold=Threshold(">", 0),
        check=coherence_gain,
        unit="nats per token",
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="isotropy",
        paper="Language models whose token representations are isotropic suit contrastive search (section 3).",
        measures="isotropy of the embedded target model: 1 minus the mean cosine between its token representations",
        threshold=None,
        check=isotropy_of_target,
        seconds=3,
        data=DATA,
    ),
)
