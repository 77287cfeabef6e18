"""What tests of structured prompts share: prompts with sets, and decoding without a cache to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hf_ext.attention import masks_for
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting
from hf_ext.testing import tiny_models

#: Rows of segments: a row with two sets, one with a set in another place, one without.
ROWS = (
    ([2, (3, 1, 4), 2, (2, 3), 3]),
    ([1, (2, 2), 5]),
    ([6]),
)


def prompts(rows: tuple[Any, ...] = ROWS, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return left-padded prompts of random tokens as `SetPrompt` would make them.

    Args:
        rows: for every row the lengths of its parts: an int for text, a tuple of ints for a set.
        seed: of the tokens.

    Example:
        >>> prompts(([1, (2, 1), 1],))["segment_ids"]
        tensor([[0, 1, 1, 2, 0]])
    """
    draw = torch.Generator().manual_seed(seed)
    made = []
    for parts in rows:
        segments, groups, segment, group = [], [], 0, 0
        for part in parts:
            group += not isinstance(part, int)
            for length in [part] if isinstance(part, int) else part:
                segment += not isinstance(part, int)
                segments += [0 if isinstance(part, int) else segment] * length
                groups += [0 if isinstance(part, int) else group] * length
        ids = torch.randint(3, tiny_models.VOCABULARY, (len(segments),), generator=draw).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "segment_ids": segments, "group_ids": groups})
    longest = max(len(row["input_ids"]) for row in made)
    return {
        name: torch.tensor([[0] * (longest - len(row[name])) + row[name] for row in made])
        for name in ("input_ids", "attention_mask", "segment_ids", "group_ids")
    }


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return one row of prompts without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {name: value[row : row + 1, real] for name, value in inputs.items()}


def orders(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a single prompt with one set in all orders of the set's segments."""
    segments = inputs["segment_ids"][0].tolist()
    numbers = sorted({number for number in segments if number})
    place = {number: [c for c, owner in enumerate(segments) if owner == number] for number in numbers}
    first, last = segments.index(numbers[0]), len(segments) - segments[::-1].index(numbers[-1])
    for order in itertools.permutations(numbers):
        columns = [column for number in order for column in place[number]]
        columns = [*range(first), *columns, *range(last, len(segments))]
        yield {name: value[:, columns] for name, value in inputs.items()}


@torch.no_grad()
def uncached(
    model: Any, strategy: StructuredPrompting, inputs: dict[str, torch.Tensor], new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode greedily with the whole text through the model at every step, under the structure's dense mask.

    Returns:
        `(batch, new_tokens)` tokens and `(batch, new_tokens, vocabulary)` logits.
    """
    groups = inputs.get("group_ids")
    segments = inputs.get("segment_ids", torch.zeros_like(inputs["input_ids"]))
    prompt = Prompt(inputs["input_ids"], inputs["attention_mask"].bool(), segments, groups)
    prompt = strategy.reads(prompt)
    structure, ids, logits = strategy.structure(prompt), prompt.ids, []
    for step in range(new_tokens):
        whole = structure.extended(step)
        out = model(
            ids, attention_mask=masks_for(model, whole), position_ids=whole.queries.position.long(), use_cache=False
        )
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompt.ids.shape[1] :], torch.stack(logits, 1)
