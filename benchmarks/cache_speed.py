"""What caches cost and save in time: prefill and decode beside a full cache."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.benchmarks.cache_methods import FULL, Method, methods, reason
from hf_ext.benchmarks.speculative_figures import spread

#: What a budget leaves of a text.
RATIO = 0.5


def model_of(layers: int = 8, hidden: int = 512, width: int = 64, room: int = 16384) -> LlamaForCausalLM:
    """Return a random model of 8 query heads and 2 key heads, by default of 26 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=width, max_position_embeddings=room,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def once(model: Any, method: Method, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill, and the median seconds of a decoded token after it."""
    model.set_attn_implementation(method.implementation)
    cache = method.cache(model, RATIO, ids.shape[1])
    start = time.perf_counter()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    prefill = time.perf_counter() - start
    spent = []
    for _ in range(tokens):
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        spent.append(time.perf_counter() - start)
    return prefill, statistics.median(spent)


def speed(
    model: Any,
    length: int,
    tokens: int,
    rounds: int,
    only: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time all methods in turns, in another order each round; the first round warms up.

    Args:
        model: see `model_of`.
        length: tokens of the prompt.
        tokens: decoded after it; their median counts.
        rounds: that count.
        only: names of methods, all by default.
        tell: called with a line from time to time.

    Returns:
        A row for each method: medians, and the median of the ratios to the full cache within a round with its 95 %
        bootstrap interval.
    """
    ids = torch.randint(2, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    chosen = [m for m in methods(short=False) if not only or m.name in only or m.name == FULL]
    times: dict[str, list[tuple[float, float]]] = {method.name: [] for method in chosen if not method.problem}
    problems = {method.name: method.problem for method in chosen if method.problem}
    order, rng = [method for method in chosen if not method.problem], random.Random(0)
    for turn in range(rounds + 1):
        rng.shuffle(order)
        for method in order:
            if method.name in problems:
                continue
            try:
                found = once(model, method, ids, tokens)
            except Exception as error:
                problems[method.name] = reason(error)
                continue
            if turn:
                times[method.name].append(found)
        tell(f"speed: round {turn} of {rounds}")
    base = times[FULL]
    rows = []
    for method in chosen:
        row: dict[str, Any] = {"method": method.name, "kind": method.kind}
        if method.name in problems:
            rows.append({**row, "problem": problems[method.name]})
            continue
        for at, name in enumerate(("prefill", "decode")):
            own = [found[at] for found in times[method.name]]
            ratios = [a / b[at] for a, b in zip(own, base, strict=True)]
            row |= {f"{name}_ms": 1e3 * statistics.median(own), f"{name}_ratio": statistics.median(ratios),
                    f"{name}_spread": list(spread(ratios))}  # fmt: skip
        rows.append(row)
    return rows
