"""What the claim checks of speculative methods share: greedy identity, and how much a call of the target yields."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.verify import Claim, Measurement, Threshold

#: Prompts and new tokens of the runs.
PROMPTS, TOKENS = 16, 64


@functools.cache
def greedy_ids(count: int = PROMPTS, tokens: int = TOKENS) -> torch.Tensor:
    """Return what transformers' greedy search says after the prompts, `(count, prompt and tokens)`."""
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(count))
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def greedy_differences(strategy: Speculative, count: int = PROMPTS, tokens: int = TOKENS) -> Measurement:
    """Count the tokens in which a strategy differs from `generate(do_sample=False)`, in one left-padded batch."""
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(count))
    ours = strategy.generate(model, **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    expected = greedy_ids(count, tokens)
    assert strategy.report is not None  # set by the call above
    return Measurement(
        int((ours != expected).sum()),
        details={
            "tokens compared": count * tokens,
            "mean accepted tokens": strategy.report.details["mean_accepted"],
            "target calls": strategy.report.target_calls,
        },
    )


def identity_claim(build: Any, paper: str = "The text is exactly that of the target alone.") -> Claim:
    """Return the claim that every speculative method makes.

    Args:
        build: makes the strategy, without arguments.
        paper: the sentence of the paper.
    """
    return Claim(
        name="greedy-identity",
        paper=paper,
        measures="tokens that differ from transformers' greedy search, in a left-padded batch of held-out prompts",
        threshold=Threshold("==", 0),
        check=lambda: greedy_differences(build()),
        unit="tokens",
        seconds=30,
        data=DATA,
    )


def tokens_per_call(strategy: Speculative, count: int = PROMPTS, tokens: int = TOKENS, **settings: Any) -> list[float]:
    """Return for every prompt how many tokens a call of the target yields, the prompt's own call left out.

    Args:
        strategy: the strategy.
        count: prompts, all in one batch.
        tokens: new tokens a row.
        **settings: of `generate`; greedy by default.
    """
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(count))
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, **settings}
    strategy.generate(model, **inputs, **settings)
    assert strategy.report is not None  # set by the call above
    return tokens_per_step(strategy.report.details)


def tokens_per_step(details: dict[str, Any]) -> list[float]:
    """Return for every row of a report the tokens that a verified draft gave, its own bonus token included."""
    # Without a draft under the prompt, the prompt's call gives one token to a draft of nothing.
    undrafted = 0 if details["drafted_ahead"] else 1
    return [(row["tokens"] - undrafted) / row["steps"] for row in details["rows"]]


def sampled_tokens_per_call(
    strategy: Speculative,
    seeds: tuple[int, ...] = (0, 1, 2),
    count: int = PROMPTS,
    tokens: int = TOKENS,
    **settings: Any,
) -> list[float]:
    """Return `tokens_per_call` under sampling, the mean over seeds for every prompt."""
    runs = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            runs.append(tokens_per_call(strategy, count, tokens, do_sample=True, top_k=0, **settings))
    return [held_out.mean(values) for values in zip(*runs, strict=True)]


@functools.cache
@torch.no_grad()
def laws(positions: int = 256, temperature: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return next-token laws of the embedded target and draft at the same places of sampled text.

    Args:
        positions: how many places, spread evenly over the continuations of the prompts.
        temperature: of both.
        seed: of the text.

    Returns:
        `(positions, vocabulary)` float64 each.
    """
    target, _ = held_out.load()
    draft, _ = held_out.load("draft")
    inputs = held_out.batch(held_out.prompts(PROMPTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = target.generate(
            **inputs, do_sample=True, top_k=0, temperature=temperature, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
    mask = torch.cat([inputs["attention_mask"], torch.ones(PROMPTS, TOKENS, dtype=torch.long)], dim=1)
    start = inputs["input_ids"].shape[1] - 1
    found = []
    for model in (target, draft):
        logits = model(ids, attention_mask=mask).logits[:, start:-1].double() / temperature
        flat = logits.flatten(0, 1)
        places = torch.linspace(0, len(flat) - 1, positions).long()
        found.append(flat[places].softmax(-1))
    return found[0], found[1]
