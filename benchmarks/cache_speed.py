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
#: The seconds of a prefill and of a decoded token, of a method and of the full cache beside it.
Pair = tuple[tuple[float, float], tuple[float, float]]


def model_of(layers: int = 8, hidden: int = 512, width: int = 64, room: int = 16384) -> LlamaForCausalLM:
    """Return a random model of 8 query heads and 2 key heads, by default of 26 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=width, max_position_embeddings=room,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def read(model: Any, method: Method, ids: torch.Tensor) -> tuple[Any, torch.Tensor, float]:
    """Return the cache after a prefill, the next token, and the seconds."""
    model.set_attn_implementation(method.implementation)
    cache = method.cache(model, RATIO, ids.shape[1])
    start = time.perf_counter()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return cache, token, time.perf_counter() - start


@torch.no_grad()
def beside(model: Any, method: Method, full: Method, ids: torch.Tensor, tokens: int) -> Pair:
    """Time a method and the full cache in turns, token by token: what slows the machine down slows both.

    Returns:
        The seconds of a prefill and the median seconds of a decoded token, of the method and of the full cache.
    """
    pair = (method, full)
    states = [read(model, one, ids) for one in pair]
    last = [token for _, token, _ in states]
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(tokens):
        for at, one in enumerate(pair):
            model.set_attn_implementation(one.implementation)
            start = time.perf_counter()
            last[at] = model(last[at], past_key_values=states[at][0]).logits[:, -1:].argmax(-1)
            spent[at].append(time.perf_counter() - start)
    own, base = [(state[2], statistics.median(times)) for state, times in zip(states, spent, strict=True)]
    return own, base


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
        A row for each method: medians, and the median over rounds of the ratio to the full cache beside it with its
        95 % bootstrap interval.
    """
    ids = torch.randint(2, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    chosen = [m for m in methods(short=False) if not only or m.name in only or m.name == FULL]
    [full] = [method for method in chosen if method.name == FULL]
    times: dict[str, list[Pair]] = {method.name: [] for method in chosen if not method.problem}
    problems = {method.name: method.problem for method in chosen if method.problem}
    order, rng = [method for method in chosen if not method.problem], random.Random(0)
    for turn in range(rounds + 1):
        rng.shuffle(order)
        for method in order:
            if method.name in problems:
                continue
            try:
                found = beside(model, method, full, ids, tokens)
            except Exception as error:
                problems[method.name] = reason(error)
                continue
            if turn:
                times[method.name].append(found)
        tell(f"speed: round {turn} of {rounds}")
    rows = []
    for method in chosen:
        row: dict[str, Any] = {"method": method.name, "kind": method.kind}
        if method.name in problems:
            rows.append({**row, "problem": problems[method.name]})
            continue
        for at, name in enumerate(("prefill", "decode")):
            ratios = [own[at] / base[at] for own, base in times[method.name]]
            row |= {f"{name}_ms": 1e3 * statistics.median(own[at] for own, _ in times[method.name]),
                    f"{name}_ratio": statistics.median(ratios), f"{name}_spread": list(spread(ratios))}  # fmt: skip
        rows.append(row)
    return rows
