"""What kvpress 0.5.5 keeps on the same weights and tokens, as `benchmarks/kvpress_indices.py` has recorded it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.benchmarks.kvpress_indices import HORIZON, KERNEL, MODELS, SINKS, WINDOW, filters
from hf_ext.cache import H2O, TOVA, AdaKV, CachePolicy, CompressedCache, KeyDiff, Knorm, PyramidKV, SnapKV, StreamingLLM
from hf_ext.cache.policies.expected_attention import ExpectedAttention
from hf_ext.cache.policies.q_filters import QFilters
from hf_ext.testing import tiny_models

DATA = json.loads((Path(__file__).parent / "data" / "kvpress_indices.json").read_text())


@functools.cache
def model(shape: str) -> Any:
    kind, changes = MODELS[shape]
    built = tiny_models.build(kind, **changes)
    built.set_attn_implementation("hf_ext")
    return built


def policy(name: str, shape: str, budget: int) -> CachePolicy:
    """Return our policy of the settings that were recorded."""
    config = model(shape).config
    snapkv = SnapKV(budget=budget, window=WINDOW, kernel=KERNEL)
    expected: Any = functools.partial(ExpectedAttention.of, model(shape), budget=budget, horizon=HORIZON, sinks=SINKS)
    made = {
        "knorm": lambda: Knorm(budget=budget),
        "keydiff": lambda: KeyDiff(budget=budget),
        "streaming-llm": lambda: StreamingLLM(budget=budget, sinks=SINKS),
        "tova": lambda: TOVA(budget=budget),
        "h2o": lambda: H2O(budget=budget, recent=0.0, average=True),
        "snapkv": lambda: snapkv,
        "pyramidkv": lambda: PyramidKV(budget=budget, window=WINDOW, kernel=KERNEL, slope=4),
        "expected-attention": expected,
        "expected-attention-of-means": lambda: expected(covariance=False, values=False),
        "q-filters": lambda: QFilters(
            filters=filters(config.num_hidden_layers, config.num_key_value_heads, config.head_dim),
            budget=budget,
            window=0,
        ),
        "adakv-of-snapkv": lambda: AdaKV(policy=snapkv),
        "adakv-of-expected-attention": lambda: AdaKV(policy=expected(), floor=0.5),
    }
    return made[name]()


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("name", sorted({case["policy"] for case in DATA["cases"]}))
def test_the_same_tokens_stay_as_with_kvpress(name: str, shape: str) -> None:
    """Every head of every layer keeps the very same tokens, at every budget."""
    ids, _ = tiny_models.prompts((DATA["tokens"],))
    cases = [case for case in DATA["cases"] if (case["policy"], case["model"]) == (name, shape)]
    assert cases, "nothing was recorded"
    for case in cases:
        cache = CompressedCache(model(shape).config, policy(name, shape, case["budget"]))
        with torch.no_grad():
            model(shape)(ids, past_key_values=cache)
        for layer, heads in enumerate(case["columns"]):
            for head, wanted in enumerate(heads):
                found = [column for column in cache.columns(layer)[0, head].tolist() if column >= 0]
                jaccard = len(set(found) & set(wanted)) / len(set(found) | set(wanted))
                assert found == wanted, f"budget {case['budget']}, layer {layer}, head {head}: Jaccard {jaccard:.3f}"


def test_the_fixture_says_what_it_was_made_with() -> None:
    """Versions, and cases of every model at several budgets."""
    assert DATA["versions"] == {"kvpress": "0.5.5", "transformers": "5.2.0"}
    assert {case["model"] for case in DATA["cases"]} == set(MODELS)
    assert len({case["budget"] for case in DATA["cases"]}) >= 3
