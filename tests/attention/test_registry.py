"""An implementation is registered with both of its halves, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from hf_ext import adapter
from hf_ext.attention import backend, register
from hf_ext.testing import tiny_models


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    return adapter.sdpa_attention(module, query, key, value, attention_mask, **kwargs)


def mask(**kwargs: Any) -> Any:
    return adapter.sdpa_mask(**kwargs)


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    mappings = adapter.attention_mappings()
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, old in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(old)


def registered(name: str) -> tuple[bool, bool]:
    return name in AttentionInterface(), name in AttentionMaskInterface()


def test_what_is_registered_runs_in_a_model_with_its_masks() -> None:
    register("mine", attention, mask)
    model = tiny_models.build("mistral")
    ids, padding = tiny_models.prompts()
    found = []
    for name in ("mine", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(ids, attention_mask=padding).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "name", ["org/kernel", "my_sdpa", "my_flex_attention", "flash_mine", "eager", "", "paged|mine"]
)
def test_names_that_mean_something_to_transformers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        register(name, attention, mask)
    assert name in ("eager",) or registered(name) == (False, False)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [(None, mask, "attention must be"), (attention, "mask", "mask must be"), (attention, lambda: None, "kwargs")],
)
def test_halves_that_cannot_work_are_refused_before_anything_is_registered(first: Any, second: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        register("mine", first, second)
    assert registered("mine") == (False, False)


def test_a_failure_between_the_halves_takes_the_first_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, function: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(AttentionMaskInterface, "register", broken)
    with pytest.raises(RuntimeError, match="no room"):
        register("mine", attention, mask)
    assert registered("mine") == (False, False)
    with pytest.raises(RuntimeError, match="no room"):
        register("hf_ext", attention, mask, overwrite=True)
    assert AttentionInterface()["hf_ext"] is backend.attention


def test_another_implementation_is_not_replaced_unless_asked() -> None:
    register("mine", attention, mask)
    register("mine", attention, mask)  # the same again is no change

    def other(**kwargs: Any) -> Any:
        return adapter.sdpa_mask(**kwargs)

    with pytest.raises(ValueError, match="overwrite=True"):
        register("mine", attention, other)
    assert AttentionMaskInterface()["mine"] is mask
    register("mine", attention, other, overwrite=True)
    assert AttentionMaskInterface()["mine"] is other


def test_importing_hf_ext_registers_its_own() -> None:
    assert AttentionInterface()["hf_ext"] is backend.attention
    assert AttentionMaskInterface()["hf_ext"] is backend.mask
