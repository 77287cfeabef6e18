"""One's own attention inside stock models: who is called, with what, and that nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from hf_ext import adapter
from hf_ext.attention.intercept import _HANDLERS, intercept, visible
from hf_ext.testing import tiny_models

IDS, MASK = tiny_models.prompts((9, 5))


def logits(model: Any, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **settings).logits


def passing(module: Any, query: Any, key: Any, value: Any, mask: Any, plain: Any, **kwargs: Any) -> Any:
    return plain(module, query, key, value, mask, **kwargs)


def halved(module: Any, query: Any, key: Any, value: Any, mask: Any, plain: Any, **kwargs: Any) -> Any:
    output, weights = plain(module, query, key, value, mask, **kwargs)
    return output / 2, weights


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_plain_is_what_the_model_would_have_done(kind, attention):
    model = tiny_models.build(kind, attn_implementation=attention)
    assert adapter.attention_implementation(model) == attention
    expected, cached = logits(model), model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    with intercept(model, passing):
        assert torch.equal(logits(model), expected)
        assert torch.equal(model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False), cached)
    assert adapter.attention_implementation(model) == attention
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_every_layer_is_asked_with_queries_keys_and_mask(kind):
    model, seen = tiny_models.shared(kind), []

    def note(module, query, key, value, mask, plain, **kwargs):
        seen.append((module.layer_idx, tuple(query.shape), tuple(key.shape), visible(mask, query, key)))
        return plain(module, query, key, value, mask, **kwargs)

    with intercept(model, note):
        logits(model)
    config = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    assert [layer for layer, *_ in seen] == [0, 1]
    for _, query, key, mask in seen:
        assert (query, key) == ((2, heads, 9, 8), (2, key_heads, 9, 8)), f"{kind}: query {query}, key {key}"
        rows = MASK.bool()
        expected = (torch.ones(9, 9).tril().bool() & rows[:, None, :])[:, None]
        windows = [expected, expected & torch.ones(9, 9).triu(1 - tiny_models.WINDOW).bool()]
        real = rows[:, None, :, None]  # what padding sees is the model's own business
        assert any(bool(((mask == window) | ~real).all()) for window in windows), f"{kind}: {mask[1, 0].int()}"


def test_what_attend_returns_is_what_the_model_goes_on_with():
    model = tiny_models.shared("llama")
    with intercept(model, halved):
        found = logits(model)
    changed = tiny_models.build("llama")
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.o_proj.weight /= 2
    difference = (found - logits(changed)).abs().max().item()
    assert difference < 1e-5, f"halved attention against halved projections differs by {difference:.3g}"


def test_the_inner_block_is_called_and_its_plain_is_the_outer_one():
    model, order = tiny_models.build("llama"), []

    def named(name):
        def attend(module, query, key, value, mask, plain, **kwargs):
            order.append(name)
            return plain(module, query, key, value, mask, **kwargs)

        return attend

    with intercept(model, named("outer")):
        with intercept(model, named("inner")):
            logits(model)
        assert order == ["inner", "outer"] * 2
        logits(model)
    assert order == ["inner", "outer"] * 2 + ["outer"] * 2
    logits(model)
    assert len(order) == 6
    assert not any(module in _HANDLERS for module in model.modules())


def test_an_exception_restores_the_model():
    model = tiny_models.build("llama")
    expected = logits(model)

    def failing(*_: Any, **__: Any) -> Any:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"), intercept(model, failing):
        logits(model)
    assert adapter.attention_implementation(model) == "sdpa"
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("config", ["of its own", "the same"])
def test_two_models_do_not_disturb_each_other(config):
    one, other = tiny_models.build("llama"), tiny_models.build("llama")
    if config == "the same":
        for module in other.modules():
            if hasattr(module, "config"):
                module.config = one.config
    expected = logits(other)
    with intercept(one, halved):
        assert torch.equal(logits(other), expected), "a model that nobody intercepts has changed"
        changed = logits(one)
        with intercept(other, passing):
            assert torch.equal(logits(other), expected)
            assert torch.equal(logits(one), changed)
    assert not torch.equal(changed, expected)


def test_a_model_that_was_intercepted_can_be_forgotten():
    model = tiny_models.build("llama", num_hidden_layers=1)
    with intercept(model, lambda *args, **kwargs: passing(*args, **kwargs)):
        logits(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_gradients_flow_through():
    model = tiny_models.build("llama")
    with intercept(model, passing):
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_with_an_attention_of_its_own_is_refused():
    with (
        pytest.raises(ValueError, match=r"OpenAIGPT.* cannot be replaced"),
        intercept(tiny_models.build("openai-gpt"), passing),
    ):
        pass


def test_masks_of_any_form_say_the_same():
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    seen = torch.ones(2, 1, 3, 5).tril(2).bool()
    seen[1, :, :, 0] = False
    added = torch.zeros(2, 1, 3, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert torch.equal(visible(seen, query, key), seen)
    assert torch.equal(visible(added, query, key), seen)
    assert torch.equal(visible(None, query, key), torch.ones(1, 1, 3, 5).tril(2).bool())
    assert visible(None, query, key, causal=False).all()
    assert visible(None, query[:, :, :1], key).all()
    with pytest.raises(ValueError, match="sdpa"):
        visible(torch.ones(2, 5), query, key)
    softly = added.clone()
    softly[0, 0, 1, 0] = -3.0  # nothing that is seen or not: a method that took it for seen would lose it
    with pytest.raises(ValueError, match="adds numbers of its own to the scores"):
        visible(softly, query, key)
