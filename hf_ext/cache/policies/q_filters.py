"""Keep the keys that lie in the direction of the queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policies.filters import Filters
from hf_ext.cache.policy import CachePolicy, Seen


@dataclass(kw_only=True)
class QFilters(CachePolicy):
    """Keep the keys that lie in the direction of the queries, which was computed once from any text.

    The queries of a head lie around one direction, so the projection of a key on it says how much attention it
    gets on average. Looks at nothing but keys.

    Source: Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression (arXiv:2503.02812), section 3.

    Args:
        filters: of the model: `QFilters.fit(model, texts)`, `Filters.from_pretrained(folder)`, or a tensor
            `(layers, key heads, width)`.
        budget: what each head may keep of a row: tokens when an int, a share of the real tokens seen when a float.
        sinks: first tokens that stay.
        window: last tokens that stay, at most half of the budget.
        when: whether to drop at prefill, while decoding, or both.
        interval: while decoding, drop as soon as so many tokens are too many; by default a 64th of the budget.

    Raises:
        ValueError: an option that is not of the form above; when it runs, filters of a model of another shape.

    Example:
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model, ids = tiny_models.shared("llama"), torch.arange(3, 43)[None]
        >>> filters = QFilters.fit(model, [ids])
        >>> cache = CompressedCache(model.config, QFilters(filters=filters, budget=8))
        >>> _ = model(ids, past_key_values=cache)
        >>> cache.columns(0)[0, 0, -4:].tolist(), cache.held()
        ([36, 37, 38, 39], [8, 8])
    """

    filters: Filters | Tensor = dataclasses.field(compare=False)
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.filters, Filters):
            self.filters = Filters(self.filters)

    @staticmethod
    def fit(model: Any, texts: Iterable[Any], tokenizer: Any = None, **options: Any) -> Filters:
        """Compute the filters of a model; see `Filters.fit`."""
        return Filters.fit(model, texts, tokenizer, **options)

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the projections of the keys."""
        assert isinstance(self.filters, Filters)
        directions = self.filters.of_layer(seen.model_layer, entries.keys)
        return torch.einsum("bhnd,hd->bhn", entries.keys.float(), directions.float())

    def last(self, keep: Tensor) -> Tensor:
        """Return the window, at most half of the budget."""
        return torch.minimum(super().last(keep), keep // 2)

    def options(self) -> dict[str, Any]:
        """Return the options, the filters as a tensor."""
        assert isinstance(self.filters, Filters)
        return {**super().options(), "filters": self.filters.directions}
