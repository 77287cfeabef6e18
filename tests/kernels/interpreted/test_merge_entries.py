"""Sets of entries made into means by the kernel, against adding up in float64."""

from __future__ import annotations

import pytest
import torch

from hf_ext.kernels.merge_entries import merge_entries, merge_entries_reference


def problem(
    entries: int, count: int, width: int = 24, value_width: int = 40, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return keys, values, weights and sets; some entries are dropped, and are no number."""
    generator = torch.Generator().manual_seed(entries + count)
    sets = torch.randint(0, count, (2, 3, entries), generator=generator).sort(-1).values
    dropped = torch.rand(2, 3, entries, generator=generator) < 0.2
    keys = torch.randn(2, 3, entries, width, generator=generator).masked_fill(dropped[..., None], torch.nan)
    values = torch.randn(2, entries, 3, value_width, generator=generator).transpose(1, 2)
    weights = torch.rand(2, 3, entries, generator=generator) + 0.01
    return [keys.to(dtype), values.to(dtype), weights, sets.masked_fill(dropped, -1)]


def compare(tensors: list[torch.Tensor], count: int, masses: torch.Tensor | None = None, bound: float = 2e-6) -> None:
    found = merge_entries(*tensors, count, masses=masses)
    double = [tensor.nan_to_num().double() for tensor in tensors[:3]]
    expected = merge_entries_reference(*double, tensors[3], count, masses=masses)
    for name, a, b in zip(("keys", "values", "masses"), found, expected, strict=True):
        assert a.shape == b.shape, name
        error = (a.double() - b).abs().max()
        assert error <= bound * b.abs().max().clamp_min(1), f"{name} differs by up to {error:.2e}"
    assert found[0].dtype == found[1].dtype == tensors[0].dtype
    assert found[2].dtype == torch.float32


@pytest.mark.parametrize(("entries", "count"), [(70, 20), (70, 3), (9, 40), (33, 33), (1, 1)])
def test_means_of_sets(entries: int, count: int) -> None:
    compare(problem(entries, count), count)


def test_what_was_merged_before_counts_as_much_as_it_stands_for() -> None:
    compare(problem(50, 12), 12, masses=torch.randint(1, 7, (2, 3, 50)).float())


def test_sets_of_32_bits_and_half_precision() -> None:
    *tensors, sets = problem(50, 12)
    compare([*tensors, sets.int()], 12)
    compare(problem(50, 12, dtype=torch.bfloat16), 12, bound=1e-2)


@pytest.mark.parametrize("width", [16, 80, 256])
def test_widths(width: int) -> None:
    compare(problem(40, 10, width, 16), 10)


def test_nothing_is_left() -> None:
    *tensors, sets = problem(20, 5)
    keys, values, masses = merge_entries(*tensors, torch.full_like(sets, -1), 5)
    assert (keys == 0).all()
    assert (values == 0).all()
    assert (masses == 0).all()
    assert merge_entries(*tensors, torch.full_like(sets, -1), 0)[0].shape == (2, 3, 0, 24)
