"""Keep some entries of a cache: all its tensors are gathered by one index, in one launch.

Dropping entries from a cache moves keys, values, positions and scores alike. `compact` keeps the same number of
entries for every head; `compact_ragged` keeps as many as each head has, side by side without gaps.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch


def compact_reference(tensors: Sequence[torch.Tensor], index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what `compact` returns, by indexing.

    Example:
        >>> keys = torch.arange(8.0).view(1, 1, 4, 2)
        >>> positions = torch.arange(4).view(1, 1, 4)
        >>> keys, positions = compact_reference((keys, positions), torch.tensor([[[1, 3, -1]]]))
        >>> keys.tolist(), positions.tolist()
        ([[[[2.0, 3.0], [6.0, 7.0], [0.0, 0.0]]]], [[[1, 3, -1]]])
    """
    _check(tensors, index)
    row = torch.arange(index.shape[0], device=index.device)[:, None, None]
    head = torch.arange(index.shape[1], device=index.device)[None, :, None]
    return _gather(tensors, row, head, index)


def compact_ragged_reference(
    tensors: Sequence[torch.Tensor], index: torch.Tensor, lengths: torch.Tensor, *, total: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Return what `compact_ragged` returns, by indexing.

    Example:
        >>> positions = torch.arange(8).view(1, 2, 4)
        >>> index = torch.tensor([[[0, 3], [1, 2]]])
        >>> compact_ragged_reference((positions,), index, torch.tensor([[2, 1]]))
        (tensor([0, 3, 5]),)
    """
    _check(tensors, index)
    _check_lengths(index, lengths, total)
    inside = torch.arange(index.shape[2], device=index.device) < lengths[..., None]
    row, head, _ = inside.nonzero(as_tuple=True)
    return _gather(tensors, row, head, index[inside])


def _gather(
    tensors: Sequence[torch.Tensor], row: torch.Tensor, head: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    nothing = index < 0
    any_nothing = bool(nothing.any())
    found = []
    for tensor in tensors:
        taken = tensor[row, head, index.clamp_min(0) if any_nothing else index]
        if any_nothing:
            taken[nothing] = fill(tensor.dtype)
        found.append(taken)
    return tuple(found)


def fill(dtype: torch.dtype) -> int:
    """Return what stands where the index is -1: -1 for signed integers, 0 for all else."""
    return -1 if dtype.is_signed and not (dtype.is_floating_point or dtype.is_complex) else 0


def _check(tensors: Sequence[torch.Tensor], index: torch.Tensor) -> None:
    if index.ndim != 3 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be whole numbers (rows, heads, kept), got {index.dtype} {tuple(index.shape)}")
    if not tensors:
        raise ValueError("there is nothing to compact: give at least one tensor")
    entries = tensors[0].shape[2] if tensors[0].ndim > 2 else None
    for tensor in tensors:
        if tensor.ndim < 3 or tensor.shape[:2] != index.shape[:2] or tensor.shape[2] != entries:
            raise ValueError(
                f"tensors must be (rows, heads, entries, ...) with the rows and heads {tuple(index.shape[:2])} of the "
                f"index and one number of entries, got {[tuple(tensor.shape) for tensor in tensors]}"
            )
    if index.shape[2] and not entries:
        raise ValueError(f"there are no entries, and the index asks for {index.shape[2]}")


def _check_lengths(index: torch.Tensor, lengths: torch.Tensor, total: int | None) -> None:
    if lengths.shape != index.shape[:2] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths must be whole numbers {tuple(index.shape[:2])}, one a row and head, got {lengths.dtype} "
            f"{tuple(lengths.shape)}"
        )
    # Who knows the total vouches for the lengths, too: looking at them would wait for the device.
    if total is None and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= index.shape[2]:
        raise ValueError(
            f"lengths must be from 0 to the {index.shape[2]} entries of the index, got {int(lengths.min())} to "
            f"{int(lengths.max())}"
        )
