"""The slow way to read a prompt twice, one row at a time, that tests compare batches, caches and training with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from hf_ext.attention import AttentionStructure, masks_for


@torch.no_grad()
def prefix_caches(model: Any, ids: torch.Tensor) -> tuple[DynamicCache, DynamicCache]:
    """Read a row without padding twice, switching adapters as PEFT does.

    Args:
        model: a `BituneModel`.
        ids: `(1, tokens)` int64.

    Returns:
        The cache of the causal pass, and that of the bidirectional one.
    """
    base, made = model.get_base_model(), []
    ones = torch.ones_like(ids)
    for name, kind in (("default", AttentionStructure.causal), ("bidirectional", AttentionStructure.bidirectional)):
        model.set_adapter(name)
        given = {"attention_mask": masks_for(base, kind(ones)), "position_ids": torch.arange(ids.shape[1])[None]}
        made.append(base(ids, **given, past_key_values=DynamicCache()).past_key_values)
    model.set_adapter("default")
    return made[0], made[1]


@torch.no_grad()
def row_logits(model: Any, ids: torch.Tensor, prompt: int, keys: float, values: float) -> torch.Tensor:
    """Return the logits of a row from the last token of its prompt on, all of it read anew.

    Args:
        model: a `BituneModel`.
        ids: `(1, tokens)` int64, without padding.
        prompt: tokens of the prompt.
        keys: share of the bidirectional pass in the keys of every layer.
        values: likewise in the values.
    """
    base, cache = model.get_base_model(), DynamicCache()
    if prompt > 1:
        first, both = prefix_caches(model, ids[:, : prompt - 1])
        for number, (a, b) in enumerate(zip(first.layers, both.layers, strict=True)):
            mixed = (1 - keys) * a.keys + keys * b.keys, (1 - values) * a.values + values * b.values
            cache.update(*mixed, number)
    rest = AttentionStructure.causal(torch.ones_like(ids)).part(max(prompt - 1, 0), ids.shape[1])
    positions = rest.queries.position.long()
    mask = masks_for(base, rest)
    return base(ids[:, -len(rest.queries) :], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
