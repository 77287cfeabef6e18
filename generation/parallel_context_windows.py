"""Parallel context windows: parts of a long context side by side, at the positions of one (arXiv:2212.10947)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_ext.attention import AttentionStructure
from hf_ext.generation.strategy import positive
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting, require_suffix


@dataclass
class ParallelContextWindows(StructuredPrompting):
    """Read windows of the context in parallel, at re-used positions; the query after them sees all.

    The windows of a prompt are the segments of its `segment_ids`, or its tokens are cut into windows of
    `window` tokens, except the first `shared` (bos, instructions), which all windows see, and the last
    `query`, which follow the windows. So a context of several times the model's length fits: only the
    longest window and what stands around the windows take positions. One window is the plain model, and
    the order of the windows does not matter.

    `ParallelEnsemble` is the simpler way to use windows, to compare with.

    Args:
        window: tokens of a window; None takes the prompt's segments.
        query: tokens at the end of every prompt that follow the windows, if they are cut by `window`.
        shared: tokens at the beginning that all windows see, likewise.
        decode_with: how to go on after the prompt: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: both `window` and segments, a prompt that ends in a window, or more positions than the
            model has.

    Source:
        Ratner et al., Parallel Context Windows for Large Language Models (ACL 2023); Yang et al., Revisiting
        Parallel Context Windows (arXiv:2305.15262).

    Example:
        >>> import torch
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.shared("gpt2")  # a table of 128 positions
        >>> ids = torch.arange(300)[None] % 90 + 3
        >>> strategy = ParallelContextWindows(window=60, query=20, shared=1)
        >>> strategy.generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 304])
    """

    window: int | None = None
    query: int = 1
    shared: int = 0

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        if self.window is not None:
            positive("window", self.window)
        positive("query", self.query)
        if isinstance(self.shared, bool) or not isinstance(self.shared, int) or self.shared < 0:
            raise ValueError(f"shared must be an int of at least 0, got {self.shared!r}")

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return windows side by side."""
        segments, groups = windows_of(prompt, self.window, self.query, self.shared, type(self).__name__)
        structure = AttentionStructure.causal(prompt.mask).segments(segments, groups)
        require_suffix(structure, type(self).__name__)
        return structure


def windows_of(
    prompt: Prompt, window: int | None, query: int, shared: int, name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the segments and groups of windows: those of the prompt, or cut by length.

    Args:
        prompt: the prompts.
        window: see `ParallelContextWindows`.
        query: likewise.
        shared: likewise.
        name: of the method, for messages.

    Raises:
        ValueError: windows are given in both ways.

    Example:
        >>> ids = torch.ones(1, 8, dtype=torch.long)
        >>> windows_of(Prompt(ids, ids > 0, ids * 0), 3, 2, 1, "x")[0]
        tensor([[0, 1, 1, 1, 2, 2, 0, 0]])
    """
    if window is None:
        return prompt.segments, prompt.groups
    if bool((prompt.segments > 0).any()):
        raise ValueError(f"{name}: give window={window} or segment_ids, not both")
    real = prompt.mask.long()
    number = real.cumsum(-1) - 1 - shared
    inside = prompt.mask & (number >= 0) & (number < real.sum(-1, keepdim=True) - shared - query)
    return torch.where(inside, number // window + 1, 0), None
