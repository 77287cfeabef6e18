"""From a layer's attention to the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch

from hf_ext.attention.blocks import KernelArguments, kernel_arguments
from hf_ext.attention.packed import is_packed, unpack
from hf_ext.attention.statistics import Statistics

#: So many queries at most, with that many times as many keys, go to the kernel that is split over the keys.
FEW, FAR = 64, 4
#: Where a packed structure keeps its kernel arguments.
ARGUMENTS = "hf_ext_arguments"


def attend_with_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    statistics: Statistics | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Attend with the kernels.

    Args:
        query: `(batch, heads, queries, width)`.
        key: `(batch, key heads, keys, width)`.
        value: likewise.
        attention_mask: a packed structure, a dense mask, or None.
        causal: whether queries see only what is before them, where there is no mask.
        scale: of the scores.
        softcap: of the scores.
        sinks: `(heads,)`.
        statistics: what to compute besides.

    Returns:
        `(batch, queries, heads, width)`, and log-sum-exp rows and column sums as far as they are asked for.
    """
    from hf_ext.kernels.attention import attention
    from hf_ext.kernels.column_sums import column_sums
    from hf_ext.kernels.decode_attention import decode_attention

    if causal and key.shape[2] > query.shape[2]:  # the rest of a static cache holds nothing yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    seen: dict[str, Any] = {"causal": causal}
    if is_packed(attention_mask):
        assert attention_mask is not None
        seen = {"structure": arguments_of(attention_mask, query.shape[2], key.shape[2])}
    elif attention_mask is not None:
        keys = key.shape[2] if attention_mask.shape[3] == 1 else -1
        seen = {"mask": attention_mask.expand(-1, -1, query.shape[2], keys)}
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, **seen}
    tracked = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (query, key, value, sinks)
    )
    with_sums = statistics is not None and statistics.column_sums
    with_lse = statistics is not None and statistics.lse
    sums = None
    if not tracked and query.shape[2] <= FEW and (query.shape[2] == 1 or key.shape[2] >= FAR * query.shape[2]):
        output, lse, *more = decode_attention(query, key, value, sinks=sinks, columns=with_sums, **options)
        sums = more[0] if more else None
    else:
        output, lse = attention(query, key, value, sinks=sinks, **options)
        if with_sums:
            sums = column_sums(query.detach(), key.detach(), lse.detach(), **options)
    return output.transpose(1, 2).contiguous(), lse.detach() if with_lse else None, sums


def arguments_of(packed: torch.Tensor, queries: int, keys: int) -> KernelArguments:
    """Return a packed structure as kernels read it; it is worked out once for all layers that share it."""
    if torch.compiler.is_compiling():
        return kernel_arguments(unpack(packed, queries, keys))
    found = getattr(packed, ARGUMENTS, None)
    if found is None or found.shape[1:] != (queries, keys):
        found = kernel_arguments(unpack(packed, queries, keys))
        setattr(packed, ARGUMENTS, found)
    return found
