"""Set-based prompting: options side by side, so that their order cannot matter (arXiv:2406.06581)."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from hf_ext.attention import AttentionStructure
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting, require_suffix


@dataclass
class SetBasedPrompting(StructuredPrompting):
    """Read the options of a set in parallel: none sees another, and all begin at the same position.

    What follows a set sees all of its options, from the position after the longest one. So whatever
    the model says is the same for every order of the options. The prompt is made by `SetPrompt`; one
    option, or none, is plain decoding.

    Attention adds up the options in the order in which they are stored, and sums of floating-point
    numbers depend on it by rounding. With `canonical` the options are read in an order of their own, by
    their tokens, so that not even a bit differs. The ids returned keep the caller's order.

    Args:
        canonical: read the options of every set sorted by their tokens.
        decode_with: how to go on after the prompt: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: a prompt that ends in a set, segments in several pieces, or more positions than the model has.

    Source:
        McIlroy-Young et al., Order-Independence Without Fine Tuning (NeurIPS 2024).

    Example:
        >>> from hf_ext.generation.structured.set_prompt import SetPrompt
        >>> from hf_ext.testing import tiny_models
        >>> model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
        >>> prompt = SetPrompt("pick: ", ["red", "blue", "green"], " = ")
        >>> texts = set()
        >>> for order in ([0, 1, 2], [2, 0, 1]):
        ...     inputs = prompt.reordered(order).encode(tokenizer)
        ...     out = SetBasedPrompting().generate(model, **inputs, max_new_tokens=5, do_sample=False)
        ...     texts.add(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
        >>> len(texts)
        1
    """

    canonical: bool = True

    def reads(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the options of every set in their own order."""
        order = canonical_order(prompt) if self.canonical else None
        if order is None:
            return prompt
        return dataclasses.replace(
            prompt,
            ids=prompt.ids.gather(1, order),
            segments=prompt.segments.gather(1, order),
            groups=None if prompt.groups is None else prompt.groups.gather(1, order),
        )

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return options side by side."""
        structure = AttentionStructure.causal(prompt.mask).segments(prompt.segments, prompt.groups)
        require_suffix(structure, type(self).__name__)
        return structure


def canonical_order(prompt: Prompt) -> torch.Tensor | None:
    """Return the columns of a batch with the segments of every set sorted by their tokens.

    Args:
        prompt: the prompts.

    Returns:
        `(batch, length)` int64, or None if all are sorted as they are.

    Example:
        >>> ids = torch.tensor([[7, 5, 9, 4, 8]])
        >>> canonical_order(Prompt(ids, ids > 0, torch.tensor([[0, 1, 1, 2, 0]])))
        tensor([[0, 3, 1, 2, 4]])
    """
    groups = (prompt.segments > 0).long() if prompt.groups is None else prompt.groups
    rows = []
    for ids, owners, sets in zip(prompt.ids.tolist(), prompt.segments.tolist(), groups.tolist(), strict=True):
        row: list[int] = []
        for group, members in itertools.groupby(range(len(ids)), key=sets.__getitem__):
            columns = list(members)
            if group:
                segments = [list(found) for _, found in itertools.groupby(columns, key=owners.__getitem__)]
                if len({owners[segment[0]] for segment in segments}) < len(segments):
                    return None  # a segment in pieces: whoever builds the structure says so
                segments.sort(key=lambda segment: [ids[column] for column in segment])
                columns = [column for segment in segments for column in segment]
            row += columns
        rows.append(row)
    order = torch.tensor(rows, device=prompt.ids.device)
    return None if bool((order[:, 1:] > order[:, :-1]).all()) else order
