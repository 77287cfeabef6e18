"""Merge neighbouring entries of a cache: each set of them becomes its weighted mean.

Source: Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks (arXiv 2407.08454),
where tokens side by side with similar keys make a set. Weights are normalised within each set.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from hf_ext.kernels import configs
from hf_ext.kernels.language import Launch, cdiv, check_device, jit, load_rows, power_of_two, product, store_rows, tl
from hf_ext.kernels.problem import DTYPES
from hf_ext.kernels.scores import adjacent, strides

Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def merge_entries(
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    sets: torch.Tensor,
    count: int,
    *,
    masses: torch.Tensor | None = None,
) -> Merged:
    """Return the weighted mean of the entries of each set, and how many entries each stands for.

    Args:
        keys: `(rows, heads, entries, width)`, float16, bfloat16 or float32, width up to 256.
        values: `(rows, heads, entries, value width)`.
        weights: `(rows, heads, entries)`, greater than 0; they are divided by their sum over the set.
        sets: `(rows, heads, entries)` int32 or int64 numbers of sets, each from 0 to `count` and none less than one
            before it; -1 drops an entry.
        count: how many sets a head has. A set without entries is 0, and so is its mass.
        masses: `(rows, heads, entries)`, how many entries each stands for already; 1 by default.

    Returns:
        Keys `(rows, heads, count, width)` and values in the dtype of the input, computed in float32, and float32
        `(rows, heads, count)` sums of the masses.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: no GPU, or no Triton.
    """
    _check(keys, values, weights, sets, count, masses)
    widest = max(keys.shape[-1], values.shape[-1])
    if keys.dtype not in DTYPES or widest > configs.WIDTHS[-1]:
        raise ValueError(
            f"the kernel takes {', '.join(map(str, DTYPES))} and heads up to a width of {configs.WIDTHS[-1]}, got "
            f"{keys.dtype} and {widest}: use merge_entries_reference"
        )
    check_device(keys.device)
    keys, values = adjacent(keys), adjacent(values)
    rows, heads, _ = sets.shape
    merged = keys.new_empty(rows, heads, count, keys.shape[-1]), values.new_empty(rows, heads, count, values.shape[-1])
    found = keys.new_empty(rows, heads, count, dtype=torch.float32)
    config = configs.choose("merge_entries", widest, keys.dtype, keys.device)
    launch_merge_entries(
        keys, values, weights.contiguous(), sets.contiguous(), None if masses is None else masses.contiguous(),
        set_bounds(sets, count), *merged, found, config,
    )()  # fmt: skip
    return *merged, found


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


def set_bounds(sets: torch.Tensor, count: int) -> torch.Tensor:
    """Return `(rows, heads, count + 1)` int32: where the entries of each set begin, and where those of the last end.

    Example:
        >>> set_bounds(torch.tensor([[[0, -1, 0, 2]]]), 3)
        tensor([[[0, 3, 3, 4]]], dtype=torch.int32)
    """
    if not sets.shape[-1]:
        return sets.new_zeros(*sets.shape[:2], count + 1, dtype=torch.int32)
    # What is dropped counts to the set before it here; the kernel tells it apart.
    filled = sets.cummax(-1).values
    numbers = torch.arange(count + 1, device=sets.device, dtype=sets.dtype).expand(*sets.shape[:2], -1).contiguous()
    return torch.searchsorted(filled, numbers, out_int32=True)


@jit(lengths=("entries", "count"))
def _merge_entries(
    KEYS, VALUES, WEIGHTS, SETS, MASSES, BOUNDS, KEYS_OUT, VALUES_OUT, MASSES_OUT, k_batch, k_head, k_row, v_batch,
    v_head, v_row, entries, count, D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(1) + head
    numbers = first + tl.arange(0, BLOCK_M)
    KEYS += batch * k_batch + head * k_head
    VALUES += batch * v_batch + head * v_head
    BOUNDS += line * (count + 1)
    start = tl.load(BOUNDS + first)
    end = tl.load(BOUNDS + tl.minimum(first + BLOCK_M, count))
    total = tl.zeros((BLOCK_M,), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    keys = tl.zeros((BLOCK_M, PADDED_D), tl.float32)
    values = tl.zeros((BLOCK_M, PADDED_DV), tl.float32)
    # Sets lie one behind the other: a program's sets have their entries here and nowhere else.
    for step in range(0, tl.cdiv(end - start, BLOCK_N)):
        begin = start + step * BLOCK_N
        at = begin + tl.arange(0, BLOCK_N)
        inside = at < end
        of_entry = tl.load(SETS + line * entries + at, mask=inside, other=-1)
        weight = tl.load(WEIGHTS + line * entries + at, mask=inside, other=0.0).to(tl.float32)
        member = of_entry[None, :] == numbers[:, None]
        share = tl.where(member, weight[None, :], 0.0)
        total += tl.sum(share, 1)
        stands_for = tl.where(inside, 1.0, 0.0)
        if MASSES is not None:
            stands_for = tl.load(MASSES + line * entries + at, mask=inside, other=0.0).to(tl.float32)
        mass += tl.sum(tl.where(member, stands_for[None, :], 0.0), 1)
        # What is dropped may be anything, even no number, which 0 times would not be 0.
        kept = (of_entry >= 0)[:, None]
        k = load_rows(KEYS + begin.to(tl.int64) * k_row, k_row, end - begin, BLOCK_N, D, PADDED_D, False)
        keys = product(share, tl.where(kept, k.to(tl.float32), 0.0), keys)
        v = load_rows(VALUES + begin.to(tl.int64) * v_row, v_row, end - begin, BLOCK_N, DV, PADDED_DV, False)
        values = product(share, tl.where(kept, v.to(tl.float32), 0.0), values)
    share = (1.0 / tl.where(total > 0, total, float("inf")))[:, None]
    line = line * count + first
    store_rows(KEYS_OUT + line * D, keys * share, D, count - first, BLOCK_M, D, PADDED_D)
    store_rows(VALUES_OUT + line * DV, values * share, DV, count - first, BLOCK_M, DV, PADDED_DV)
    place = tl.arange(0, BLOCK_M)
    tl.store(MASSES_OUT + line + place, mass, mask=place < count - first)


def launch_merge_entries(
    keys: torch.Tensor, values: torch.Tensor, weights: torch.Tensor, sets: torch.Tensor, masses: torch.Tensor | None,
    bounds: torch.Tensor, keys_out: torch.Tensor, values_out: torch.Tensor, masses_out: torch.Tensor,
    config: configs.Config,
) -> Launch:  # fmt: skip
    """Return the launch of the kernel whose programs make a block of sets each."""
    rows, heads, entries, width = keys.shape
    count, value_width = keys_out.shape[2], values.shape[-1]
    arguments = {
        "KEYS": keys, "VALUES": values, "WEIGHTS": weights, "SETS": sets, "MASSES": masses, "BOUNDS": bounds,
        "KEYS_OUT": keys_out, "VALUES_OUT": values_out, "MASSES_OUT": masses_out, **strides(k=keys, v=values),
        "entries": entries, "count": count, "D": width, "DV": value_width, "PADDED_D": power_of_two(width),
        "PADDED_DV": power_of_two(value_width), "BLOCK_M": config.queries, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(_merge_entries, (cdiv(count, config.queries), heads, rows), arguments, config)
