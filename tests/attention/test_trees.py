"""Speculative decoding on models with `attn_implementation="hf_ext"`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_ext.attention import kernels, unpack
from hf_ext.attention.packed import is_packed
from hf_ext.generation import DySpec, TokenRecycling
from hf_ext.generation.speculative.tree_attention import mask_for, structure_of
from hf_ext.testing import tiny_models

IDS, MASK = tiny_models.prompts()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_greedy_text_is_that_of_generate(kind: str, build: Callable[[str], Any]) -> None:
    model = build(kind)
    model.set_attn_implementation("hf_ext")
    given = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(IDS, **given)
    trees = DySpec(draft_model=tiny_models.shared("llama"), nodes=8, depth=3)
    for strategy in (trees, TokenRecycling()):
        found = strategy.generate(model, IDS, **given)
        assert torch.equal(found, expected), type(strategy).__name__
        assert strategy.report.target_positions > strategy.report.target_calls, "no trees were drafted"


def test_kernels_get_the_tree_as_a_structure() -> None:
    structure = structure_of((9, 7), (9, 5), [(-1, 0, 0, 1), (-1, -1, 1, 2)], queries=3, keys=14, window=6)
    with kernels("always"):
        packed = mask_for("hf_ext", structure, torch.float32, torch.device("cpu"))
    assert is_packed(packed)
    assert torch.equal(unpack(packed.clone(), 3, 14).dense(), structure.dense())


def test_a_step_takes_less_than_a_millisecond_of_bookkeeping() -> None:
    """64 nodes in each of four lanes, after 1000 tokens of context."""
    parents = [tuple(node // 2 - 1 if node else -1 for node in range(64))] * 4
    took = []
    for _ in range(30):
        start = time.process_time()
        structure = structure_of((1000, 990, 1000, 900), (1000, 990, 1000, 900), parents, queries=64, keys=1064)
        with kernels("always"):
            mask_for("hf_ext", structure, torch.float32, torch.device("cpu"))
        took.append(time.process_time() - start)
    assert sorted(took)[15] < 1e-3, f"{1e3 * sorted(took)[15]:.2f} ms"
