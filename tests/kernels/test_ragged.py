"""Attention over segments: its definition against dense attention, and the quick way on a CPU against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.kernels import ragged_attention as module
from hf_ext.kernels.attention import attention_reference
from hf_ext.kernels.ragged_attention import ragged_attention_reference, ragged_attention_torch, ragged_decode_torch

LENGTHS = [[12, 3], [7, 20], [1, 0]]
BOTH = pytest.mark.parametrize("function", [ragged_attention_reference, ragged_attention_torch])


def flat(lengths: list[list[int]] = LENGTHS, queries: int = 1, group: int = 2, gap: int = 3) -> list[torch.Tensor]:
    """Return query, keys, values, starts and lengths in float64; what lies between segments is no number."""
    generator = torch.Generator().manual_seed(queries)
    counts = torch.tensor(lengths)
    places = counts.flatten() + gap
    starts = (places.cumsum(0) - places).view(counts.shape)
    rows, key_heads = counts.shape
    query = torch.randn(rows, key_heads * group, queries, 8, generator=generator, dtype=torch.float64)
    keys = torch.full((int(places.sum()), 8), torch.nan, dtype=torch.float64)
    values = torch.full((len(keys), 6), torch.nan, dtype=torch.float64)
    for start, count in zip(starts.flatten().tolist(), counts.flatten().tolist(), strict=True):
        keys[start : start + count] = torch.randn(count, 8, generator=generator, dtype=torch.float64)
        values[start : start + count] = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return [query, keys, values, starts, counts]


def dense(tensors: list[torch.Tensor], bias: torch.Tensor | None = None, **options: Any) -> Any:
    """Attend with every segment at the end of a row of 32 places, and a mask."""
    query, keys, values, starts, lengths = tensors
    rows, key_heads = starts.shape
    heads, queries = query.shape[1:3]
    shape = (rows, key_heads, 32)
    dense_keys, dense_values = keys.new_zeros(*shape, 8), values.new_zeros(*shape, 6)
    mask = keys.new_full((rows, heads, queries, 32), torch.finfo(keys.dtype).min)
    for row in range(rows):
        for head in range(key_heads):
            length = int(lengths[row, head])
            segment = slice(int(starts[row, head]), int(starts[row, head]) + length)
            dense_keys[row, head, 32 - length :] = keys[segment]
            dense_values[row, head, 32 - length :] = values[segment]
            for member in range(heads // key_heads):
                for place in range(queries):
                    seen = slice(32 - length, max(33 - queries + place, 32 - length))
                    added = 0.0 if bias is None else bias[segment][: seen.stop - seen.start]
                    mask[row, head * (heads // key_heads) + member, place, seen] = added
    return attention_reference(query, dense_keys, dense_values, mask=mask, **options)


def close(found: Any, expected: Any, bound: float = 1e-12) -> None:
    for name, a, b in zip(("out", "lse"), found, expected, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a.isneginf(), b.isneginf()), f"{name} is infinite elsewhere"
        difference = (a - b).nan_to_num(0, neginf=0).abs().max()
        assert not a.isnan().any(), f"{name} has NaN"
        assert difference < bound, f"{name} differs by up to {difference:.2e}"


@BOTH
@pytest.mark.parametrize("queries", [1, 4])
def test_segments_attend_as_a_dense_cache_with_a_mask_does(function: Any, queries: int) -> None:
    tensors = flat(queries=queries)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    bias = torch.rand(len(tensors[1]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given: list[dict[str, Any]] = [{}, {"scale": 0.7}, {"softcap": 1.5}, {"sinks": sinks}]
    for options in [
        *given,
        {"softcap": 1.5, "sinks": sinks, "scale": 2.0},
        {"bias": bias},
        {"bias": bias, "softcap": 1.0},
    ]:
        close(function(*tensors, **options), dense(tensors, **options))


@BOTH
def test_queries_in_one_go_are_those_of_one_after_the_other(function: Any) -> None:
    query, keys, values, starts, lengths = flat([[12, 5], [7, 20]], queries=4)
    out, lse = function(query, keys, values, starts, lengths)
    for place in range(4):
        one = function(query[:, :, place : place + 1], keys, values, starts, lengths - (3 - place))
        close((out[:, :, place : place + 1], lse[:, :, place : place + 1]), one)


@BOTH
def test_a_segment_that_sees_nothing_is_zero(function: Any) -> None:
    out, lse = function(*flat())
    assert (out[2, 2:] == 0).all()
    assert lse[2, 2:].isneginf().all()


@BOTH
def test_a_mass_of_two_is_an_entry_given_twice(function: Any) -> None:
    query, keys, values, starts, lengths = flat([[5]], gap=0)
    twice = torch.tensor([0, 1, 1, 1, 2, 3, 4])
    bias = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64).log()
    expected = function(query, keys[twice], values[twice], starts, lengths + 2)
    close(function(query, keys, values, starts, lengths, bias=bias), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_the_way_of_one_query_is_the_same(biased: bool) -> None:
    tensors = flat(queries=1)
    bias = torch.linspace(-1, 1, len(tensors[1]), dtype=tensors[1].dtype) if biased else None
    expected, lse = ragged_attention_reference(*tensors, scale=0.3, bias=bias)
    close((ragged_decode_torch(*tensors, scale=0.3, bias=bias), lse), (expected, lse))


def test_the_quick_way_takes_many_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = flat(queries=9)
    expected = ragged_attention_reference(*tensors)
    taken = []
    some = module._some
    monkeypatch.setattr(module, "_some", lambda query, *a: taken.append(query.shape[2]) or some(query, *a))
    monkeypatch.setattr(module, "LARGEST", 3 * 4 * 20 * 4)
    close(ragged_attention_torch(*tensors), expected)
    assert taken == [4, 4, 1]


def test_the_quick_way_in_half_precision_computes_in_float32() -> None:
    tensors = [*[tensor.bfloat16() for tensor in flat(queries=2)[:3]], *flat(queries=2)[3:]]
    wide = [*[tensor.float() for tensor in tensors[:3]], *tensors[3:]]
    out, lse = ragged_attention_torch(*tensors)
    expected, logs = ragged_attention_reference(*wide)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 1e-2
    assert (lse - logs).nan_to_num(0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: torch.zeros(5, 7)}, "query must be"),
        ({1: torch.zeros(5, 8).half()}, "one dtype"),
        ({3: torch.zeros(3, 3, dtype=torch.int64)}, "starts and lengths must be"),
        ({4: torch.zeros(3, 2)}, "lengths must be whole numbers"),
        ({2: torch.zeros(5, 6)}, "the same slots"),
    ],
)
def test_wrong_input_is_refused(changed: dict[int, torch.Tensor], message: str) -> None:
    tensors = [tensor.float() for tensor in flat()[:3]] + flat()[3:]
    for place, tensor in changed.items():
        tensors[place] = tensor
    with pytest.raises(ValueError, match=message):
        ragged_attention_torch(*tensors)
