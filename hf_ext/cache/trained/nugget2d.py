"""The cache of a model whose history is read through a few of its tokens (arXiv:2310.02409)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.cache.budget import tokens_of
from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen, Selection, best


@dataclass(kw_only=True)
class Nugget2D(CachePolicy):
    """Keep a trained share of a context: its nuggets, whose keys and values stand for all of it.

    For a `Nugget2DModel`: `model.compress(context)` reads a context and then drops all but the tokens that the model's
    scorer values most, and the last one. What is read or generated after that stays whole, until it is compressed in
    its turn. All layers and heads hold the same tokens.

    Source: Nugget 2D: Dynamic Contextual Compression for Scaling Decoder-only Language Models (arXiv:2310.02409).

    Args:
        budget: nuggets of each context: a number when an int, a share of its real tokens when a float.
        sinks: 0, as the scorer decides.
        window: 0, likewise.
        when: "both"; `Nugget2DModel.compress` says when.
        interval: None, likewise.

    Raises:
        ValueError: a budget that is neither, or any other option.

    Example:
        >>> Nugget2D(budget=0.25).chosen(torch.tensor([[0.1, 0.9, 0.3, 0.2]]), torch.tensor([[True] * 4]))
        tensor([[False, False, False,  True]])
        >>> Nugget2D(budget=2).chosen(torch.tensor([[0.1, 0.9, 0.3, 0.2]]), torch.tensor([[False] + [True] * 3]))
        tensor([[False,  True, False,  True]])
    """

    only_for: ClassVar[str] = "Nugget2DModel"
    budget: int | float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks or self.window or self.when != "both" or self.interval is not None:
            raise ValueError(
                "Nugget2D takes a budget alone: its scorer decides what stays, Nugget2DModel.compress when"
            )

    def options(self) -> dict[str, Any]:
        """Return the policy's option as it would be given to it again."""
        return {"budget": self.budget}

    def chosen(self, scores: Tensor, real: Tensor) -> Tensor:
        """Return which tokens of contexts are nuggets.

        Args:
            scores: `(rows, tokens)`.
            real: `(rows, tokens)` bool, False for padding, on the left.

        Returns:
            `(rows, tokens)` bool: the best ones of each row, and always the last one.
        """
        keep = torch.tensor(tokens_of(self.budget, real.sum(1).tolist()), device=scores.device)
        scores = scores.detach().float().masked_fill(~real, -torch.inf)
        last = torch.arange(scores.shape[1], device=scores.device) == scores.shape[1] - 1
        scores = scores.masked_fill(last & real, torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        ranks = torch.empty_like(order).scatter_(
            1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
        )
        return (ranks < keep[:, None]) & real

    def select(self, entries: Entries, chosen: Tensor) -> Tensor:
        """Return the indices of what stays in a layer that has just read contexts.

        Args:
            entries: what the layer holds.
            chosen: `(rows, tokens)`, what `chosen` returned for the last tokens that the layer has read.
        """
        place = entries.columns.long() - (entries.seen - chosen.shape[1])
        stays = chosen[:, None].expand(-1, entries.columns.shape[1], -1).gather(2, place.clamp(min=0))
        stays = (stays | (place < 0)) & entries.real
        return best(torch.where(stays, 0.0, -torch.inf), stays.sum(-1), entries)

    def compress(self, entries: Entries, seen: Seen, keep: Tensor) -> Selection | None:
        """Drop nothing: what is read stays until the model's `compress` has scored all of it."""
        return None
