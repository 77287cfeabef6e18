"""What the claim checks of drafters without a model share: prompts one by one, so that rows cannot help each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.claims.speculation import tokens_per_step
from hf_ext.generation import Speculative
from hf_ext.verify import Measurement

PROMPTS, TOKENS, TEMPERATURE = 16, 64, 0.7
#: Text that does not loop: greedy text of a small model does, which flatters whoever copies it.
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": TEMPERATURE}
GREEDY: dict[str, Any] = {"do_sample": False}


def one_by_one(strategy: Speculative, settings: dict[str, Any], seeds: tuple[int, ...] = (0, 1)) -> list[float]:
    """Return for every prompt how many tokens a call of the target yields, the prompt's own call left out.

    Args:
        strategy: the strategy; what it keeps between calls it keeps from prompt to prompt.
        settings: of `generate`.
        seeds: of the sampling; the mean over them is taken. Greedy text needs one run.
    """
    runs = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds if settings["do_sample"] else seeds[:1]:
            torch.manual_seed(seed)
            runs.append([details["tokens_per_call"] for details in reports(strategy, settings)])
    return [mean(values) for values in zip(*runs, strict=True)]


def reports(strategy: Speculative, settings: dict[str, Any], count: int = PROMPTS) -> list[dict[str, Any]]:
    """Run all prompts one by one; return `report.details` and `tokens_per_call` of each."""
    model, _ = held_out.load()
    found = []
    for prompt in held_out.prompts(count):
        lengths: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        strategy.generate(model, **held_out.batch([prompt]), **lengths, **settings)
        assert strategy.report is not None  # set by the call above
        details = strategy.report.details
        found.append({**details, "tokens_per_call": tokens_per_step(details)[0]})
    return found


def gain(
    ours: Callable[[], Speculative],
    theirs: Callable[[], Speculative] | None,
    names: tuple[str, str],
    settings: dict[str, Any],
) -> Measurement:
    """Compare tokens per call prompt by prompt.

    Args:
        ours: makes the strategy.
        theirs: makes the one to compare with, None for plain decoding, where a call yields one token.
        names: what to call them.
        settings: of `generate`.
    """
    first = one_by_one(ours(), settings)
    second = [1.0] * PROMPTS if theirs is None else one_by_one(theirs(), settings)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return Measurement(
        mean(differences),
        spread=bootstrap(differences),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=(0, 1) if settings["do_sample"] else (),
        details={
            f"tokens per call with {names[0]}": mean(first),
            f"tokens per call with {names[1]}": mean(second),
            "tokens a prompt": TOKENS,
        },
    )


def gain_of(*arguments: Any) -> Callable[[], Measurement]:
    """Return `gain` of these arguments, to be measured when it is called."""
    return functools.partial(gain, *arguments)
