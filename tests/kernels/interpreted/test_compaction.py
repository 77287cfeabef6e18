"""Entries moved by the kernel, against indexing: bit for bit."""

from __future__ import annotations

import pytest
import torch

from hf_ext.kernels import compaction as module
from hf_ext.kernels.compaction import compact, compact_ragged, compact_ragged_reference, compact_reference

FIELDS = (torch.int64, torch.float32, torch.bool, torch.bfloat16)


def cache(rows: int = 2, heads: int = 3, entries: int = 37, width: int = 24) -> list[torch.Tensor]:
    """Return keys, wider values that lie tokens first, packed codes, a tensor of two axes more, and four fields."""
    generator = torch.Generator().manual_seed(entries)
    values = torch.randn(rows, entries, heads, 40, generator=generator).half().transpose(1, 2)
    wide = [
        torch.randn(rows, heads, entries, width, generator=generator),
        values,
        torch.randint(0, 256, (rows, heads, entries, 5), generator=generator, dtype=torch.uint8),
        torch.randn(rows, heads, entries, 3, 7, generator=generator).double(),
    ]
    fields = [torch.randint(0, 100, (rows, heads, entries), generator=generator).to(dtype) for dtype in FIELDS]
    return wide + fields


def places(rows: int, heads: int, entries: int, kept: int, nothing: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(kept)
    index = torch.rand(rows, heads, entries, generator=generator).argsort(-1)[..., :kept].sort(-1).values
    if nothing:
        for row in range(rows):
            for head in range(heads):
                index[row, head, kept - min(kept, row + 2 * head) :] = -1
    return index


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype, number
        assert a.shape == b.shape, number
        assert torch.equal(a, b), f"tensor {number} ({a.dtype}) differs at {(a != b).nonzero()[:3].tolist()}"


@pytest.mark.parametrize("kept", [1, 16, 29, 37])
def test_entries_are_those_of_the_index(kept: int) -> None:
    tensors, index = cache(), places(2, 3, 37, kept)
    same(compact(tensors, index), compact_reference(tensors, index))


def test_an_index_of_32_bits_and_one_with_gaps_in_memory_will_do() -> None:
    tensors, index = cache(), places(2, 3, 37, 20)
    expected = compact_reference(tensors, index)
    same(compact(tensors, index.int()), expected)
    same(compact(tensors, index.mT.contiguous().mT), expected)


def test_more_tensors_than_a_launch_takes() -> None:
    tensors, index = cache()[:4] * 2 + cache()[4:5] * 6, places(2, 3, 37, 9)
    same(compact(tensors, index), compact_reference(tensors, index))


def test_all_of_a_cache_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = module.launch_compact
    monkeypatch.setattr(module, "launch_compact", lambda *a: launches.append(a) or launch(*a))
    compact(cache(), places(2, 3, 37, 9))
    assert len(launches) == 1


@pytest.mark.parametrize("width", [1, 16, 256, 300])
def test_widths(width: int) -> None:
    tensors, index = cache(width=width)[:1], places(2, 3, 37, 20)
    same(compact(tensors, index), compact_reference(tensors, index))


def test_heads_keep_different_numbers_of_entries() -> None:
    tensors, index = cache(), places(2, 3, 37, 33)
    lengths = torch.tensor([[33, 0, 17], [1, 16, 29]])
    expected = compact_ragged_reference(tensors, index, lengths)
    assert len(expected[0]) == int(lengths.sum())
    same(compact_ragged(tensors, index, lengths), expected)
    same(compact_ragged(tensors, index, lengths.int(), total=int(lengths.sum())), expected)


def test_nothing_is_kept() -> None:
    tensors, index = cache(), places(2, 3, 37, 33)
    assert all(found.shape[2] == 0 for found in compact(tensors, index[..., :0]))
    assert all(len(found) == 0 for found in compact_ragged(tensors, index, torch.zeros(2, 3, dtype=torch.int64)))
