"""What the claim checks on text share: the embedded models, held-out prompts, bootstrap intervals."""

from __future__ import annotations

import ast
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_ext import demo
from hf_ext.demo.corpus import sources

#: How these data are called on the cards.
DATA = "Functions of held-out Python standard library modules"


@dataclass(frozen=True)
class Prompt:
    """The first half of a function, and the second.

    Args:
        name: file and function.
        text: the prompt.
        reference: how the file goes on.
    """

    name: str
    text: str
    reference: str


@functools.cache
def load(name: str = "target") -> tuple[PreTrainedModel, Any]:
    """Return the embedded model called `name` in evaluation mode, and its tokenizer with padding on the left."""
    folder = demo.path(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


@functools.cache
def prompts(count: int, longest: int = 96) -> tuple[Prompt, ...]:
    """Return the first halves of `count` functions that the embedded models never saw.

    Args:
        count: how many, spread evenly over all that qualify: six lines at least, a half of at most
            `longest` tokens, and a line of code after it.
        longest: tokens of a prompt at most.

    Raises:
        ValueError: fewer than `count` qualify.
    """
    tokenizer = load()[1]
    files = (source for source in sources(held_out=True) if "/" not in source.name)
    found = [
        prompt
        for source in files
        for prompt in halves(source.name, source.text)
        if len(tokenizer(prompt.text, verbose=False)["input_ids"]) <= longest
    ]
    if len(found) < count:
        raise ValueError(f"{len(found)} held-out functions qualify, {count} were asked for")
    return tuple(found[i * len(found) // count] for i in range(count))


def halves(name: str, source: str) -> Iterator[Prompt]:
    """Cut every function of a module in the middle.

    Example:
        >>> [prompt] = halves("m.py", "def f(x):\\n  a = 1\\n  b = 2\\n  c = 3\\n  d = 4\\n  return x\\n")
        >>> prompt.text, prompt.reference
        ('def f(x):\\n  a = 1\\n  b = 2', '\\n  c = 3\\n  d = 4\\n  return x\\n')
    """
    rows = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        start, end = node.lineno - 1, node.end_lineno
        middle = (start + end) // 2
        if end - start >= 6 and rows[middle].strip():
            # One token is a line break together with the indentation after it, so it belongs to what follows.
            text = "".join(rows[start:middle])
            prompt = text.rstrip()
            yield Prompt(f"{name}:{node.name}", prompt, text[len(prompt) :] + "".join(rows[middle:end]))


def batch(chosen: Sequence[Prompt]) -> dict[str, Any]:
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
