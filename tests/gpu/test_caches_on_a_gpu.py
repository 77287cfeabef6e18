"""The kernels of caches, compiled and on a GPU, against float64. Run by `make gpu`.

Compiling takes nearly all the time, a second or more a kernel, and every width, dtype and set of options is a kernel of
its own. So each width meets each number of bits, and dtypes and options take turns: about a hundred kernels rather than
eight hundred.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.cache import H2O, KIVI, AdaKV, CachePolicy, CompressedCache, Knorm, SnapKV
from hf_ext.kernels.compaction import compact, compact_ragged, compact_ragged_reference, compact_reference
from hf_ext.kernels.merge_entries import merge_entries, merge_entries_reference
from hf_ext.kernels.packed_attention import packed_attention, packed_attention_reference
from hf_ext.kernels.packing import quantise_keys, quantise_values
from hf_ext.kernels.ragged_attention import ragged_attention, ragged_attention_reference
from hf_ext.testing import tiny_models
from hf_ext.testing.cache_base import positions

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
#: Each width with one dtype, and each dtype with some width.
TURNS = [(64, torch.float32), (80, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]
WIDTHS = pytest.mark.parametrize(("width", "dtype"), TURNS, ids=str)


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU; `make gpu` runs them"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(found: Any, expected: Any, bound: float) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert not a.isnan().any(), f"result {number} has NaN"
        assert torch.equal(a.isinf(), b.isinf()), f"result {number} is infinite elsewhere"
        largest = b.nan_to_num(0, neginf=0).abs().max().clamp_min(1)
        error = (a.double() - b).nan_to_num(0, neginf=0).abs().max()
        assert error <= bound * largest, f"result {number} differs by up to {error:.2e}, of values up to {largest:.2e}"


def cache(dtype: torch.dtype, entries: int, width: int) -> list[torch.Tensor]:
    """Return keys, values that lie tokens first, codes, positions, scores and flags."""
    keys, values = random(3, 4, entries, width), random(3, entries, 4, width // 2).transpose(1, 2)
    positions = torch.arange(entries).expand(3, 4, -1)
    codes = (random(3, 4, entries, 24) * 20).to(torch.uint8)
    made = [keys.to(dtype), values.to(dtype), codes, positions, keys[..., 0], keys[..., 0] > 0]
    return [tensor.cuda() for tensor in made]


@pytest.mark.parametrize(("width", "dtype"), [*TURNS, (512, torch.float16)], ids=str)
def test_compaction_is_bit_for_bit_that_of_the_index(dtype: torch.dtype, width: int) -> None:
    for entries, kept in ((1, 1), (1000, 333), (4096, 4096)):
        tensors = cache(dtype, entries, width)
        index = torch.rand(3, 4, entries, device="cuda").topk(kept).indices.sort(-1).values
        index[1, 2, kept // 2 :] = -1
        for number, (a, b) in enumerate(zip(compact(tensors, index), compact_reference(tensors, index), strict=True)):
            assert torch.equal(a, b), f"tensor {number} of {entries} entries"
        lengths = torch.randint(0, kept + 1, (3, 4), device="cuda")
        found = compact_ragged(tensors, index, lengths)
        expected = compact_ragged_reference(tensors, index, lengths)
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(a, b), f"tensor {number} of {entries} entries, ragged"


@WIDTHS
def test_ragged_attention(dtype: torch.dtype, width: int) -> None:
    lengths = torch.tensor([[5000, 3], [700, 64], [0, 1]])
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view(3, 2)
    slots = int(lengths.sum())
    flat = [random(slots, width).to("cuda", dtype), random(slots, width, seed=1).to("cuda", dtype)]
    bias = torch.rand(slots, device="cuda")
    sinks = torch.randn(8, device="cuda")
    capped = {"softcap": 4.0, "sinks": sinks, "scale": 0.2}
    for queries, given in ((1, ({}, {"bias": bias}, capped)), (7, ({"bias": bias},)), (40, (capped,))):
        query = random(3, 8, queries, width).to("cuda", dtype)
        tensors = [query, *flat, starts.cuda(), lengths.cuda()]
        double = [tensor.double() for tensor in tensors[:3]] + tensors[3:]
        for options in given:
            found = ragged_attention(*tensors, **options)
            close(found, ragged_attention_reference(*double, **options), BOUNDS[dtype])


@WIDTHS
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_attention(bits: int, width: int, dtype: torch.dtype) -> None:
    # Lengths make no new kernels; groups, options and the number of queries do.
    capped, biased = {"visible", "softcap"}, {"bias"}
    for lengths, group, queries, names in (
        ((32, 4096, 0), 32, 1, set()),
        ((4096,), 32, 1, capped),
        ((4096,), 32, 9, biased),
        ((999,), 27, 1, biased),
        ((2048,), 128, 9, set()),
    ):
        for tokens in lengths:
            keys, values = (random(2, 2, tokens, width, seed=seed).to("cuda", dtype) for seed in (0, 1))
            packed = (*quantise_keys(keys, bits, group), *quantise_values(values, bits, 16))
            visible = torch.rand(2, 2, tokens, device="cuda") < 0.7
            whole = {"visible": visible, "softcap": 4.0, "bias": torch.rand_like(visible, dtype=torch.float)}
            options = {name: whole[name] for name in names}
            query = random(2, 8, queries, width).to("cuda", dtype)
            found = packed_attention(query, *packed, bits=bits, **options)
            expected = packed_attention_reference(query.double(), *packed, bits=bits, **options)
            close(found, expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_packed_attention_in_every_dtype(dtype: torch.dtype) -> None:
    test_packed_attention(4, 128, dtype)


@WIDTHS
def test_merging_entries(dtype: torch.dtype, width: int) -> None:
    for entries, count in ((1, 1), (1000, 300), (4096, 10), (50, 200)):
        sets = torch.randint(0, count, (2, 3, entries), device="cuda").sort(-1).values
        sets = sets.masked_fill(torch.rand(2, 3, entries, device="cuda") < 0.2, -1)
        keys, values = (random(2, 3, entries, width, seed=seed).to("cuda", dtype) for seed in (0, 1))
        weights = torch.rand(2, 3, entries, device="cuda") + 0.01
        masses = torch.randint(1, 5, (2, 3, entries), device="cuda").float()
        found = merge_entries(keys, values, weights, sets, count, masses=masses)
        expected = merge_entries_reference(keys.double(), values.double(), weights, sets, count, masses=masses)
        close(found, expected, BOUNDS[dtype])


POLICIES = [
    Knorm(budget=6), SnapKV(budget=6, window=2, when="both"), H2O(budget=6), AdaKV(policy=Knorm(), budget=6),
    KIVI(bits=8, group=4, residual=4),
]  # fmt: skip


@pytest.mark.parametrize("offloading", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_cache_holds_and_gives_what_it_does_on_the_cpu(policy: CachePolicy, offloading: bool) -> None:
    """Chunks, steps and padding, through the kernels."""
    ids, mask = tiny_models.prompts((21, 14))
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_models.build("llama", head_dim=16).to(device)
        model.set_attn_implementation("hf_ext")
        cache = CompressedCache(model.config, policy, offloading=offloading and device == "cuda")
        logits, start = [], 0
        for count in (9, 1, 6, 1, 1, 3):
            stop = start + count
            given = (ids[:, start:stop], mask[:, :stop], positions(mask[:, :stop], count))
            part, seen, where = (tensor.to(device) for tensor in given)
            with torch.no_grad():
                out = model(part, attention_mask=seen, position_ids=where, past_key_values=cache)
            logits.append(out.logits.cpu())
            start = stop
        found.append((torch.cat(logits, dim=1)[mask.bool()], [cache.columns(layer).cpu() for layer in range(2)]))
    # A code that lies between two may become either.
    close([found[1][0]], [found[0][0].double()], 5e-2 if isinstance(policy, KIVI) else 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Entries behind 2^31 numbers must be read there."""
    room = torch.zeros(2**31 + 2**22, dtype=torch.float16, device="cuda")
    keys = room.view(-1, 64)
    starts = torch.tensor([[0, len(keys) - 300]], device="cuda")
    lengths = torch.tensor([[200, 300]], device="cuda")
    for start, length in ((0, 200), (len(keys) - 300, 300)):
        keys[start : start + length] = random(length, 64).half().cuda()
    query = random(1, 4, 1, 64).half().cuda()
    found = ragged_attention(query, keys, keys, starts, lengths)
    few = torch.cat([keys[:200], keys[-300:]]).double()
    starts = torch.tensor([[0, 200]], device="cuda")
    close(found, ragged_attention_reference(query.double(), few, few, starts, lengths), BOUNDS[torch.float16])
    rows = room[: 2 * (len(room) // 128) * 64].view(2, 1, -1, 64)
    index = torch.tensor([[[5]], [[rows.shape[2] - 7]]], device="cuda")
    assert torch.equal(compact((rows,), index)[0], compact_reference((rows,), index)[0])


def test_the_same_twice_is_the_same_bit_for_bit() -> None:
    keys, values = random(2, 2, 4096, 128).cuda().half(), random(2, 2, 4096, 128, seed=1).cuda().half()
    query = random(2, 8, 1, 128).cuda().half()
    packed = (*quantise_keys(keys, 4, 32), *quantise_values(values, 4, 32))
    sets = torch.arange(4096, device="cuda").div(3, rounding_mode="floor").expand(2, 2, -1)
    weights = torch.rand(2, 2, 4096, device="cuda")
    segments = torch.tensor([[0, 1000], [5000, 6000]], device="cuda"), torch.full((2, 2), 900, device="cuda")
    flat = keys.flatten(0, 2), values.flatten(0, 2)
    for function in (
        lambda: packed_attention(query, *packed, bits=4),
        lambda: merge_entries(keys, values, weights, sets, 1366),
        lambda: ragged_attention(query, *flat, *segments),
    ):
        for first, second in zip(function(), function(), strict=True):
            assert torch.equal(first, second)


def test_another_length_compiles_nothing_new() -> None:
    from hf_ext.kernels import compaction, packed_kernel

    def compiled() -> int:
        kernels = (compaction._compact, packed_kernel._packed)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def go(tokens: int) -> None:
        keys = random(1, 2, tokens, 64).cuda().half()
        compact((keys, keys[..., 0]), torch.arange(tokens - 3, device="cuda").expand(1, 2, -1))
        packed = (*quantise_keys(keys, 4, 32), *quantise_values(keys, 4, 32))
        packed_attention(keys[:, :, :1], *packed, bits=4)

    go(1024)
    before = compiled()
    for tokens in (2048, 992, 96):
        go(tokens)
    assert compiled() == before


def test_compiled_graphs_do_not_break() -> None:
    keys = random(1, 2, 256, 64).cuda().half()
    packed = (*quantise_keys(keys, 4, 32), *quantise_values(keys, 4, 32))
    segments = torch.tensor([[0, 256]], device="cuda"), torch.tensor([[256, 256]], device="cuda")

    def attend(query: torch.Tensor) -> torch.Tensor:
        flat = keys.flatten(0, 2)
        return packed_attention(query, *packed, bits=4)[0] + ragged_attention(query, flat, flat, *segments)[0]

    query = random(1, 4, 1, 64).cuda().half()
    close([torch.compile(attend, fullgraph=True)(query)], [attend(query).double()], BOUNDS[torch.float16])
