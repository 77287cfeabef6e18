"""Launches of the kernels for caches over tensors that have shapes and no memory, to be compiled or compared."""

from __future__ import annotations

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.compaction import launch_compact
from hf_ext.kernels.language import Launch
from hf_ext.kernels.merge_entries import launch_merge_entries
from hf_ext.kernels.packed_kernel import launch_packed
from hf_ext.kernels.ragged_attention import launch_ragged

#: What is compiled of each operation; float32 only the last.
VARIANTS = {
    "compact": ("ragged", "dense"),
    "ragged": ("plain", "bias"),
    "packed": ("2 bits", "8 bits", "4 bits"),
    "merge_entries": ("masses",),
}
#: Tokens, or channels, that have a scale in common.
GROUP = 32


def launch(
    operation: str,
    width: int,
    dtype: torch.dtype,
    kind: str,
    variant: str,
    *,
    tokens: int = 2048,
    heads: int = 8,
    key_heads: int = 2,
) -> Launch:
    """Return the launch of an operation for a class of devices.

    Args:
        operation: one of `configs.CACHE_OPERATIONS`.
        width: of a head.
        dtype: of the inputs.
        kind: class of devices, for the configuration.
        variant: one of `VARIANTS`; "bias" has a soft cap, too, and packed ones hide tokens.
        tokens: how many the cache has.
        heads: of the query.
        key_heads: of key and value.
    """
    config = configs.entry(kind, operation, width, dtype.itemsize)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    entries = room(1, key_heads, tokens, width, dtype=dtype)
    numbers = room(1, key_heads, tokens)
    places = room(1, key_heads, tokens, dtype=torch.int64)
    query, scale = room(1, heads, 1, width, dtype=dtype), width**-0.5
    parts, part_lse = room(1, heads, 1, 8, width), room(1, heads, 1, 8)
    match operation:
        case "compact":
            moved = entries.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
            wide, narrow = [(moved, moved, 0)] * 2, [(places, places, -1), (numbers.view(torch.int32),) * 2 + (0,)]
            lengths = places[:, :, 0] if variant == "ragged" else None
            return launch_compact(wide, narrow, places, None if lengths is None else lengths[0], lengths, config)
        case "ragged":
            flat, segments = entries[0, 0], places[:, :, 0]
            bias, softcap = (numbers[0, 0], 30.0) if variant == "bias" else (None, 0.0)
            return launch_ragged(query, flat, flat, segments, segments, bias, parts, part_lse, scale, softcap, config)
        case "packed":
            bits = int(variant[0])
            codes = room(1, key_heads, tokens, width * bits // 8, dtype=torch.uint8)
            of_keys = room(1, key_heads, tokens // GROUP, width, dtype=dtype)
            of_values = room(1, key_heads, tokens, width // GROUP, dtype=dtype)
            packed = (codes, of_keys, of_keys, codes, of_values, of_values)
            seen = places.to(torch.uint8)
            return launch_packed(query, packed, seen, None, parts, part_lse, bits, scale, 0.0, config)
        case "merge_entries":
            bounds = room(1, key_heads, tokens + 1, dtype=torch.int32)
            out = (entries, entries, numbers)
            return launch_merge_entries(entries, entries, numbers, places, numbers, bounds, *out, config)
    raise ValueError(f"operation must be one of {configs.CACHE_OPERATIONS}, got {operation!r}")
