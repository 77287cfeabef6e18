"""Whether keys survive few bits: what is measured, and that one hears of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hf_ext.cache import KIVI, CompressedCache
from hf_ext.cache.sensitivity import THRESHOLD, moved, probe, through
from hf_ext.testing import tiny_models


def with_outliers(size: float = 200.0) -> Any:
    """Return a model as Qwen2.5 is: key projections with biases, some of which are huge."""
    model = tiny_models.build("qwen2", head_dim=16)
    for layer in model.model.layers:
        with torch.no_grad():
            bias = layer.self_attn.k_proj.bias
            bias.zero_()
            bias.view(2, 16)[:, 0], bias.view(2, 16)[:, 8] = size, -size  # which positions turn fastest
    return model


def heard(model: Any, bits: int, mask: bool = False, passes: tuple[int, ...] = (96,), **options: Any) -> list[str]:
    """Return what is said during a prompt."""
    model.set_attn_implementation("hf_ext")
    ids, real = tiny_models.prompts((96, 70))
    cache = CompressedCache(model.config, KIVI(bits=bits, group=16, residual=16, **options))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        start = 0
        for count in passes:
            call = {"attention_mask": real[:, : start + count]} if mask else {}
            model(ids[:, start : start + count], past_key_values=cache, **call)
            start += count
    return [str(one.message) for one in caught if "survive" in str(one.message)]


@pytest.mark.parametrize("mask", [False, True])
def test_keys_with_outliers_are_warned_of_once(mask: bool) -> None:
    model = with_outliers()
    for bits in (2, 4):
        said = heard(model, bits, mask, passes=(60, 36))
        assert len(said) == 1, said
        assert f"layer 0 do not survive {bits} bits" in said[0]
    assert not heard(model, 8, mask)
    assert not heard(model, 4, mask, guard=False)


def test_short_passes_are_left_for_a_longer_one() -> None:
    said = heard(with_outliers(), 4, passes=(9, 1, 1, 70))
    assert len(said) == 1, said


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3", "opt", "gemma3"])
def test_ordinary_models_are_left_in_peace(kind: str) -> None:
    model = tiny_models.build(kind)
    for bits in (2, 4, 8):
        assert not heard(model, bits, mask=True)


def test_the_probe_tells_layers_apart() -> None:
    """Only the second layer has outliers: only its keys fail, and the model suffers most from them."""
    model = with_outliers()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.zero_()
    ids, mask = tiny_models.prompts((80, 61))
    found = probe(model, ids, bits=4, group=16, attention_mask=mask)
    assert found.failing == (1,), str(found)
    first, second = found.layers
    assert second.output_error > 5 * first.output_error, str(found)
    assert second.moved > THRESHOLD > first.moved, str(found)
    assert probe(model, ids, bits=8, group=16, attention_mask=mask).layers[1].moved < second.moved / 2
    assert "  !" in str(found)
    assert str(found).count("!") == 1


def test_the_probe_measures_what_the_model_loses() -> None:
    """Its divergence is that of the model whose one layer runs on such keys; nothing is left behind on the model."""
    model = tiny_models.build("llama")
    before = model.config._attn_implementation
    ids, _ = tiny_models.prompts((64,))
    eight, two = (probe(model, ids, bits=bits, group=16).layers for bits in (8, 2))
    for fine, coarse in zip(eight, two, strict=True):
        assert 0 < fine.divergence < coarse.divergence
        assert fine.output_error < coarse.output_error
    assert model.config._attn_implementation == before


def test_attention_moved_is_half_the_difference_of_softmaxes() -> None:
    draw = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 4, 3, 8, generator=draw), torch.randn(1, 2, 20, 8, generator=draw)
    back = through(keys, 2, 8)
    assert torch.equal(back[:, :, 16:], keys[:, :, 16:])  # no whole group
    found = moved(query, keys, back, 0.5)
    for head in range(4):
        laws = [(query[0, head] @ side[0, head // 2].T * 0.5).softmax(-1) for side in (keys, back)]
        wanted = (laws[0] - laws[1]).abs().sum(-1) / 2
        gap = (found[0, head] - wanted).abs().max().item()
        assert gap < 1e-6, f"head {head}: the largest difference is {gap:.2e}"


def test_what_the_probe_cannot_do_says_why() -> None:
    model = tiny_models.shared("llama")
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        probe(model, ["a text"])
    with pytest.raises(ValueError, match="do not fill a group"):
        probe(model, torch.ones(1, 9, dtype=torch.long))
