"""Keep some entries of a cache: all its tensors are gathered by one index, in one launch.

Dropping entries from a cache moves keys, values, positions and scores alike. `compact` keeps the same number of
entries for every head; `compact_ragged` keeps as many as each head has, side by side without gaps.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.language import Launch, cdiv, check_device, jit, power_of_two, tl
from hf_ext.kernels.scores import adjacent

#: How many tensors one launch moves: with an axis behind the entries, and without.
SLOTS = 4


def compact(tensors: Sequence[torch.Tensor], index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the entries that an index names, of all tensors alike.

    Up to four tensors with an axis behind the entries and four without go into one launch.

    Args:
        tensors: `(rows, heads, entries, ...)`, each of any dtype and with any axes behind its entries.
        index: `(rows, heads, kept)` places of entries; -1 names none.

    Returns:
        `(rows, heads, kept, ...)` for each tensor. Where the index names none there is 0, in signed integers -1.

    Raises:
        ValueError: shapes that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    _check(tensors, index)
    check_device(index.device)
    found = [tensor.new_empty(*index.shape, *tensor.shape[3:]) for tensor in tensors]
    _run(tensors, found, index, None, None)
    return tuple(found)


def compact_ragged(
    tensors: Sequence[torch.Tensor], index: torch.Tensor, lengths: torch.Tensor, *, total: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Return the first entries that an index names, as many as each head has, without gaps.

    Args:
        tensors: `(rows, heads, entries, ...)`, as in `compact`.
        index: `(rows, heads, most)` places of entries; -1 names none.
        lengths: `(rows, heads)`, how many places of each head count.
        total: the sum of the lengths. Without it the host waits for the device, to learn it and to look whether the
            lengths are right.

    Returns:
        `(total, ...)` for each tensor, row by row and within a row head by head.

    Raises:
        ValueError: shapes or lengths that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    _check(tensors, index)
    _check_lengths(index, lengths, total)
    check_device(index.device)
    ends = lengths.flatten().cumsum(0)
    total = (int(ends[-1]) if len(ends) else 0) if total is None else total
    found = [tensor.new_empty(total, *tensor.shape[3:]) for tensor in tensors]
    _run(tensors, found, index, ends - lengths.flatten(), lengths)
    return tuple(found)


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
    nothing = (index < 0).flatten().nonzero()[:, 0]
    index = index.clamp_min(0) if len(nothing) else index
    found = []
    for tensor in tensors:
        taken = _lines(tensor, row, head, index)
        if len(nothing):
            taken.index_fill_(0, nothing, fill(tensor.dtype))
        found.append(taken.view(*index.shape, *tensor.shape[3:]))
    return tuple(found)


def _lines(tensor: torch.Tensor, row: torch.Tensor, head: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return entries, one a line.

    Whatever the order of the axes in memory, entries are lines of one matrix, and taking lines of a matrix is quicker
    than any other way to index.
    """
    if not tensor.numel():
        return tensor.new_empty(index.numel(), tensor.shape[3:].numel())
    entry = tensor[0, 0, 0]
    if not entry.is_contiguous():
        return _lines(tensor.contiguous(), row, head, index)
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False)]
    unit = math.gcd(*strides) or 1
    steps = [stride // unit for stride in strides]
    lines = sum((size - 1) * step for size, step in zip(tensor.shape[:3], steps, strict=True)) + 1
    matrix = tensor.as_strided((lines, entry.numel()), (unit, 1))
    return matrix.index_select(0, (row * steps[0] + head * steps[1] + index * steps[2]).flatten())


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


@jit
def _take(
    SOURCE, TARGET, source, entry, place, target, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, FILL: tl.constexpr
):  # fmt: skip
    """Copy the entries at `place`, of which -1 is none, from `source` on to `target`."""
    for first in tl.static_range(0, WIDTH, PADDED):
        column = first + tl.arange(0, PADDED)[None, :]
        there = (place >= 0)[:, None]
        written = inside[:, None]
        if WIDTH % PADDED != 0:
            there = there & (column < WIDTH)
            written = written & (column < WIDTH)
        found = tl.load(SOURCE + source + place[:, None] * entry + column, mask=there, other=FILL)
        tl.store(TARGET + target[:, None] * WIDTH + column, found, mask=written)


@jit
def _take_one(SOURCE, TARGET, source, entry, place, target, inside, FILL: tl.constexpr):
    """As `_take`, for entries of one number."""
    found = tl.load(SOURCE + source + place * entry, mask=place >= 0, other=FILL)
    tl.store(TARGET + target, found, mask=inside)


@jit(lengths=("kept", *(f"n{slot}_{axis}" for slot in range(SLOTS) for axis in ("row", "head", "entry"))))
def _compact(
    INDEX, STARTS, LENGTHS,
    W0, W1, W2, W3, W0_OUT, W1_OUT, W2_OUT, W3_OUT, N0, N1, N2, N3, N0_OUT, N1_OUT, N2_OUT, N3_OUT,
    w0_row, w0_head, w0_entry, w1_row, w1_head, w1_entry, w2_row, w2_head, w2_entry, w3_row, w3_head, w3_entry,
    n0_row, n0_head, n0_entry, n1_row, n1_head, n1_entry, n2_row, n2_head, n2_entry, n3_row, n3_head, n3_entry, kept,
    W0_WIDTH: tl.constexpr, W1_WIDTH: tl.constexpr, W2_WIDTH: tl.constexpr, W3_WIDTH: tl.constexpr,
    W0_PADDED: tl.constexpr, W1_PADDED: tl.constexpr, W2_PADDED: tl.constexpr, W3_PADDED: tl.constexpr,
    W0_FILL: tl.constexpr, W1_FILL: tl.constexpr, W2_FILL: tl.constexpr, W3_FILL: tl.constexpr,
    N0_FILL: tl.constexpr, N1_FILL: tl.constexpr, N2_FILL: tl.constexpr, N3_FILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    line = row * tl.num_programs(1) + head
    count = kept
    begin = line * kept
    if LENGTHS is not None:
        count = tl.load(LENGTHS + line).to(tl.int32)
        begin = tl.load(STARTS + line).to(tl.int64)
    inside = at < count
    place = tl.load(INDEX + line * kept + at, mask=inside, other=-1).to(tl.int64)
    target = begin + at
    if W0 is not None:
        _take(W0, W0_OUT, row * w0_row + head * w0_head, w0_entry, place, target, inside, W0_WIDTH, W0_PADDED, W0_FILL)
    if W1 is not None:
        _take(W1, W1_OUT, row * w1_row + head * w1_head, w1_entry, place, target, inside, W1_WIDTH, W1_PADDED, W1_FILL)
    if W2 is not None:
        _take(W2, W2_OUT, row * w2_row + head * w2_head, w2_entry, place, target, inside, W2_WIDTH, W2_PADDED, W2_FILL)
    if W3 is not None:
        _take(W3, W3_OUT, row * w3_row + head * w3_head, w3_entry, place, target, inside, W3_WIDTH, W3_PADDED, W3_FILL)
    if N0 is not None:
        _take_one(N0, N0_OUT, row * n0_row + head * n0_head, n0_entry, place, target, inside, N0_FILL)
    if N1 is not None:
        _take_one(N1, N1_OUT, row * n1_row + head * n1_head, n1_entry, place, target, inside, N1_FILL)
    if N2 is not None:
        _take_one(N2, N2_OUT, row * n2_row + head * n2_head, n2_entry, place, target, inside, N2_FILL)
    if N3 is not None:
        _take_one(N3, N3_OUT, row * n3_row + head * n3_head, n3_entry, place, target, inside, N3_FILL)


def launch_compact(
    wide: Sequence[tuple[torch.Tensor, torch.Tensor, int]], narrow: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
    index: torch.Tensor, starts: torch.Tensor | None, lengths: torch.Tensor | None, config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel.

    Args:
        wide: up to `SLOTS` of source `(rows, heads, entries, width)`, target and what stands for nothing, in integers.
        narrow: the same without an axis behind the entries.
        index: `(rows, heads, kept)`, contiguous.
        starts: where each head's entries begin in a target without gaps; None for targets with the index's shape.
        lengths: with `starts`, how many there are.
        config: how many entries a program moves.
    """
    arguments: dict[str, Any] = {"INDEX": index, "STARTS": starts, "LENGTHS": lengths, "kept": index.shape[2]}
    for kind, given in (("w", wide), ("n", narrow)):
        for slot in range(SLOTS):
            source, target, nothing = given[slot] if slot < len(given) else (None, None, 0)
            name = f"{kind}{slot}"
            arguments |= {name.upper(): source, f"{name.upper()}_OUT": target, f"{name.upper()}_FILL": nothing}
            for axis, number in enumerate(("row", "head", "entry")):
                arguments[f"{name}_{number}"] = 0 if source is None else source.stride(axis)
            if kind == "w":
                width = 16 if source is None else source.shape[3]
                arguments |= {f"W{slot}_WIDTH": width, f"W{slot}_PADDED": min(power_of_two(width), 256)}
    arguments["BLOCK"] = config.keys
    rows, heads, kept = index.shape
    return Launch(_compact, (cdiv(kept, config.keys), heads, rows), arguments, config)


def _run(
    tensors: Sequence[torch.Tensor], found: Sequence[torch.Tensor], index: torch.Tensor, starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> None:  # fmt: skip
    wide, narrow = [], []
    for source, target in zip(tensors, found, strict=True):
        if not target.numel():
            continue
        nothing, bits = fill(source.dtype), _BITS[source.dtype.itemsize]
        if source.ndim == 3:
            narrow.append((source.view(bits), target.view(bits), nothing))
        else:
            wide.append((adjacent(source.flatten(3)).view(bits), target.view(bits), nothing))
    widest = max((source.shape[3] for source, _, _ in wide), default=1)
    largest = torch.float32 if max((source.itemsize for source, _, _ in wide), default=1) > 2 else torch.float16
    config = configs.choose("compact", min(widest, configs.WIDTHS[-1]), largest, index.device)
    index, lengths = index.contiguous(), None if lengths is None else lengths.contiguous()
    for first in range(0, max(len(wide), len(narrow)), SLOTS):
        some = slice(first, first + SLOTS)
        launch_compact(wide[some], narrow[some], index, starts, lengths, config)()


#: Entries are moved and not computed with: a dtype is as good as another of the same size, and compiles nothing new.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
