"""References of the operations of caches, and what is quick on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.kernels import packed_torch as module
from hf_ext.kernels.attention import attention_reference
from hf_ext.kernels.compaction import compact_ragged_reference, compact_reference
from hf_ext.kernels.merge import merge_two
from hf_ext.kernels.merge_entries import merge_entries_reference, set_bounds
from hf_ext.kernels.packed_attention import packed_attention_reference, packed_attention_torch
from hf_ext.kernels.packing import dequantise_keys, dequantise_values, quantise_keys, quantise_values

BOTH = pytest.mark.parametrize("function", [packed_attention_reference, packed_attention_torch])


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def close(found: Any, expected: Any, bound: float = 1e-12) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, number
        assert not a.isnan().any(), f"result {number} has NaN"
        assert torch.equal(a.isneginf(), b.isneginf()), f"result {number} is infinite elsewhere"
        difference = (a - b).nan_to_num(0, neginf=0).abs().max()
        assert difference < bound, f"result {number} differs by up to {difference:.2e}"


# Compaction


@pytest.mark.parametrize(
    "tensor",
    [
        random(2, 3, 9, 4),
        random(2, 9, 3, 4).transpose(1, 2),
        random(2, 3, 20, 4)[:, :, 5:14],
        random(3, 2, 9, 5).transpose(0, 1)[..., 1:],
        random(2, 3, 9, 4, 2).mT,
        random(1, 3, 9, 4).expand(2, 3, 9, 4),
        random(2, 3, 9),
        torch.arange(54).view(2, 9, 3).transpose(1, 2),
        random(2, 3, 9) > 0,
    ],
    ids=range(9),
)
def test_compaction_takes_what_the_index_names_however_it_lies_in_memory(tensor: torch.Tensor) -> None:
    index = torch.tensor([[[0, 3, 8], [1, 2, -1], [-1, -1, -1]], [[4, 5, 6], [0, 8, -1], [7, -1, -1]]])
    (found,) = compact_reference((tensor,), index)
    lengths = torch.tensor([[3, 2, 0], [1, 3, 1]])
    (flat,) = compact_ragged_reference((tensor,), index, lengths)
    nothing = -1 if tensor.dtype == torch.int64 else 0
    expected = []
    for row in range(2):
        for head in range(3):
            for place in range(3):
                at = int(index[row, head, place])
                entry = torch.full_like(tensor[0, 0, 0], nothing) if at < 0 else tensor[row, head, at]
                assert torch.equal(found[row, head, place], entry), (row, head, place)
                if place < lengths[row, head]:
                    expected.append(entry)
    assert torch.equal(flat, torch.stack(expected))


def test_compaction_refuses_what_does_not_fit() -> None:
    keys, index = random(2, 3, 9, 4), torch.zeros(2, 3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="with the rows and heads"):
        compact_reference((keys, keys[:, :, :8]), index)
    with pytest.raises(ValueError, match="at least one tensor"):
        compact_reference((), index)
    with pytest.raises(ValueError, match="lengths must be from 0 to the 5 entries of the index, got 0 to 6"):
        compact_ragged_reference((keys,), index, torch.tensor([[0, 1, 2], [3, 4, 6]]))


# Packed attention


def packed(
    bits: int = 4, tokens: int = 48, group: int = 8, queries: int = 2, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    query = random(2, 4, queries, 16, dtype=torch.float64).to(dtype)
    keys, values = random(2, 2, tokens, 16).to(dtype), random(2, 2, tokens, 24).to(dtype)
    return [query, *quantise_keys(keys, bits, group), *quantise_values(values, bits, 12)]


@BOTH
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_attention_is_attention_to_what_was_packed(bits: int, function: Any) -> None:
    query, *tensors = packed(bits)
    keys = dequantise_keys(*tensors[:3], bits=bits)
    values = dequantise_values(*tensors[3:], bits=bits)
    close(function(query, *tensors, bits=bits), attention_reference(query, keys, values))
    close(
        function(query, *tensors, bits=bits, softcap=1.5, scale=0.7),
        attention_reference(query, keys, values, softcap=1.5, scale=0.7),
    )


@BOTH
def test_hidden_packed_entries_are_not_seen(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 4 * 24 * 16)
    query, *tensors = packed()
    visible = torch.rand(2, 2, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[0, :, :40] = False
    visible[1, 0] = False
    keys, values = dequantise_keys(*tensors[:3], bits=4), dequantise_values(*tensors[3:], bits=4)
    mask = visible.repeat_interleave(2, 1)[:, :, None].expand(2, 4, 2, 48)
    found = function(query, *tensors, bits=4, visible=visible)
    close(found, attention_reference(query, keys, values, mask=mask))
    assert (found[0][1, :2] == 0).all()
    bias = random(2, 2, 48)
    added = torch.where(mask, bias.repeat_interleave(2, 1)[:, :, None], torch.finfo(torch.float64).min)
    found = function(query, *tensors, bits=4, visible=visible, bias=bias)
    close(found, attention_reference(query, keys, values, mask=added))


@pytest.mark.parametrize("tokens", [0, 8, 40, 48])
def test_blocks_of_tokens_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = packed(tokens=tokens)
    expected = packed_attention_reference(*tensors, bits=4)
    for largest in (1, 250, 4 * 24 * 16, 2**20):  # with 250 the last blocks of a head, and of all tokens, are smaller
        monkeypatch.setattr(module, "LARGEST", largest)
        close(packed_attention_torch(*tensors, bits=4), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("width", "group"), [(48, 8), (48, 16), (48, 24), (48, 48), (80, 20)])
def test_groups_of_channels_need_not_go_with_the_planes_of_bytes(bits: int, width: int, group: int) -> None:
    query, *keys = packed(bits)[:4]
    values = quantise_values(random(2, 2, 48, width), bits, group)
    close(
        packed_attention_torch(query, *keys, *values, bits=bits),
        packed_attention_reference(query, *keys, *values, bits=bits),
    )


def test_parts_of_larger_stores_are_read_where_they_are() -> None:
    query, *tensors = packed()
    cut = [tensor[:, :, : tensor.shape[2] * 2 // 3] for tensor in tensors]
    close(packed_attention_torch(query, *cut, bits=4), packed_attention_reference(query, *cut, bits=4))


def test_the_quick_way_in_half_precision_computes_in_float32() -> None:
    tensors = packed(dtype=torch.bfloat16)
    out, lse = packed_attention_torch(*tensors, bits=4)
    expected = packed_attention_reference(tensors[0].double(), *tensors[1:], bits=4)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    close((out.double(), lse.double()), expected, 2e-2)
    close((lse.double(),), expected[1:], 1e-5)


def test_packed_and_recent_entries_merge_to_attention_over_both() -> None:
    query, keys, values = random(1, 4, 3, 16), random(1, 2, 20, 16), random(1, 2, 20, 24)
    expected = attention_reference(query, keys, values, causal=True)
    old = quantise_keys(keys[:, :, :16], 8, 1), quantise_values(values[:, :, :16], 8, 1)  # groups of one are exact
    recent = attention_reference(query, keys[:, :, 16:], values[:, :, 16:], causal=True)
    found = merge_two(*packed_attention_torch(query, *old[0], *old[1], bits=8), *recent)
    close(found, expected)


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = random(2, 3, 4), random(2, 3)
    nothing, minus = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    close(merge_two(out, lse, nothing, minus), (out, lse))
    close(merge_two(nothing, minus, out, lse), (out, lse))
    close(merge_two(nothing, minus, nothing, minus), (nothing, minus))


def test_packed_attention_refuses_what_does_not_fit() -> None:
    query, *tensors = packed()
    for changed, message in (
        ({1: tensors[0][..., :4]}, "do not go with 4 heads of width 16"),
        ({1: tensors[0].int()}, "codes must be uint8"),
        ({2: tensors[1][:, :, :5]}, "tokens / group"),
        ({5: tensors[4][:, :1]}, "scale and zero of values"),
        ({4: tensors[3][:, :, :9]}, "with the same tokens"),
    ):
        given = [query, *tensors]
        for place, tensor in changed.items():
            given[place] = tensor
        with pytest.raises(ValueError, match=message):
            packed_attention_torch(*given, bits=4)


# Merging entries


def test_merging_identical_entries_loses_nothing() -> None:
    """With the logarithm of their mass added, attention to what is merged is attention to what was there."""
    query, keys, values = random(1, 2, 3, 16), random(1, 2, 6, 16), random(1, 2, 6, 24)
    sets = torch.tensor([[[0, 1, 1, 2, 3, 3, 3, 4, 5], [0, 0, 0, 0, 1, 2, 3, 4, 5]]])
    at = sets[..., None]
    many = keys.gather(2, at.expand(-1, -1, -1, 16)), values.gather(2, at.expand(-1, -1, -1, 24))
    weights = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    merged_keys, merged_values, masses = merge_entries_reference(*many, weights, sets, 6)
    close((merged_keys, merged_values), (keys, values))
    bias = masses.log()[:, :, None].expand(1, 2, 3, 6)
    found = attention_reference(query, merged_keys, merged_values, mask=bias)
    close(found, attention_reference(query, *many))


def test_merging_twice_counts_all_that_were_merged() -> None:
    keys = random(1, 1, 6, 4)
    ones = torch.ones(1, 1, 6)
    first = merge_entries_reference(keys, keys, ones, torch.tensor([[[0, 0, 1, 2, 2, 2]]]), 3)
    again = merge_entries_reference(*first[:2], first[2], torch.tensor([[[0, 0, -1]]]), 1, masses=first[2])
    close((again[0][0, 0, 0],), (keys[0, 0, :3].mean(0),))
    assert again[2].tolist() == [[[3.0]]]


def test_merging_keeps_the_dtype_and_computes_in_float32() -> None:
    keys = torch.full((1, 1, 4096, 2), 1.0, dtype=torch.bfloat16)
    found, _, masses = merge_entries_reference(keys, keys, torch.ones(1, 1, 4096), torch.zeros(1, 1, 4096).long(), 1)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[[[1.0, 1.0]]]]
    assert masses.tolist() == [[[4096.0]]]


def test_sets_begin_and_end_where_their_entries_do() -> None:
    sets = torch.tensor([[[-1, 0, 0, -1, 2, 3], [1, 1, 1, 1, 1, -1]]])
    for row, bounds in zip(sets[0], set_bounds(sets, 4)[0], strict=True):
        for number in range(4):
            inside = torch.zeros(6, dtype=torch.bool)
            inside[bounds[number] : bounds[number + 1]] = True
            assert torch.equal((row == number) & inside, row == number), (row, number)


def test_merging_refuses_what_does_not_fit() -> None:
    keys, weights, sets = random(1, 2, 5, 4), torch.ones(1, 2, 5), torch.zeros(1, 2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="of one dtype with the same entries"):
        merge_entries_reference(keys, keys[:, :, :4], weights, sets, 1)
    with pytest.raises(ValueError, match="weights must have the shape"):
        merge_entries_reference(keys, keys, weights[..., :4], sets, 1)
    with pytest.raises(ValueError, match="sets must be whole numbers"):
        merge_entries_reference(keys, keys, weights, weights, 1)
