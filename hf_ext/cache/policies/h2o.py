"""Keep the heavy hitters: what got most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen


@dataclass(kw_only=True)
class H2O(CachePolicy):
    """Keep what got most attention from all queries so far, and the last tokens.

    The score of an entry is the sum of its column of the softmax over all queries, those of the prompt and those
    decoded since; it follows the entry. The sums come from the attention backend, not from an eager matrix.

    Source: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (arXiv:2306.14048).

    Args:
        budget: what each head may keep; see `CachePolicy`, as for all other options.
        recent: share of the budget for the last tokens, whatever attention they got; from 0.0 up to 1.0.
        average: divide the sum by the number of queries that could see the entry, as kvpress does.

    Raises:
        ValueError: an option that is not of the form above.

    Example:
        >>> import torch
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama").eval()
        >>> model.set_attn_implementation("hf_ext")
        >>> cache = CompressedCache(model.config, H2O(budget=6))
        >>> _ = model(torch.arange(1, 21)[None], past_key_values=cache)
        >>> cache.columns(0)[0, 0, -3:].tolist(), cache.held()
        ([17, 18, 19], [6, 6])
    """

    recent: float = 0.5
    average: bool = False

    column_sums: ClassVar[bool] = True
    adds: ClassVar[str] = "received"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.recent, bool) or not isinstance(self.recent, int | float) or not 0 <= self.recent <= 1:
            raise ValueError(f"recent must be a share of the budget from 0.0 to 1.0, got {self.recent!r}")

    def field_names(self) -> tuple[str, ...]:
        """Return the name of the sum that follows each entry."""
        return ("received",)

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the attention received so far."""
        sums = entries.fields["received"]
        if not self.average:
            return sums
        queries = entries.age + 1 if seen.window is None else (entries.age + 1).clamp(max=seen.window)
        return sums / queries.clamp(min=1)

    def last(self, keep: Tensor) -> Tensor:
        """Return the recent tokens' share of the budget."""
        recent = (keep.double() * self.recent + 1e-9).floor().to(keep.dtype)
        return torch.maximum(recent, super().last(keep))
