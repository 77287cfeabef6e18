"""Reading texts with a cache and answering questions about them: what all caches of the benchmark are run by."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hf_ext.benchmarks.cache_methods import bytes_of
from hf_ext.benchmarks.cache_tasks import PAD, Batch, batch


@dataclass(frozen=True)
class Answers:
    """What was answered.

    Args:
        tokens: `(rows, a)`.
        bytes: that the cache held after the question and the first token of the answer.
    """

    tokens: Tensor
    bytes: int


@torch.no_grad()
def read(model: Any, cache: Cache, texts: Batch, aware: bool, mask: Tensor | None = None) -> Answers:
    """Read texts, then answer the questions, each the most likely token.

    The question and the answer are read token by token, so that a cache which compresses prompts keeps them whole.

    Args:
        model: any causal language model.
        cache: an empty one.
        texts: what to read and what to answer.
        aware: whether the question is part of the prompt that is compressed, or comes later.
        mask: `(rows, tokens)` of the texts, for padding on the left.
    """
    rows = len(texts.context)
    mask = torch.ones_like(texts.context) if mask is None else mask
    padded = not bool(mask.all())
    prompt, later = texts.context, texts.question
    if aware:
        prompt, later = torch.cat([prompt, later], dim=1), later[:, :0]
    seen = torch.cat([mask, mask.new_ones(rows, texts.question.shape[1] + texts.answer.shape[1])], dim=1)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    start = 0

    def step(ids: Tensor) -> Tensor:
        nonlocal start
        end = start + ids.shape[1]
        found = model(
            ids, past_key_values=cache, position_ids=places[:, start:end],
            attention_mask=seen[:, :end] if padded else None, logits_to_keep=1,
        )  # fmt: skip
        start = end
        return found.logits[:, -1].argmax(-1, keepdim=True)

    token = step(prompt)
    for at in range(later.shape[1]):
        token = step(later[:, at : at + 1])
    answer, held = [token], 0
    for number in range(texts.answer.shape[1]):
        token = step(token)
        held = held or bytes_of(cache)
        if number + 1 < texts.answer.shape[1]:
            answer.append(token)
    return Answers(torch.cat(answer, dim=1), held)


def accuracy(tokens: Tensor, wanted: Tensor, aware: bool = False) -> float:
    """Return the share of the answers' tokens that are right.

    Args:
        tokens: `(rows, a)`, what was answered.
        wanted: `(rows, a)`.
        aware: whether the question was read before anything was compressed: the first token of the answer is known by
            then, whatever is dropped, and does not count.

    Example:
        >>> accuracy(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]))
        0.75
        >>> accuracy(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]), aware=True)
        0.5
    """
    first = 1 if aware else 0
    return float((tokens == wanted)[:, first:].float().mean())


def ways(texts: Batch) -> tuple[bool, ...]:
    """Return whether the texts can be asked about later, and with the question; the latter needs longer answers."""
    return (False, True) if texts.answer.shape[1] > 1 else (False,)


def full_bytes(model: Any, rows: int, tokens: int) -> int:
    """Return the bytes of the keys and values of a full cache in float32."""
    config = model.config
    return rows * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4


def padded_groups(task: str, seed: int, groups: int, lengths: tuple[int, ...]) -> list[tuple[Batch, Tensor]]:
    """Return groups of texts of different lengths, padded on the left, with their masks.

    Args:
        task: of the texts.
        seed: of the texts.
        groups: how many.
        lengths: of the texts of a group.
    """
    found = []
    for group in range(groups):
        order = random.Random(group).sample(lengths, len(lengths))
        parts = [batch(task, 1000 * seed + 10 * group + i, 1, length) for i, length in enumerate(order)]
        width = max(order)
        context = torch.full((len(order), width), PAD)
        mask = torch.zeros_like(context)
        for row, part in enumerate(parts):
            context[row, width - order[row] :] = part.context[0]
            mask[row, width - order[row] :] = 1
        found.append(
            (Batch(context, *(torch.cat([getattr(p, n) for p in parts]) for n in ("question", "answer"))), mask)
        )
    return found
