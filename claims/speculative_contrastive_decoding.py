"""Claim checks of speculative contrastive decoding (arXiv:2311.08981) with the embedded models."""

from __future__ import annotations

from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, sampled_tokens_per_call
from hf_ext.generation import SpeculativeContrastiveDecoding, SpeculativeDecoding
from hf_ext.generation.speculative_contrastive_decoding import contrastive_logits
from hf_ext.metrics import repetition_diversity
from hf_ext.verify import Claim, Measurement, Threshold

BETA, ALPHA, GAMMA, SEEDS = 0.5, 0.1, 4, (0, 1, 2)
ROWS, TOKENS = 8, 40


def ours() -> SpeculativeContrastiveDecoding:
    """Return the method with the embedded draft model as amateur."""
    return SpeculativeContrastiveDecoding(held_out.load("draft")[0], GAMMA, beta=BETA, alpha=ALPHA)


@torch.no_grad()
def contrastive_differences() -> Measurement:
    """Compare with contrastive decoding as it is defined: both models asked for every token."""
    expert, amateur = held_out.load()[0], held_out.load("draft")[0]
    inputs = held_out.batch(held_out.prompts(ROWS))
    strategy = ours()
    found = strategy.generate(expert, **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    different = 0
    for row, prompt in enumerate(held_out.prompt_ids(inputs)):
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            strong, weak = (model(ids, use_cache=False).logits[:, -1] for model in (expert, amateur))
            contrast = contrastive_logits(strong, weak, beta=BETA, alpha=ALPHA)
            contrast[:, expert.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
            ids = torch.cat([ids, contrast.argmax(-1, keepdim=True)], dim=1)
        different += int((found[row, -TOKENS:] != ids[0, -TOKENS:]).sum())
    assert strategy.report is not None  # set by the call above
    return Measurement(
        different, details={"tokens compared": ROWS * TOKENS, "target calls": strategy.report.target_calls}
    )


def acceleration() -> Measurement:
    """Compare tokens per call with those of speculative decoding with the same draft, under sampling."""
    contrastive = sampled_tokens_per_call(ours(), SEEDS)
    plain = sampled_tokens_per_call(SpeculativeDecoding(held_out.load("draft")[0], GAMMA), SEEDS)
    share = [a / b for a, b in zip(contrastive, plain, strict=True)]
    return Measurement(
        mean(share), spread=bootstrap(share), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts", seeds=SEEDS,
        details={"contrastive": mean(contrastive), "speculative decoding": mean(plain)},
    )  # fmt: skip


def diversity() -> Measurement:
    """Measure how varied greedy contrastive text is against greedy text of the expert."""
    expert, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(PROMPTS))
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 96, "min_new_tokens": 96}
    start = inputs["input_ids"].shape[1]
    texts = {
        "contrastive": ours().generate(expert, **inputs, **settings)[:, start:],
        "expert alone": expert.generate(**inputs, **settings)[:, start:],
    }
    each = {name: repetition_diversity(ids.tolist())["diversity_per_text"] for name, ids in texts.items()}
    gain = [a - b for a, b in zip(each["contrastive"], each["expert alone"], strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={name: mean(values) for name, values in each.items()},
    )  # fmt: skip


CLAIMS = (
    Claim(
        name="contrastive-identity",
        paper="The text is that of contrastive decoding.",
        measures="tokens that differ from greedy contrastive decoding with both models asked for every token",
        threshold=Threshold("==", 0),
        check=contrastive_differences,
        unit="tokens",
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="similar-acceleration",
        paper="It accelerates about as much as speculative decoding does (section 4).",
        measures="tokens per call of the expert when sampling, over those of speculative decoding with the same draft",
        threshold=Threshold(">=", 0.8),
        check=acceleration,
        seconds=70,
        data=DATA,
    ),
    Claim(
        name="diversity",
        paper="Contrasting improves the quality of text over that of the expert alone (section 4).",
        measures="diversity of greedy contrastive text minus that of greedy text (product of 1 - rep-n, n = 2, 3, 4)",
        threshold=Threshold(">", 0),
        check=diversity,
        seconds=20,
        data=DATA,
    ),
)
