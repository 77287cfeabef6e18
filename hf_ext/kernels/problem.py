"""What the attention kernels have in common beside their arithmetic: checked inputs, and who sees whom as arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hf_ext.attention.blocks import KernelArguments, kernel_arguments
from hf_ext.attention.structure import AttentionStructure
from hf_ext.kernels.configs import Config, within

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Arguments that change with the length of the input: kernels are not compiled again for them.
LENGTHS = (
    "query_count", "key_count", "offset", "window", "words", "field_rows", "mask_batch", "mask_head", "mask_stride",
)  # fmt: skip


@dataclass(frozen=True)
class Visibility:
    """Who sees whom, flat, as operators pass it on.

    Args:
        tensors: those of `KernelArguments`, none without a structure.
        mask: `(batch, heads, queries, keys)` uint8, or a floating dtype to be added; None without.
        causal: whether places alone decide, the last query seeing all keys.
        window: of the structure or of causal attention; 0 without.
        groups: as in `KernelArguments`.
        tree: as in `KernelArguments`.
        size: as in `KernelArguments`.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None
    causal: bool = False
    window: int = 0
    groups: bool = False
    tree: int = 0
    size: int = 128

    def fit(self, config: Config) -> Config:
        """Return the configuration with blocks that divide those of the structure's table."""
        return within(config, self.size) if self.tensors else config

    def arguments(self, query: torch.Tensor, key: torch.Tensor, unit: float, by_key: bool = False) -> dict[str, Any]:
        """Return what all kernels take of it.

        Args:
            query: `(batch, heads, queries, width)`.
            key: `(batch, key heads, keys, width)`.
            unit: what an added mask is multiplied by, to have the unit of the kernel's scores.
            by_key: whether the kernel goes by blocks of keys and looks at queries.
        """
        pieces: list[torch.Tensor | None] = [*self.tensors] or [None] * 7
        queries, keys, ancestors, *tables = pieces
        indices, counts = tables[2:] if by_key else tables[:2]
        mask = self.mask
        added = mask is not None and mask.is_floating_point()
        batch, head, stride = (0, 0, 0) if mask is None else mask.stride()[:3]
        return {
            "QUERY_FIELDS": queries, "KEY_FIELDS": keys, "ANCESTORS": ancestors, "INDICES": indices, "COUNTS": counts,
            "MASK": mask, "mask_batch": batch, "mask_head": head, "mask_stride": stride,
            "mask_unit": unit,
            "mask_least": torch.finfo(mask.dtype).min if mask is not None and added else 0.0,
            "words": 0 if ancestors is None else ancestors.shape[-1],
            "field_rows": 0 if queries is None or len(queries) == 1 else 1,
            "query_count": query.shape[2], "key_count": key.shape[2], "offset": key.shape[2] - query.shape[2],
            "window": self.window,
            "STRUCTURE": bool(self.tensors), "CAUSAL": self.causal, "WINDOW": self.window > 0, "GROUPS": self.groups,
            "TREE": self.tree, "MASK_KIND": 0 if mask is None else 2 if added else 1, "SIZE": self.size,
        }  # fmt: skip


def visibility(
    query: torch.Tensor,
    key: torch.Tensor,
    structure: AttentionStructure | KernelArguments | None,
    causal: bool,
    window: int | None,
    mask: torch.Tensor | None,
) -> Visibility:
    """Return who sees whom for the kernels; see `attention` for the arguments.

    Raises:
        ValueError: what cannot be honoured together, or shapes that do not fit.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    check_visibility(query, key, structure, causal, window, mask)
    if structure is not None:
        found = structure if isinstance(structure, KernelArguments) else kernel_arguments(structure)
        if found.size < 16:
            raise ValueError(f"kernels need blocks of at least 16, got kernel arguments of size {found.size}")
        return Visibility(found.tensors(), window=found.window, groups=found.groups, tree=found.tree, size=found.size)
    if mask is not None:
        mask = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
        if mask.shape[-1] > 1 and mask.stride(-1) != 1:
            mask = mask.contiguous()
        return Visibility(mask=mask.expand(batch, heads, queries, keys))
    return Visibility(causal=causal, window=window or 0)


def check_visibility(
    query: torch.Tensor,
    key: torch.Tensor,
    structure: AttentionStructure | KernelArguments | None,
    causal: bool,
    window: int | None,
    mask: torch.Tensor | None,
) -> None:
    """Raise a ValueError for what cannot be honoured together, and for shapes that do not fit."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if (structure is not None) + causal + (mask is not None) > 1:
        raise ValueError("give one of structure, causal and mask: a structure or a mask says all of who sees whom")
    if window is not None and not causal:
        raise ValueError("window goes with causal=True; a structure has its own (structure.windowed)")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if causal and queries > keys:
        raise ValueError(f"causal attention needs no more queries than keys, got {queries} queries and {keys} keys")
    if structure is not None:
        rows, *lengths = structure.shape
        if rows not in (1, batch) or lengths != [queries, keys]:
            raise ValueError(
                f"the structure has {rows} rows, {lengths[0]} queries and {lengths[1]} keys; query and key have "
                f"{batch} (or a structure of 1 for all), {queries} and {keys}"
            )
    if mask is not None:
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if not fits or mask.shape[2:] != (queries, keys):
            raise ValueError(
                f"mask must have the shape ({batch} or 1, {heads} or 1, {queries}, {keys}), got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"mask must be bool, or floating to be added to the scores, got {mask.dtype}")
        if mask.requires_grad:
            raise ValueError("the mask gets no gradient: detach it")


def check_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, sinks: torch.Tensor | None, scale: float,
    softcap: float | None,
) -> None:  # fmt: skip
    """Raise a ValueError for shapes, dtypes and numbers that make no attention."""
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the shape (batch, heads, tokens, width), got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"query, key and value must have one dtype, got {[t.dtype for t in tensors.values()]}")
    if query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must have the same width, and the heads of the "
            "query must be a multiple of the heads of the key"
        )
    if value is not None and value.shape[1:3] != key.shape[1:3]:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same heads and tokens")
    if sinks is not None and (sinks.shape != query.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be {query.shape[1]} numbers, one a head, got {tuple(sinks.shape)}")
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0, or None, got {softcap}")


def check_kernel(query: torch.Tensor, value: torch.Tensor | None = None) -> None:
    """Raise a ValueError for what the reference computes and no kernel does."""
    width = max(query.shape[-1], 0 if value is None else value.shape[-1])
    if query.dtype not in DTYPES:
        raise ValueError(f"kernels take {', '.join(map(str, DTYPES))}, got {query.dtype}: use the reference")
    if width > 256:
        raise ValueError(f"kernels take heads up to a width of 256, got {width}: use attn_implementation='sdpa'")


def dense_visibility(
    query: torch.Tensor,
    key: torch.Tensor,
    structure: AttentionStructure | KernelArguments | None,
    causal: bool,
    window: int | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return who sees whom as a bool that broadcasts to the scores, and what is added to them."""
    check_visibility(query, key, structure, causal, window, mask)
    if structure is not None:
        return structure.dense(), None
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None and mask.dtype != torch.bool:
        return mask > torch.finfo(mask.dtype).min, mask
    if mask is not None:
        return mask, None
    distance = torch.arange(queries, device=query.device)[:, None] + keys - queries
    distance = distance - torch.arange(keys, device=query.device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return (seen if window is None else seen & (distance < window)), None
