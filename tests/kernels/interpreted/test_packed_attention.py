"""Attention that reads packed codes, against everything dequantised in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.kernels.packed_attention import packed_attention, packed_attention_reference
from hf_ext.kernels.packing import quantise_keys, quantise_values


def problem(
    bits: int = 4, tokens: int = 64, group: int = 32, value_group: int = 16, heads: int = 4, key_heads: int = 2,
    queries: int = 1, width: int = 32, value_width: int | None = None, dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:  # fmt: skip
    """Return query, and keys and values as they are packed; keys are off zero by channels."""
    generator = torch.Generator().manual_seed(tokens + width + bits)
    query = torch.randn(2, queries, heads, width, generator=generator).to(dtype).transpose(1, 2)
    keys = torch.randn(2, key_heads, tokens, width, generator=generator) + 2 * torch.randn(width, generator=generator)
    values = torch.randn(2, key_heads, tokens, value_width or width, generator=generator)
    packed = quantise_keys(keys.to(dtype), bits, group), quantise_values(values.to(dtype), bits, value_group)
    return [query, *packed[0], *packed[1]]


def compare(tensors: list[torch.Tensor], bound: float = 4e-6, **options: Any) -> None:
    found = packed_attention(*tensors, **options)
    expected = packed_attention_reference(tensors[0].double(), *tensors[1:], **options)
    for name, a, b in zip(("out", "lse"), found, expected, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} has NaN"
        assert torch.equal(a.isinf(), b.isinf()), f"{name} is infinite elsewhere"
        error = (a.double() - b).nan_to_num(0, neginf=0).abs().max()
        largest = b.nan_to_num(0, neginf=0).abs().max().clamp_min(1)
        assert error <= bound * largest, f"{name} differs by up to {error:.2e}, of {largest:.2e}"
    assert found[0].dtype == tensors[0].dtype
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits(bits: int) -> None:
    compare(problem(bits), bits=bits)


@pytest.mark.parametrize(("tokens", "group"), [(64, 16), (55, 11), (7, 7), (100, 50), (3, 1)])
def test_groups_of_tokens(tokens: int, group: int) -> None:
    compare(problem(tokens=tokens, group=group), bits=4)


@pytest.mark.parametrize(("width", "value_width", "value_group"), [(16, 16, 16), (80, 48, 8), (24, 72, 36)])
def test_widths(width: int, value_width: int, value_group: int) -> None:
    compare(problem(width=width, value_width=value_width, value_group=value_group), bits=4)
    compare(problem(2, width=width, value_width=value_width, value_group=value_group), bits=2)


@pytest.mark.parametrize("key_heads", [1, 4])
def test_heads_of_a_group_share_what_is_packed(key_heads: int) -> None:
    compare(problem(tokens=32, key_heads=key_heads, queries=9), bits=4)


def test_hidden_entries_soft_caps_and_masses() -> None:
    tensors = problem(queries=2)
    visible = torch.rand(2, 2, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[0, :, :25] = False
    visible[1, 1] = False
    compare(tensors, bits=4, visible=visible)
    compare(tensors, bits=4, softcap=2.0, bound=1e-5)
    compare(tensors, bits=4, bias=torch.randint(1, 5, (2, 2, 64)).float().log(), visible=visible, scale=0.3)


def test_parts_of_larger_stores() -> None:
    """Stores have room for more, so that what they hand over has gaps in memory."""
    query, *packed = problem(tokens=160)
    cut = [tensor[:, :, : tensor.shape[2] * 3 // 5] for tensor in packed]
    compare([query, *cut], bits=4)


def test_half_precision() -> None:
    compare(problem(queries=2, dtype=torch.float16), bits=4, bound=4e-3)
    compare(problem(queries=2, dtype=torch.bfloat16), bits=4, bound=4e-2)


def test_nothing_is_packed_yet() -> None:
    out, lse = packed_attention(*problem(tokens=0), bits=4)
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_compiled_graphs_do_not_break() -> None:
    tensors = problem()
    compiled = torch.compile(packed_attention, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*tensors, bits=4), packed_attention(*tensors, bits=4), strict=True):
        assert torch.equal(a, b)
