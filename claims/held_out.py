"""What the claim checks on text share: the embedded models, held-out prompts, bootstrap intervals."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_ext import demo
from hf_ext.demo.prompts import Prompt
from hf_ext.demo.prompts import prompts as cut_prompts

#: How these data are called on the cards.
DATA = "Functions of held-out Python standard library modules"


@functools.cache
def load(name: str = "target") -> tuple[PreTrainedModel, Any]:
    """Return the embedded model called `name` in evaluation mode, and its tokenizer with padding on the left."""
    folder = demo.path(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


@functools.cache
def prompts(count: int) -> tuple[Prompt, ...]:
    """Return the beginnings of `count` functions that the embedded models never saw."""
    return tuple(cut_prompts(count, load()[1]))


def batch(chosen: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Return prompts as inputs of `generate`: left-padded `input_ids` and `attention_mask`."""
    encoded = load()[1]([prompt.text for prompt in chosen], return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def prompt_ids(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the rows of a left-padded batch without their padding."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def bootstrap(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `values`.

    Example:
        >>> bootstrap([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    rng = random.Random(seed)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    return sum(values) / len(values)


def per_seed(run: Callable[[], torch.Tensor], seeds: Sequence[int]) -> list[torch.Tensor]:
    """Call `run` once per seed and leave the caller's random state as it was."""
    out = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            out.append(run())
    return out
