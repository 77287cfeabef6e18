"""What the claim checks of methods with a trained head share: the embedded head, an untrained one, and its size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hf_ext import demo
from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, sampled_tokens_per_call, tokens_per_call
from hf_ext.generation.heads.base import DraftHead
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.verify import Claim, Measurement, Threshold

#: New tokens of a row where heads are compared.
TOKENS = 48


@functools.cache
def embedded(head_class: type[DraftHead], name: str) -> Any:
    """Return the head embedded under a name of `hf_ext.demo.HEADS`."""
    return head_class.from_pretrained(demo.path(name)).eval()


def untrained(head: DraftHead, seed: int = 0) -> Any:
    """Return a head of the same shape as it is before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(head)(head.config).eval()


def share_of_target(head: DraftHead) -> Measurement:
    """Count the head's parameters as a share of the target's."""
    own, target = (sum(p.numel() for p in model.parameters()) for model in (head, held_out.load()[0]))
    return Measurement(own / target, details={"parameters of the head": own, "parameters of the target": target})


def training_gain(build: Callable[[Any], Speculative], head: DraftHead, sampled: bool = False) -> Measurement:
    """Compare tokens per call of a trained head with those of an untrained one, prompt by prompt.

    Args:
        build: makes the strategy for a head.
        head: the trained one.
        sampled: sample at temperature 1 instead of decoding greedily.
    """
    count = sampled_tokens_per_call if sampled else tokens_per_call
    trained, other = (count(build(which), tokens=TOKENS) for which in (head, untrained(head)))
    gain = [a - b for a, b in zip(trained, other, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=(0, 1, 2) if sampled else (), details={"trained": mean(trained), "untrained": mean(other)},
    )  # fmt: skip


def head_claims(build: Callable[[Any], Speculative], load: Callable[[], DraftHead], share: float) -> tuple[Claim, ...]:
    """Return the claims that every method with a head makes about it.

    Args:
        build: makes the strategy for a head.
        load: returns the trained head.
        share: of the target's parameters that the head may have.
    """
    gain = "more tokens per call of the target than with an untrained head of the same shape, by the embedded head"
    return (
        Claim(
            name="trained-head",
            paper="The trained head predicts what the target will say, so that a call of the target yields more.",
            measures=f"{gain}, greedy",
            threshold=Threshold(">", 0),
            check=lambda: training_gain(build, load()),
            unit="tokens per call",
            seconds=40,
            data=DATA,
        ),
        Claim(
            name="trained-head-sampling",
            paper="The same holds when tokens are sampled.",
            measures=f"{gain}, sampling at temperature 1",
            threshold=Threshold(">", 0),
            check=lambda: training_gain(build, load(), sampled=True),
            unit="tokens per call",
            seconds=90,
            data=DATA,
        ),
        Claim(
            name="parameters",
            paper="The head is small beside the target.",
            measures="parameters of the embedded head, as a share of the target's",
            threshold=Threshold("<=", share),
            check=lambda: share_of_target(load()),
            seconds=2,
        ),
    )
