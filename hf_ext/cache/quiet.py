"""A token decoded while there is nothing to decide: nothing is hidden, recorded or dropped.

Most tokens are such: a layer drops some only when there are a 64th too many. What is done for each of them in every
layer is one core's work, so it is as little as can be: two copies into room that waits for them, and attention.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from hf_ext.attention.backend import CACHE_LAYER
from hf_ext.attention.mode import runs_kernels
from hf_ext.cache import attending
from hf_ext.cache.budget import tokens_of
from hf_ext.cache.passes import Attend
from hf_ext.cache.stores.dense import DenseStore
from hf_ext.cache.stores.packed import PackedStore
from hf_ext.cache.stores.ragged import RaggedStore

if TYPE_CHECKING:
    from hf_ext.cache.layer import CompressedLayer


def passes(layer: CompressedLayer) -> int:
    """Return how many tokens may be decoded one by one before the layer has something to decide.

    Args:
        layer: after a pass.
    """
    store, policy, cache = layer.store, layer.policy, layer.cache
    if isinstance(store, PackedStore) or store.holes or layer.window is not None or policy.gated:
        return 0
    if layer.record_past or cache.offloading:
        return 0
    if layer.counts and (isinstance(store, RaggedStore) or not policy.adds or policy.queries):
        return 0
    if policy.biased and not layer.counts:
        return 0
    if policy.when == "prefill" or not layer.drops():
        return sys.maxsize
    if policy.queries > 1:  # the last ones are held
        return 0
    if isinstance(store, DenseStore):
        return min(until(layer, len(store), tokens) for tokens in layer.tokens)
    heads = store.starts.shape[1]
    return min(until(layer, -(-held // heads), tokens) for held, tokens in zip(store.totals, layer.tokens, strict=True))


def until(layer: CompressedLayer, held: int, tokens: int) -> int:
    """Return how many more tokens of a row may be held before some are too many.

    Args:
        layer: whose budget it is.
        held: entries of a head.
        tokens: real ones that the row has seen.
    """
    budget, slack = layer.cache.budget_of(layer.number), layer.policy.slack
    if isinstance(budget, int):  # as long as less than the budget was seen, all of it may be held
        return max(budget + slack(budget) - held, 0)
    count = 0
    while True:  # a share grows with what is seen
        [allowed] = tokens_of(budget, [tokens + count])
        more = allowed + slack(allowed) - held - count
        if more <= 0:
            return count
        count += more


def attend(
    layer: CompressedLayer,
    module: nn.Module,
    query: Tensor,
    scale: float | None,
    attend: Attend,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """Store a token and attend to all that is held.

    Args:
        layer: whose tokens `passes` said may come so.
        module: the attention layer.
        query: `(rows, heads, 1, width)`.
        scale: see `CompressedLayer.attend`, as for what follows.
        attend: see there.
        softcap: see there.
        sinks: see there.

    Returns:
        `(rows, 1, heads, width)`; None, and nothing has been done, where this goes another way.
    """
    assert layer._new is not None
    keys, values, tagged = layer._new
    if query.requires_grad or keys.requires_grad or values.requires_grad:
        return None
    store = layer.store
    assert not isinstance(store, PackedStore)
    ragged, cpu = isinstance(store, RaggedStore), not runs_kernels(query.device) and query.is_cpu
    by_sdpa = cpu and softcap is None and sinks is None
    if (ragged and not (by_sdpa and "bias" not in store.buffers)) or (layer.counts and not cpu):
        return None
    layer._new = None
    if not store.append_one(keys, values, layer.seen):
        store.append(keys, values, layer.seen, None)
    layer.seen += 1
    layer._quiet -= 1
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(store, RaggedStore):
        setattr(tagged, CACHE_LAYER, layer.again(1, None))
        return attending.attend_ragged_one(store, query, scale)
    assert isinstance(store, DenseStore)
    held_keys, held_values = held = store.keys, store.values
    setattr(tagged, CACHE_LAYER, layer.again(1, None, held))
    if layer.counts:
        output, sums = attending.attend_one(*held, store.bias, query, scale, softcap, sinks)
        store.add(layer.policy.adds, sums)
        return output
    width = held_keys.shape[-1]
    if by_sdpa and width == held_values.shape[-1] <= 256:
        grouped = query.shape[1] != held_keys.shape[1]
        output = functional.scaled_dot_product_attention(query, held_keys, held_values, scale=scale, enable_gqa=grouped)
        return output.transpose(1, 2).contiguous()
    return attend(query, held_keys, held_values, None, False)[0]
