"""Few queries over keys split among programs, against the whole matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.attention import AttentionStructure
from hf_ext.attention.blocks import kernel_arguments
from hf_ext.kernels import decode_attention as module
from hf_ext.kernels.decode_attention import count_splits, decode_attention, decode_attention_reference
from hf_ext.kernels.merge import launch_merge, merge_reference


def compare(tensors: list[torch.Tensor], bound: float = 2e-6, **options: Any) -> None:
    found = decode_attention(*tensors, columns=True, **options)
    double = [tensor.double() for tensor in tensors]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].double()
    expected = decode_attention_reference(*double, columns=True, **options)
    for name, a, b in zip(("out", "lse", "columns"), found, expected, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} has NaN"
        assert torch.equal(a.isinf(), b.isinf()), f"{name} is infinite elsewhere"
        error = (a.double() - b).nan_to_num(0).abs().max()
        largest = b.nan_to_num(0, neginf=0).abs().max().clamp_min(1)
        assert error <= bound * largest, f"{name} differs by up to {error:.2e}, of {largest:.2e}"


@pytest.mark.parametrize("splits", [1, 3, 40])
def test_splits_change_nothing(inputs: Any, splits: int) -> None:
    compare(inputs(batch=2, queries=1, keys=77), causal=True, splits=splits)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [1, 9])
def test_queries_of_a_group_are_worked_on_together(inputs: Any, queries: int, key_heads: int) -> None:
    compare(inputs(heads=4, key_heads=key_heads, queries=queries, keys=50, width=80), causal=True)


@pytest.mark.parametrize("window", [1, 10, 33])
def test_windows(inputs: Any, window: int) -> None:
    compare(inputs(queries=3, keys=65), causal=True, window=window)


def test_soft_caps_sinks_and_other_widths(inputs: Any) -> None:
    tensors = inputs(batch=2, queries=3, keys=50, width=48, value_width=64)
    compare(tensors, causal=True, softcap=2.0, bound=1e-5)
    compare(tensors, causal=True, sinks=torch.tensor([1.0, -2.0]))
    compare(tensors)


def test_structures(inputs: Any, varied: Any) -> None:
    structure, arguments = varied
    _, queries, keys = structure.shape
    rows, wide = structure.shape[0], kernel_arguments(structure, 128)
    compare(inputs(batch=rows, queries=queries, keys=keys), structure=wide, splits=2, bound=1e-5)
    if queries > arguments.size:
        with pytest.raises(ValueError, match="needs kernel arguments of that size"):
            decode_attention(*inputs(batch=2, queries=queries, keys=keys), structure=arguments)


def test_a_tree_over_a_long_padded_context(inputs: Any) -> None:
    context = torch.ones(2, 100)
    context[1, :70] = 0
    tree = AttentionStructure.tree(context, [[-1, 0, 0, 1, -1]] * 2)
    compare(inputs(batch=2, queries=5, keys=105), structure=kernel_arguments(tree, 32))


def test_dense_masks(inputs: Any) -> None:
    mask = torch.rand(2, 2, 3, 50, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[1, 0, 2] = False
    compare(inputs(batch=2, queries=3, keys=50), mask=mask)
    compare(inputs(batch=2, queries=3, keys=50), mask=torch.randn(1, 1, 3, 50), bound=1e-5)


def test_half_precision(inputs: Any) -> None:
    compare(inputs(queries=2, keys=65, dtype=torch.float16), causal=True, bound=2e-3)
    compare(inputs(queries=2, keys=65, dtype=torch.bfloat16), causal=True, bound=1.6e-2)


def test_columns_are_made_only_when_asked_for(inputs: Any) -> None:
    assert len(decode_attention(*inputs(queries=1, keys=20), causal=True)) == 2


@pytest.mark.parametrize("splits", [1, 16, 37])
def test_merging(splits: int) -> None:
    generator = torch.Generator().manual_seed(splits)
    parts = torch.randn(2, 2, 3, splits, 40, generator=generator)
    part_lse = torch.randn(2, 2, 3, splits, generator=generator) * 4
    part_lse[0, 0, 0] = -torch.inf
    parts[0, 0, 0] = 0
    for sinks in (None, torch.tensor([0.5, -1.0])):
        out, lse = parts.new_empty(2, 2, 3, 40), parts.new_empty(2, 2, 3)
        launch_merge(parts, part_lse, sinks, out, lse)()
        expected, logs = merge_reference(parts.double(), part_lse.double(), sinks)
        assert (out - expected).abs().max() < 1e-5, f"differs by up to {(out - expected).abs().max():.2e}"
        assert torch.equal(lse.isinf(), logs.isinf())
        assert (lse - logs).nan_to_num(0).abs().max() < 1e-5


def test_compiled_graphs_do_not_break(inputs: Any) -> None:
    tensors = inputs(queries=1, keys=20)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*tensors, causal=True), decode_attention(*tensors, causal=True), strict=True):
        assert torch.equal(a, b)


def test_there_is_no_gradient_and_it_says_so(inputs: Any) -> None:
    query, key, value = inputs(queries=1, keys=20)
    out, _ = decode_attention(query.requires_grad_(), key, value, causal=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


def test_keys_are_split_as_far_as_the_device_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_processors", lambda index: 132)
    device = torch.device("cuda", 0)
    assert count_splits(8, 100_000, 64, device) == 33
    assert count_splits(264, 100_000, 64, device) == 1
    assert count_splits(8, 1000, 64, device) == 4
    assert count_splits(1, 10_000_000, 64, device) == 128


def test_wrong_input_is_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="at most 128 queries, got 129"):
        decode_attention(*inputs(queries=129, keys=129), causal=True)
    with pytest.raises(ValueError, match="splits must be at least 1"):
        decode_attention(*inputs(queries=1, keys=9), causal=True, splits=0)
