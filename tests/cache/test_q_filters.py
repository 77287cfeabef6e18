"""Filters are fitted, saved beside the model, pushed with it, and refuse other models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ext.attention.intercept import intercept
from hf_ext.cache import H2O, AdaKV, CachePolicy, CompressedCache, ExpectedAttention, Filters, QFilters, SnapKV
from hf_ext.cache.policies.filters import FILE
from hf_ext.testing import tiny_models
from hf_ext.testing.local_hub import LocalHub

TEXTS = [list(range(3, 40)), list(range(60, 20, -1)), [7, 9] * 15]


def queries_of(model: Any) -> dict[int, Tensor]:
    """Return all queries of each layer, `(heads, tokens of all texts, width)`."""
    found: dict[int, list[Tensor]] = {}

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any) -> Any:
        found.setdefault(module.layer_idx, []).append(query[0])
        return plain(module, query, key, value, mask, **call)

    with torch.no_grad(), intercept(model, watch):
        for ids in TEXTS:
            model(torch.tensor([ids]))
    return {layer: torch.cat(parts, dim=1) for layer, parts in found.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_filters_are_the_first_singular_vectors_averaged_over_groups(kind: str):
    """The singular value decomposition of all queries at once, which `fit` never holds."""
    model = tiny_models.build(kind)
    filters = QFilters.fit(model, TEXTS)
    for layer, queries in queries_of(model).items():
        most = torch.linalg.svd(queries.double(), full_matrices=False).Vh[:, 0]
        signs = (queries.double() @ most[..., None])[..., 0].mean(1).sign()
        wanted = (most * signs[:, None]).unflatten(0, (filters.directions.shape[1], -1)).mean(1)
        gap = (filters.directions[layer] - wanted).abs().max().item()
        assert gap < 1e-4, f"layer {layer}: the largest difference is {gap:.2e}"


def test_what_is_fitted_does_not_depend_on_how_the_text_is_given():
    model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
    texts = ["def f(x):", "return x + 1"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    found = [
        QFilters.fit(model, texts, tokenizer),
        QFilters.fit(model, ids, progress=True),
        QFilters.fit(model, [torch.tensor([part]) for part in ids]),
    ]
    assert all(torch.equal(found[0].directions, other.directions) for other in found[1:])
    assert {other.tokens for other in found} == {sum(map(len, ids))}
    assert QFilters.fit(model, ids, max_length=3).tokens == 6


def test_fitting_leaves_the_model_as_it_was():
    model = tiny_models.build("llama").train()
    before = model.config._attn_implementation
    QFilters.fit(model, TEXTS)
    assert (model.training, model.config._attn_implementation) == (True, before)


@pytest.mark.parametrize(
    ("texts", "message"), [([], "no text"), ([[]], "no text"), (["abc"], "give the tokenizer")], ids=str
)
def test_what_cannot_be_fitted_on_is_refused(texts: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        QFilters.fit(tiny_models.shared("llama"), texts)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder-only"):
        QFilters.fit(tiny_models.shared("t5"), TEXTS)


def test_filters_are_saved_beside_the_model_and_read_from_there(tmp_path: Path):
    model = tiny_models.build("llama")
    filters = QFilters.fit(model, TEXTS)
    model.save_pretrained(tmp_path)
    filters.save_pretrained(tmp_path)
    again = Filters.from_pretrained(tmp_path, config=type(model).from_pretrained(tmp_path).config)
    assert torch.equal(again.directions, filters.directions)
    assert (again.model_type, again.tokens) == ("llama", filters.tokens)
    (tmp_path / FILE).unlink()
    with pytest.raises(OSError, match=FILE):
        Filters.from_pretrained(tmp_path)


PUSH = """
from hf_ext.cache import Filters, QFilters
from hf_ext.testing import tiny_models

model = tiny_models.build("llama")
filters = QFilters.fit(model, [list(range(3, 40))])
model.push_to_hub("user/small")
filters.push_to_hub("user/small")
again = Filters.from_pretrained("user/small", config=model.config)
print((again.directions - filters.directions).abs().max().item())
"""


def test_filters_are_pushed_into_the_repository_of_the_model():
    """The client reads where the Hub is when it is imported, so this is a process of its own."""
    with LocalHub() as hub:
        done = subprocess.run([sys.executable, "-c", PUSH], env=hub.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = hub.files("user/small")
    assert {"model.safetensors", "config.json", "README.md", FILE} <= set(files)
    assert float(done.stdout.splitlines()[-1]) == 0


def test_filters_of_another_model_are_refused():
    filters = QFilters.fit(tiny_models.shared("llama"), TEXTS)
    with pytest.raises(ValueError, match=r"key heads 2.*key heads 4.*QFilters\.fit"):
        filters.check(tiny_models.build("llama", num_key_value_heads=4).config)
    with pytest.raises(ValueError, match=r"model type llama.*model type qwen3"):
        filters.check(tiny_models.shared("qwen3").config)
    for changes in ({"num_key_value_heads": 4}, {"head_dim": 16}, {"num_hidden_layers": 3}):
        other = tiny_models.build("llama", **changes)
        cache = CompressedCache(other.config, QFilters(filters=filters, budget=4))
        with pytest.raises(ValueError, match=r"filters are of a model of 2 layers.*QFilters\.fit"):
            other(torch.tensor([TEXTS[0]]), past_key_values=cache)


def test_layers_that_are_not_compressed_do_not_shift_the_filters():
    """With the first layer skipped, the second one still gets its own filter."""
    model, ids = tiny_models.shared("llama"), torch.tensor([TEXTS[0]])
    filters = QFilters.fit(model, TEXTS)
    whole, skipped = (
        CompressedCache(model.config, QFilters(filters=filters, budget=8), skip_layers=skip) for skip in (0, 1)
    )
    with torch.no_grad():
        model(ids, past_key_values=whole)
        model(ids, past_key_values=skipped)
    assert torch.equal(whole.columns(1), skipped.columns(1))
    assert not torch.equal(whole.columns(0), whole.columns(1))


def policies(model: Any) -> dict[str, CachePolicy]:
    filters = QFilters.fit(model, TEXTS)
    return {
        "filters": QFilters(filters=filters, budget=8),
        "filters inside": AdaKV(policy=QFilters(filters=filters, budget=8), floor=0.3),
        "sums inside": AdaKV(policy=H2O(budget=8)),
        "window inside": AdaKV(policy=SnapKV(budget=8, window=3, when="both")),
        "rotations": ExpectedAttention.of(model, budget=8, when="both", samples=5),
    }


@pytest.mark.parametrize("name", policies(tiny_models.shared("llama")))
def test_a_saved_cache_goes_on_with_its_policy(name: str, tmp_path: Path):
    """Tensors and policies among the options are saved with it; what comes next is dropped alike."""
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    policy, ids = policies(model)[name], torch.tensor([TEXTS[0]])
    cache = CompressedCache(model.config, policy)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        again = CompressedCache.load(tmp_path / "cache.safetensors", model.config)
        assert type(again.policy) is type(policy)
        for token in (5, 6, 7):
            found, wanted = (model(torch.tensor([[token]]), past_key_values=c).logits for c in (again, cache))
            assert torch.equal(found, wanted)
    for layer in range(2):
        assert torch.equal(again.columns(layer), cache.columns(layer))
