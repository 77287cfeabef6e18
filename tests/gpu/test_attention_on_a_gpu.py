"""The attention kernels, compiled and on a GPU, against float64. Run by `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.attention import AttentionStructure
from hf_ext.attention.blocks import kernel_arguments
from hf_ext.kernels.attention import attention, attention_reference
from hf_ext.kernels.column_sums import column_sums, column_sums_reference
from hf_ext.kernels.decode_attention import decode_attention, decode_attention_reference

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU; `make gpu` runs them"


def tensors(
    dtype: torch.dtype, queries: int, keys: int, width: int = 64, heads: int = 4, key_heads: int = 2, batch: int = 2,
    value_width: int | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(queries + keys + width)
    sizes = ((heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width or width))
    made = [torch.randn(batch, n, h, d, generator=generator) for h, n, d in sizes]
    return [tensor.to("cuda", dtype).transpose(1, 2) for tensor in made]


def close(name: str, found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert not found.isnan().any(), f"{name} has NaN"
    assert torch.equal(found.isinf(), expected.isinf()), f"{name} is infinite elsewhere"
    largest = expected.nan_to_num(0, neginf=0).abs().max().clamp_min(1)
    error = (found.double() - expected).nan_to_num(0).abs().max()
    assert error <= bound * largest, f"{name} differs by up to {error:.2e}, of values up to {largest:.2e}"


def compare(inputs: list[torch.Tensor], **options: Any) -> None:
    """Hold both results and all gradients against float64."""
    bound = BOUNDS[inputs[0].dtype]
    results = []
    for function, kind in ((attention, None), (attention_reference, torch.float64)):
        leaves = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in inputs]
        given = dict(options)
        if given.get("sinks") is not None:
            given["sinks"] = given["sinks"].detach().to(kind or torch.float32).requires_grad_()
            leaves.append(given["sinks"])
        out, lse = function(*leaves[:3], **given)
        generator = torch.Generator("cuda").manual_seed(1)
        grad = torch.randn(out.shape, generator=generator, device="cuda").to(inputs[0].dtype)
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for name, found, expected in zip(("out", "lse", "query", "key", "value", "sinks"), *results, strict=False):
        close(name, found, expected, bound)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 192, 256])
def test_causal_attention(dtype: torch.dtype, width: int) -> None:
    for queries, keys in ((1, 1), (7, 200), (129, 300), (333, 333)):
        compare(tensors(dtype, queries, keys, width), causal=True)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_options(dtype: torch.dtype, key_heads: int) -> None:
    inputs = tensors(dtype, 257, 400, 128, key_heads=key_heads)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda")
    compare(inputs)
    compare(inputs, causal=True, window=100)
    compare(inputs, causal=True, softcap=5.0)
    compare(inputs, causal=True, sinks=sinks)
    compare(inputs, causal=True, softcap=5.0, sinks=sinks, window=64, scale=0.2)
    compare(tensors(dtype, 257, 400, 64, key_heads=key_heads, value_width=128), causal=True)


def structures() -> dict[str, AttentionStructure]:
    tokens = 500
    column = torch.arange(tokens)[None]
    mask = (column >= torch.tensor([[0], [150]])).int()
    plain = AttentionStructure.causal(mask)
    segments = torch.where((column >= 40) & (column < 440), (column - 40) // 80 + 1, 0)
    return {
        "padding": plain,
        "window": plain.windowed(130),
        "segments": plain.segments(segments.expand(2, -1)),
        "documents": plain.documents(column.expand(2, -1) // 170 + 1),
        "prefix": plain.spans((column < 260).int().expand(2, -1)),
        "tree": AttentionStructure.tree(mask, [[(node - 1) // 2 for node in range(40)]] * 2),
        "tree of many": AttentionStructure.tree(mask, [[(node - 1) // 2 for node in range(100)]] * 2),
    }


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("name", list(structures()))
def test_structures(name: str, dtype: torch.dtype) -> None:
    structure = structures()[name].to("cuda")
    _, queries, keys = structure.shape
    inputs = tensors(dtype, queries, keys, 128)
    compare(inputs, structure=kernel_arguments(structure))
    _, lse = attention(*inputs, structure=structure)
    double = [tensor.double() for tensor in inputs]
    _, exact = attention_reference(*double, structure=structure)
    for last in (None, 20):
        found = column_sums(*inputs[:2], lse, structure=structure, last=last)
        expected = column_sums_reference(*double[:2], exact, structure=structure, last=last)
        close("column sums", found, expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_dense_masks(dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 200, 300, device="cuda") < 0.5
    mask[:, :, 7] = False
    compare(tensors(dtype, 200, 300), mask=mask)
    compare(tensors(dtype, 200, 300), mask=torch.randn(1, 4, 200, 300, device="cuda", dtype=dtype))


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_decoding(dtype: torch.dtype, width: int) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda")
    for queries, keys in ((1, 1), (1, 3000), (5, 3000), (64, 1000)):
        inputs = tensors(dtype, queries, keys, width)
        double = [tensor.double() for tensor in inputs]
        for options in ({}, {"window": 100}, {"softcap": 4.0, "sinks": sinks}):
            found = decode_attention(*inputs, causal=True, columns=True, **options)
            expected = decode_attention_reference(*double, causal=True, columns=True, **options)
            for name, a, b in zip(("out", "lse", "columns"), found, expected, strict=True):
                close(name, a, b, BOUNDS[dtype])


@pytest.mark.parametrize("name", ["tree", "tree of many"])
def test_trees_are_verified_by_decoding(name: str) -> None:
    structure = structures()[name].to("cuda")
    _, queries, keys = structure.shape
    inputs = tensors(torch.bfloat16, queries, keys, 128)
    found = decode_attention(*inputs, structure=structure, columns=True)
    expected = decode_attention_reference(*[t.double() for t in inputs], structure=structure, columns=True)
    for what, a, b in zip(("out", "lse", "columns"), found, expected, strict=True):
        close(what, a, b, BOUNDS[torch.bfloat16])


def test_offsets_beyond_two_to_the_31() -> None:
    """A batch whose second row begins behind 2^31 numbers: it must be read there."""
    room = torch.empty(2**31 + 2**22, dtype=torch.float16, device="cuda")
    inputs = []
    for start in (0, 2**20, 2**21):
        made = torch.as_strided(room, (2, 2, 200, 64), (2**31, 200 * 64, 64, 1), start)
        inputs.append(made.copy_(torch.randn(2, 2, 200, 64)))
    compare(inputs, causal=True)


def test_the_same_twice_is_the_same_bit_for_bit() -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(torch.bfloat16, 700, 900, 128)]
    runs = []
    for _ in range(2):
        out, lse = attention(*inputs, causal=True)
        sums = column_sums(*inputs[:2], lse, causal=True)
        runs.append([out, lse, sums, *torch.autograd.grad(out.sum(), inputs)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_another_length_compiles_nothing_new() -> None:
    from hf_ext.kernels import attention as module

    def compiled() -> int:
        return sum(len(caches[0]) for caches in module._forward.device_caches.values())

    attention(*tensors(torch.float16, 1000, 1000), causal=True)
    before = compiled()
    for length in (1024, 999, 517, 4096):
        attention(*tensors(torch.float16, length, length), causal=True)
    assert compiled() == before


def test_compiled_graphs_do_not_break() -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(torch.bfloat16, 300, 300)]

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, causal=True)[0].float().square().sum()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for a, b in zip(found, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        close("gradient", a, b.double(), BOUNDS[torch.bfloat16])


def test_memory_of_column_sums_grows_with_the_length() -> None:
    taken = []
    for tokens in (4096, 8192):
        query, key, value = tensors(torch.bfloat16, tokens, tokens, batch=1)
        _, lse = attention(query, key, value, causal=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        column_sums(query, key, lse, causal=True)
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert taken[1] <= 3 * max(taken[0], 2**16), taken
