"""What checks of cache policies share: a script of passes, and the full cache they are held against.

The reference knows nothing of the engine: it runs the stock model with a `DynamicCache` and hides, in every
layer, row and head, the columns that the compressed cache no longer held when the same pass began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_ext.attention.intercept import intercept, visible
from hf_ext.cache import CachePolicy, CompressedCache
from hf_ext.cache.layer import CompressedLayer

#: Float32 results of the same sums in another order.
TOLERANCE = 3e-5


@dataclass
class Log:
    """What a compressed cache held before each pass, and the logits it gave.

    Args:
        held: for each pass, for each layer that is compressed `(rows, heads, n)` columns, by its number.
        logits: of each pass.
    """

    held: list[dict[int, Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def columns_of(cache: CompressedCache) -> dict[int, Tensor]:
    """Return the columns that each compressed layer holds."""
    return {
        number: layer.entries().columns.clone()
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, CompressedLayer) and layer.is_initialized
    }


@contextlib.contextmanager
def hidden(model: Any, held: dict[int, Tensor], seen: int) -> Iterator[None]:
    """Let the layers of a model see, of the columns before `seen`, only those in `held`."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Callable, **call: Any) -> Any:
        columns = held.get(module.layer_idx)
        if columns is None or not seen:
            return plain(module, query, key, value, mask, **call)
        mask = visible(mask, query, key).expand(len(query), -1, query.shape[2], -1)
        # A sliding layer of a full cache holds the last columns only.
        offset = seen + query.shape[2] - key.shape[2]
        kept = torch.zeros(*columns.shape[:2], seen + query.shape[2] + 1, dtype=torch.bool)
        kept.scatter_(2, columns.long() % kept.shape[2], True)  # what stands for nothing goes to the last place
        kept = kept[:, :, :-1]
        kept[:, :, seen:] = True
        kept = kept[:, :, offset:].repeat_interleave(query.shape[1] // columns.shape[1], dim=1)
        return plain(module, query, key, value, added(mask & kept[:, :, None]), **call)

    with intercept(model, attend):
        yield


def added(mask: Tensor) -> Tensor:
    """Return a mask of bool as eager attention takes it."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def positions(mask: Tensor, count: int) -> Tensor:
    """Return the positions of the last `count` columns, as `generate` counts them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]


class Script:
    """A run of passes over the same tokens with a compressed cache, and with a full one.

    Args:
        model: with `attn_implementation="hf_ext"`; the reference runs under `"eager"`.
        policy: of the compressed cache.
        mask: `(rows, columns)` of the tokens, padding on the left.
        options: of the cache.
        implementation: under which the compressed cache runs.
    """

    def __init__(
        self, model: Any, policy: CachePolicy, mask: Tensor, implementation: str = "hf_ext", **options: Any
    ) -> None:
        self.model, self.mask, self.implementation = model, mask.clone(), implementation
        self.compressed = CompressedCache(model.config, policy, **options)
        self.full = DynamicCache()  # whose layers keep everything, also those that slide
        self.rows = list(range(len(mask)))
        self.worst = 0.0

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run a pass over new tokens with both caches and compare the logits; return those of the compressed one.

        Args:
            ids: `(rows, new)`.
            mask: `(rows, columns)`, the new tokens included.
        """
        model, count = self.model, ids.shape[1]
        held, seen = columns_of(self.compressed), self.compressed.get_seq_length()
        where = positions(mask, count)
        model.set_attn_implementation(self.implementation)
        with torch.no_grad():
            found = model(ids, attention_mask=mask, position_ids=where, past_key_values=self.compressed).logits
            model.set_attn_implementation("eager")
            with hidden(model, held, seen):
                wanted = model(ids, attention_mask=mask, position_ids=where, past_key_values=self.full).logits
        real = mask[:, -count:].bool()
        gap = (found - wanted).abs().amax(-1)[real].max().item()
        self.worst = max(self.worst, gap)
        assert gap < TOLERANCE, f"after {seen} tokens, a pass of {count}: the largest difference of logits is {gap:.2e}"
        return found

    def each(self, change: Callable[[Any], None]) -> None:
        """Change both caches alike."""
        change(self.compressed)
        change(self.full)


def passes(total: int, sizes: Sequence[int]) -> Iterator[slice]:
    """Yield the columns of passes of these sizes."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size
    assert start == total, (start, total)
