"""Launches of all kernels over tensors that have shapes and no memory, to be compiled or compared."""

from __future__ import annotations

import torch

from hf_ext.attention.blocks import kernel_arguments
from hf_ext.attention.structure import AttentionStructure
from hf_ext.kernels import configs
from hf_ext.kernels.attention import launch_forward
from hf_ext.kernels.attention_backward import launch_row_products
from hf_ext.kernels.column_sums import launch_column_sums
from hf_ext.kernels.decode_attention import launch_decode
from hf_ext.kernels.key_value_gradient import launch_key_value_gradient
from hf_ext.kernels.language import Launch
from hf_ext.kernels.problem import Visibility, visibility
from hf_ext.kernels.query_gradient import launch_query_gradient

#: How many queries stand for an operation that takes few.
QUERIES = {"decode": 1, "decode_many": 48, "forward_few": 16}


def launch(
    operation: str,
    width: int,
    dtype: torch.dtype,
    kind: str,
    *,
    structured: bool = False,
    keys: int = 2048,
    heads: int = 8,
    key_heads: int = 2,
) -> Launch:
    """Return the launch of an operation for a class of devices.

    Args:
        operation: one of `configs.OPERATIONS`.
        width: of a head.
        dtype: of the inputs.
        kind: class of devices, for the configuration.
        structured: a structure with groups, a window and a tree, instead of causal attention with soft cap and sinks.
        keys: how many; as many queries, but for operations that take few.
        heads: of the query.
        key_heads: of key and value.
    """
    config = configs.entry(kind, operation, width, dtype.itemsize)
    queries = QUERIES.get(operation, keys)

    def room(heads: int, tokens: int) -> torch.Tensor:
        return torch.empty(1, tokens, heads, width, dtype=dtype, device="meta").transpose(1, 2)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    query, key, value = room(heads, queries), room(key_heads, keys), room(key_heads, keys)
    out = room(heads, queries)
    seen = _structure(queries, keys) if structured else visibility(query, key, None, True, None, None)
    softcap = 0.0 if structured else 30.0
    sinks = None if structured else numbers(heads)
    rows = numbers(1, heads, queries)
    scale = width**-0.5
    common = (query, key, value, out, rows, rows)
    match operation:
        case "forward" | "forward_few":
            return launch_forward(query, key, value, out, rows, seen, sinks, scale, softcap, config)
        case "row_products":
            return launch_row_products(out, out, rows, rows, config)
        case "query_gradient":
            return launch_query_gradient(*common, out, seen, scale, softcap, config)
        case "key_value_gradient":
            return launch_key_value_gradient(*common, key, value, seen, scale, softcap, config)
        case "column_sums":
            return launch_column_sums(query, key, rows, numbers(1, key_heads, keys), seen, scale, softcap, config)
        case "decode" | "decode_many":
            parts, part_lse = numbers(1, heads, queries, 8, width), numbers(1, heads, queries, 8)
            scores = numbers(1, heads, queries, keys)
            return launch_decode(query, key, value, parts, part_lse, scores, seen, scale, softcap, config)
    raise ValueError(f"operation must be one of {configs.OPERATIONS}, got {operation!r}")


def _structure(queries: int, keys: int) -> Visibility:
    """Return a structure that has everything, without memory."""
    plain = AttentionStructure.causal(torch.ones(1, keys, dtype=torch.bool))
    some = plain.documents(torch.ones(1, keys, dtype=torch.int64)).windowed(64).part(keys - queries, keys)
    nodes = torch.zeros(1, keys, dtype=torch.int32)
    words = torch.zeros(1, queries, 1, dtype=torch.int64)
    found = kernel_arguments(AttentionStructure(some.queries, some.keys, some.window, nodes, words))
    tensors = [torch.empty_like(tensor, device="meta") for tensor in found.tensors()]
    return Visibility(tensors, window=found.window, groups=found.groups, tree=found.tree, size=found.size)
