"""Sums of the columns of attention weights against the whole matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.kernels.attention import attention, attention_reference
from hf_ext.kernels.column_sums import column_sums, column_sums_reference


def compare(tensors: list[torch.Tensor], bound: float = 2e-6, sinks: torch.Tensor | None = None, **options: Any) -> Any:
    last = options.pop("last", None)
    query, key, value = tensors
    _, lse = attention(query, key, value, sinks=sinks, **options)
    found = column_sums(query, key, lse, last=last, **options)
    double = [tensor.double() for tensor in tensors]
    sinks = None if sinks is None else sinks.double()
    _, exact = attention_reference(*double, sinks=sinks, **options)
    expected = column_sums_reference(*double[:2], exact, last=last, **options)
    assert found.dtype == torch.float32
    assert found.shape == (query.shape[0], key.shape[1], key.shape[2])
    error = (found.double() - expected).abs().max()
    assert error <= bound * expected.max().clamp_min(1), f"differs by up to {error:.2e}, of {expected.max():.2e}"
    return found


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(1, 33), (7, 65), (33, 33)])
def test_sums_over_queries_and_the_heads_of_a_group(inputs: Any, queries: int, keys: int, key_heads: int) -> None:
    found = compare(inputs(heads=4, key_heads=key_heads, queries=queries, keys=keys), causal=True)
    total = found.sum(-1)
    rows = queries * 4 / key_heads
    assert (total - rows).abs().max() < 1e-4 * rows, f"every row gives 1: {total.tolist()} of {rows}"


def test_all_see_all(inputs: Any) -> None:
    compare(inputs(queries=20, keys=35, width=80))


@pytest.mark.parametrize("last", [8, 100])
def test_only_the_last_queries_count(inputs: Any, last: int) -> None:
    found = compare(inputs(queries=37, keys=50), causal=True, last=last)
    assert abs(float(found.sum()) - 2 * min(last, 37)) < 1e-3


def test_windows_soft_caps_and_sinks(inputs: Any) -> None:
    tensors = inputs(queries=37, keys=50)
    compare(tensors, causal=True, window=9, bound=1e-5)
    compare(tensors, causal=True, softcap=2.0, bound=1e-5)
    found = compare(tensors, causal=True, sinks=torch.tensor([0.0, 3.0]), bound=1e-5)
    assert float(found.sum()) < 2 * 37 - 1, "sinks take their share"


@pytest.mark.parametrize("last", [None, 5])
def test_structures(inputs: Any, varied: Any, last: int | None) -> None:
    structure, arguments = varied
    rows, queries, keys = structure.shape
    found = compare(inputs(batch=rows, queries=queries, keys=keys), structure=arguments, last=last, bound=1e-5)
    seen = structure.dense()[:, :, -(last or queries) :].any(2).expand(rows, 1, -1)
    assert (found[~seen] == 0).all(), "what nobody sees, padding too, gets nothing"


@pytest.mark.parametrize("last", [None, 5])
def test_dense_masks(inputs: Any, last: int | None) -> None:
    mask = torch.rand(1, 2, 20, 35, generator=torch.Generator().manual_seed(1)) < 0.5
    compare(inputs(batch=2, queries=20, keys=35), mask=mask, last=last)
    bias = torch.randn(2, 1, 20, 35, generator=torch.Generator().manual_seed(1))
    compare(inputs(batch=2, queries=20, keys=35), mask=bias, last=last, bound=1e-5)


def test_half_precision(inputs: Any) -> None:
    compare(inputs(queries=33, keys=65, dtype=torch.float16), causal=True, bound=1e-3)


def test_compiled_graphs_do_not_break(inputs: Any) -> None:
    query, key, value = inputs(queries=5, keys=20)
    _, lse = attention(query, key, value, causal=True)
    compiled = torch.compile(column_sums, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, key, lse, causal=True), column_sums(query, key, lse, causal=True))


def test_wrong_input_is_refused(inputs: Any) -> None:
    query, key, _ = inputs(queries=5, keys=8)
    with pytest.raises(ValueError, match="lse must be float32 of shape"):
        column_sums(query, key, torch.zeros(1, 2, 4), causal=True)
    with pytest.raises(ValueError, match="last must be at least 1"):
        column_sums(query, key, torch.zeros(1, 2, 5), causal=True, last=0)
