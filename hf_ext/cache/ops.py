"""The operations of caches: Triton kernels where they run, plain torch elsewhere, with the same results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_ext.attention.mode import runs_kernels


def compact(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """Gather entries of all tensors alike; see `hf_ext.kernels.compaction.compact`."""
    from hf_ext.kernels import compaction

    return (compaction.compact if runs_kernels(index.device) else compaction.compact_reference)(tensors, index)


def ragged_attention(query: Tensor, *held: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Attend to segments; see `hf_ext.kernels.ragged_attention`."""
    from hf_ext.kernels import ragged_attention as kernels

    if runs_kernels(query.device):
        return kernels.ragged_attention(query, *held, **options)
    return kernels.ragged_attention_torch(query, *held, **options)


def packed_attention(query: Tensor, *held: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Attend to packed codes; see `hf_ext.kernels.packed_attention`."""
    from hf_ext.kernels import packed_attention as kernels

    if runs_kernels(query.device):
        return kernels.packed_attention(query, *held, **options)
    return kernels.packed_attention_torch(query, *held, **options)


def merge_entries(keys: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Merge sets of entries; see `hf_ext.kernels.merge_entries`."""
    from hf_ext.kernels import merge_entries as kernels

    if runs_kernels(keys.device):
        return kernels.merge_entries(keys, *others, **options)
    return kernels.merge_entries_reference(keys, *others, **options)
