"""Segments of different lengths, split among programs, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.kernels.ragged_attention import ragged_attention, ragged_attention_reference

LENGTHS = [[35, 1], [17, 67], [3, 0]]


def ragged(
    lengths: list[list[int]] = LENGTHS, group: int = 2, queries: int = 1, width: int = 32,
    value_width: int | None = None, dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:  # fmt: skip
    """Return query, keys, values, starts and lengths; between segments lie slots that are no number."""
    generator = torch.Generator().manual_seed(queries * 1000 + width)
    counts = torch.tensor(lengths)
    gaps = counts + 5
    starts = (gaps.flatten().cumsum(0) - gaps.flatten()).view(counts.shape) + 2
    slots = int(gaps.sum())
    inside = torch.zeros(slots, dtype=torch.bool)
    for start, count in zip(starts.flatten().tolist(), counts.flatten().tolist(), strict=True):
        inside[start : start + count] = True
    rows, heads = len(counts), counts.shape[1] * group
    query = torch.randn(rows, queries, heads, width, generator=generator).to(dtype).transpose(1, 2)
    keys = torch.randn(slots, width, generator=generator).masked_fill(~inside[:, None], torch.nan).to(dtype)
    values = torch.randn(slots, value_width or width, generator=generator).to(dtype)
    return [query, keys, values.masked_fill(~inside[:, None], torch.nan), starts, counts]


def compare(tensors: list[torch.Tensor], bound: float = 2e-6, **options: Any) -> None:
    found = ragged_attention(*tensors, **options)
    double = [tensor.nan_to_num().double() for tensor in tensors[:3]]
    expected = ragged_attention_reference(*double, *tensors[3:], **options)
    for name, a, b in zip(("out", "lse"), found, expected, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} has NaN"
        assert torch.equal(a.isinf(), b.isinf()), f"{name} is infinite elsewhere"
        error = (a.double() - b).nan_to_num(0, neginf=0).abs().max()
        largest = b.nan_to_num(0, neginf=0).abs().max().clamp_min(1)
        assert error <= bound * largest, f"{name} differs by up to {error:.2e}, of {largest:.2e}"
    assert found[0].dtype == tensors[0].dtype
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5])
def test_queries_of_a_group_share_a_segment(group: int, queries: int) -> None:
    compare(ragged(group=group, queries=queries))


def test_more_queries_than_a_program_has_and_than_some_segments_have_entries() -> None:
    compare(ragged([[50, 3]], queries=20))


def test_starts_of_32_bits() -> None:
    *tensors, starts, lengths = ragged()
    compare([*tensors, starts.int(), lengths.int()])


@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (80, 48), (64, 128)])
def test_widths(width: int, value_width: int) -> None:
    compare(ragged(queries=2, width=width, value_width=value_width))


def test_soft_caps_sinks_and_scales() -> None:
    tensors = ragged(queries=3)
    compare(tensors, softcap=2.0, bound=1e-5)
    compare(tensors, sinks=torch.tensor([1.0, -2.0, 0.5, 3.0]))
    compare(tensors, scale=0.5)


def test_the_mass_of_merged_entries_is_added() -> None:
    tensors = ragged(queries=2)
    bias = torch.randint(1, 9, tensors[1].shape[:1]).float().log()
    compare(tensors, bias=bias, bound=1e-5)
    compare(tensors, bias=bias, softcap=2.0, sinks=torch.tensor([1.0, -2.0, 0.5, 3.0]), bound=1e-5)


def test_half_precision() -> None:
    compare(ragged(queries=2, dtype=torch.float16), bound=2e-3)
    compare(ragged(queries=2, dtype=torch.bfloat16), bound=1.6e-2)


def test_compiled_graphs_do_not_break() -> None:
    tensors = [tensor.nan_to_num() for tensor in ragged()]
    compiled = torch.compile(ragged_attention, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*tensors), ragged_attention(*tensors), strict=True):
        assert torch.equal(a, b)


def test_heads_too_wide_are_refused() -> None:
    with pytest.raises(ValueError, match="up to a width of 256, got 272"):
        ragged_attention(*ragged(width=272))
