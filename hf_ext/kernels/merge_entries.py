"""Merge neighbouring entries of a cache: each set of them becomes its weighted mean.

Source: Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks (arXiv 2407.08454),
where tokens side by side with similar keys make a set. Weights are normalised within each set.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def merge_entries_reference(
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    sets: torch.Tensor,
    count: int,
    *,
    masses: torch.Tensor | None = None,
) -> Merged:
    """Return what `merge_entries` returns, by adding up.

    Example:
        >>> keys = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 4, 1)
        >>> weights, sets = torch.tensor([[[1.0, 1.0, 9.0, 2.0]]]), torch.tensor([[[0, 0, -1, 1]]])
        >>> merged, _, masses = merge_entries_reference(keys, keys, weights, sets, 2)
        >>> merged.flatten(), masses
        (tensor([2., 7.]), tensor([[[2., 1.]]]))
    """
    _check(keys, values, weights, sets, count, masses)
    rows, heads, _ = sets.shape
    wide = torch.promote_types(keys.dtype, torch.float32)
    # One list of sets for all rows and heads, each with a last one for what is dropped.
    line = torch.arange(rows * heads, device=sets.device).view(rows, heads, 1) * (count + 1)
    place = (line + torch.where(sets < 0, count, sets)).flatten()

    def added(numbers: torch.Tensor) -> torch.Tensor:
        flat = numbers.to(wide).flatten(0, 2)
        total = flat.new_zeros(rows * heads * (count + 1), *flat.shape[1:]).index_add_(0, place, flat)
        return total.view(rows, heads, count + 1, *flat.shape[1:])[:, :, :count]

    totals = added(weights)
    share = (1 / totals.masked_fill(totals == 0, torch.inf))[..., None]
    mass = torch.ones_like(weights) if masses is None else masses
    merged = [(added(t.to(wide) * weights.to(wide)[..., None]) * share).to(t.dtype) for t in (keys, values)]
    return merged[0], merged[1], added(mass)


def _check(
    keys: torch.Tensor, values: torch.Tensor, weights: torch.Tensor, sets: torch.Tensor, count: int,
    masses: torch.Tensor | None,
) -> None:  # fmt: skip
    if keys.ndim != 4 or values.ndim != 4 or values.shape[:3] != keys.shape[:3] or keys.dtype != values.dtype:
        raise ValueError(
            "keys and values must be (rows, heads, entries, width) of one dtype with the same entries, got "
            f"{keys.dtype} {tuple(keys.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    for name, tensor in {"weights": weights, "sets": sets, "masses": masses}.items():
        if tensor is not None and tensor.shape != keys.shape[:3]:
            raise ValueError(f"{name} must have the shape {tuple(keys.shape[:3])}, got {tuple(tensor.shape)}")
    if sets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sets must be whole numbers, got {sets.dtype}")
    if count < 0:
        raise ValueError(f"count must be the number of sets, got {count}")
