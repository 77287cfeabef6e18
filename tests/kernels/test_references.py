"""References, configurations, and what kernels say where they cannot run."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from hf_ext.attention import AttentionStructure
from hf_ext.kernels import configs
from hf_ext.kernels.attention import attention, attention_reference
from hf_ext.kernels.column_sums import column_sums_reference
from hf_ext.kernels.compaction import compact, compact_ragged
from hf_ext.kernels.merge_entries import merge_entries
from hf_ext.kernels.packed_attention import packed_attention
from hf_ext.kernels.packing import quantise_keys, quantise_values
from hf_ext.kernels.ragged_attention import ragged_attention


def tensors(heads: int = 4, key_heads: int = 2, queries: int = 9, keys: int = 14) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    return [torch.randn(2, *shape, 16, generator=generator, dtype=torch.float64) for shape in shapes]


def test_the_reference_is_the_attention_of_torch() -> None:
    query, key, value = tensors()
    mask = torch.ones(9, 14, dtype=torch.bool).tril(5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    for options in (
        {"causal": True},
        {"mask": mask[None, None]},
        {"mask": torch.zeros(9, 14).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]},
        {"structure": AttentionStructure.causal(torch.ones(1, 14)).part(5, 14)},
    ):
        found, _ = attention_reference(query, key, value, **options)
        assert (found - expected).abs().max() < 1e-12, f"{options}: {(found - expected).abs().max():.2e}"


def test_a_sink_is_a_key_whose_value_is_zero() -> None:
    query, key, value = tensors(key_heads=4)
    query = query.clone()
    query[..., -1] = 0
    key, value = key.clone(), value.clone()
    key[..., -1] = 0
    # The last number is 0 everywhere but in the sink's key, and there times 1 it is the sink's score.
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    longer = torch.cat([query[..., :-1], torch.ones_like(query[..., :1])], -1)
    sink = torch.zeros(2, 4, 1, 16, dtype=torch.float64)
    sink[..., 0, -1] = sinks
    found, lse = attention_reference(query, key, value, scale=1.0, sinks=sinks)
    keys, values = torch.cat([key, sink], 2), torch.cat([value, torch.zeros_like(sink)], 2)
    expected, logs = attention_reference(longer, keys, values, scale=1.0)
    assert (found - expected).abs().max() < 1e-12
    assert (lse - logs).abs().max() < 1e-12


def test_rows_that_see_nothing_are_zero_and_get_no_gradient() -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors()]
    mask = torch.ones(1, 1, 9, 14, dtype=torch.bool)
    mask[:, :, 4] = False
    out, lse = attention_reference(*leaves, mask=mask)
    assert (out[:, :, 4] == 0).all()
    assert lse[:, :, 4].isneginf().all()
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, 4] == 0).all()


def test_column_sums_are_those_of_the_weights() -> None:
    query, key, value = tensors()
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 4
    weights = scores.masked_fill(~torch.ones(9, 14, dtype=torch.bool).tril(5), -torch.inf).softmax(-1)
    _, lse = attention_reference(query, key, value, causal=True)
    for last in (None, 3):
        expected = weights[:, :, -(last or 9) :].sum(2).unflatten(1, (2, 2)).sum(2)
        found = column_sums_reference(query, key, lse, causal=True, last=last)
        assert (found - expected).abs().max() < 1e-12


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux only")
def test_kernels_say_that_they_need_a_gpu() -> None:
    query, key, value = (tensor.float() for tensor in tensors())
    with pytest.raises(RuntimeError, match="run on a GPU, and the input is on cpu"):
        attention(query, key, value, causal=True)


def test_references_work_without_triton_and_kernels_say_what_is_missing() -> None:
    code = """
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch, hf_ext
        from hf_ext.kernels import attention, column_sums, compaction, decode_attention, merge, merge_entries
        from hf_ext.kernels import packed_attention, ragged_attention
        q = torch.randn(1, 2, 3, 16)
        out, lse = attention.attention_reference(q, q, q, causal=True)
        assert column_sums.column_sums_reference(q, q, lse, causal=True).shape == (1, 2, 3)
        assert decode_attention.decode_attention_reference(q, q, q, causal=True)[0].shape == q.shape
        one = torch.ones(1, 2, 3, dtype=torch.int64)
        assert compaction.compact_reference((q,), one)[0].shape == q.shape
        segments = torch.tensor([[0, 3]]), torch.tensor([[3, 3]])
        assert ragged_attention.ragged_attention_torch(q, q[0].flatten(0, 1), q[0].flatten(0, 1), *segments)[0].any()
        try:
            attention.attention(q, q, q, causal=True)
        except RuntimeError as error:
            assert "pip install 'hf_ext[kernels]'" in str(error), error
        else:
            raise AssertionError("the kernel ran without Triton")
        print("without triton")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.strip() == "without triton", found.stdout + found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux only")
def test_kernels_of_caches_say_that_they_need_a_gpu() -> None:
    keys = torch.randn(1, 2, 8, 16)
    numbers, segments = torch.zeros(1, 2, 8, dtype=torch.int64), torch.full((1, 2), 8)
    packed = (*quantise_keys(keys, 4, 8), *quantise_values(keys, 4, 8))
    for launch in (
        lambda: compact((keys,), numbers),
        lambda: compact_ragged((keys,), numbers, segments),
        lambda: ragged_attention(keys[:, :, :1], keys[0, 0], keys[0, 0], segments * 0, segments),
        lambda: packed_attention(keys[:, :, :1], *packed, bits=4),
        lambda: merge_entries(keys, keys, keys[..., 0], numbers, 1),
    ):
        with pytest.raises(RuntimeError, match="run on a GPU, and the input is on cpu"):
            launch()


def test_importing_the_package_and_its_structures_imports_no_triton() -> None:
    code = "import sys, hf_ext, hf_ext.attention, hf_ext.attention.blocks; print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.strip() == "False", found.stdout + found.stderr


def test_there_is_a_configuration_for_every_class() -> None:
    for kind in configs.SHARED:
        for operation in configs.OPERATIONS:
            for width in (16, 64, 80, 96, 128, 192, 256):
                for size in (2, 4):
                    found = configs.entry(kind, operation, width, size)
                    assert found.queries >= 16
                    assert found.keys >= 16
                    assert 128 % found.queries == 0, "blocks divide those of a structure's table"
                    assert 128 % found.keys == 0
        for operation in configs.CACHE_OPERATIONS:
            for width in (16, 80, 256):
                assert {configs.entry(kind, operation, width, size).keys % 16 for size in (2, 4)} == {0}


def test_few_queries_have_configurations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "device_class", lambda index: "hopper")
    for operation, queries, expected in (
        ("forward", 8, "forward_few"),
        ("forward", 33, "forward"),
        ("decode", 16, "decode"),
        ("decode", 17, "decode_many"),
    ):
        found = configs.choose(operation, 100, torch.bfloat16, torch.device("cuda", 0), queries)
        assert found == configs.entry("hopper", expected, 128, 2), (operation, queries)
