"""Statistics of a model's layers are those of the matrix that eager attention returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StaticCache

from hf_ext.attention import collect
from hf_ext.testing import tiny_models

IDS, MASK = tiny_models.prompts()


def matrices(model: Any, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """The attention probabilities of every layer, from eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "gpt2", "mistral"])
def test_column_sums_are_those_of_the_matrix(kind: str, build: Callable[[str], Any]) -> None:
    model = build(kind)
    expected = matrices(model, input_ids=IDS, attention_mask=MASK)
    model.set_attn_implementation("hf_ext")
    with torch.no_grad():
        plain = model(IDS, attention_mask=MASK).logits
        with collect(model) as statistics:
            watched = model(IDS, attention_mask=MASK).logits
    assert torch.equal(plain, watched)
    assert [call.layer for call in statistics.calls] == [0, 1]
    for layer, matrix in enumerate(expected):
        sums, lse = statistics[layer].column_sums, statistics[layer].lse
        assert sums is not None
        assert lse is not None
        real = matrix * MASK[:, None, :, None]  # queries on padding see nothing
        heads = sums.shape[1]
        wanted = real.sum(2).unflatten(1, (heads, -1)).sum(2)
        difference = float((sums - wanted).abs().max())
        assert difference < 1e-5, f"layer {layer}: {difference}"
        assert lse.shape == matrix.shape[:3]
        # With a sink, what the keys got is the less the more of the total is the sink's.
        assert bool((lse.isfinite() | ~MASK.bool()[:, None]).all())


def test_statistics_of_a_step_with_a_cache_have_a_row_for_its_query() -> None:
    model = tiny_models.build("qwen3")
    model.set_attn_implementation("hf_ext")
    with collect(model, lse=False) as statistics, torch.no_grad():
        out = model(IDS[:1], use_cache=True)
        statistics.clear()
        model(IDS[:1, :1], past_key_values=out.past_key_values)
    assert len(statistics.calls) == 2
    sums = statistics[1].column_sums
    assert sums is not None
    assert sums.shape == (1, 2, 13)
    assert torch.allclose(sums.sum(-1), torch.full((1, 2), 2.0))
    assert statistics[1].lse is None
    with pytest.raises(KeyError, match="layer 7"):
        statistics[7]


def test_it_stops_at_the_end_and_refuses_what_it_cannot_see() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match="hf_ext"), collect(model):
        pass
    model.set_attn_implementation("hf_ext")
    with collect(model) as statistics, torch.no_grad():
        with pytest.raises(ValueError, match="already"), collect(model):
            pass
        model(IDS)
    with torch.no_grad():
        model(IDS)
    assert len(statistics.calls) == 2
    with pytest.raises(RuntimeError, match="stop"), collect(model):
        raise RuntimeError("stop")
    with collect(model):  # the one before has left nothing behind
        pass


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_attentions_are_returned_where_they_are_asked_for(kind: str, build: Callable[[str], Any]) -> None:
    model = build(kind)
    expected = matrices(model, input_ids=IDS, attention_mask=MASK)
    model.set_attn_implementation("hf_ext")
    with torch.no_grad():
        found = model(IDS, attention_mask=MASK, output_attentions=True).attentions
    for one, other in zip(found, expected, strict=True):
        difference = float(((one - other) * MASK[:, None, :, None]).abs().max())
        assert difference < 1e-6, difference


def test_a_static_cache_has_a_column_for_every_key_also_those_that_are_empty(build: Callable[[str], Any]) -> None:
    model, places = build("llama"), IDS.shape[1] + 3

    def read() -> tuple[torch.Tensor, ...]:
        cache = StaticCache(model.config, max_cache_len=places)
        return model(IDS[:1], past_key_values=cache, output_attentions=True).attentions

    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = read()
        model.set_attn_implementation("hf_ext")
        with collect(model) as statistics:
            found = read()
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape == (1, 4, IDS.shape[1], places)
        sums = statistics[layer].column_sums
        assert sums is not None
        difference = float((sums - other.sum(2).unflatten(1, (2, -1)).sum(2)).abs().max())
        assert difference < 1e-5, f"layer {layer}: {difference}"
        assert float((one - other).abs().max()) < 1e-6
