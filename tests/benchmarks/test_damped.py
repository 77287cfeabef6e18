"""The memory-bound target says what the small model says, the less so the weaker it is damped, and skips nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.benchmarks import damped
from hf_ext.testing import tiny_models

SIZES = {"hidden": 64, "intermediate": 96, "layers": 5}


def difference(damping: float) -> float:
    small, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts((12, 12))
    big = damped.build(damping, source=small, **SIZES)
    with torch.no_grad():
        return float((big(ids, attention_mask=mask).logits - small(ids, attention_mask=mask).logits).abs().max())


def test_without_damped_parts_it_computes_what_the_small_model_computes() -> None:
    assert (found := difference(0.0)) < 1e-4, f"the largest difference is {found:.3g}"


def test_the_disturbance_grows_with_the_damping_factor() -> None:
    found = [difference(damping) for damping in (0.0, 0.1, 0.4, 1.6)]
    assert found == sorted(found), found
    assert found[1] > 100 * found[0], found


def test_it_is_a_stock_model_of_the_sizes_asked_for_in_which_every_weight_but_the_norms_is_at_random() -> None:
    model = damped.build(0.5, source=tiny_models.shared("llama"), **SIZES)
    assert type(model) is LlamaForCausalLM
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 96, 5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, weight in model.named_parameters():
        assert bool((weight != 0).all()), f"{name} has zeros, which a library might skip"


def test_the_same_seed_builds_the_same_model_and_leaves_the_callers_random_state() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    models = [damped.build(0.5, source=tiny_models.shared("llama"), **SIZES) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_default_shape_has_more_than_300_million_parameters() -> None:
    with torch.device("meta"):  # counts without the memory
        config = {"hidden_size": damped.HIDDEN, "intermediate_size": damped.INTERMEDIATE, "vocab_size": 4096}
        heads = {"num_attention_heads": damped.HIDDEN // 32, "num_key_value_heads": damped.HIDDEN // 64, "head_dim": 32}
        model = LlamaForCausalLM(
            LlamaConfig(**config, **heads, num_hidden_layers=damped.LAYERS, tie_word_embeddings=True)
        )
    assert model.num_parameters() > 300e6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -1.0}, "damping must be"),
        ({"hidden": 16}, "hidden must be 32 at least"),
        ({"layers": 1}, "layers must be 2 at least"),
        ({"hidden": 40}, "hidden must be a multiple of 16"),
    ],
)
def test_what_does_not_fit_the_small_model_is_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        damped.build(**{"damping": 0.5, **SIZES, **options}, source=tiny_models.shared("llama"))


def test_a_model_agrees_with_itself_everywhere_and_with_an_unrelated_one_seldom() -> None:
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert damped.agreement(model, model, inputs, 8) == pytest.approx({"argmax": 1.0, "overlap": 1.0}, abs=1e-5)
    other = damped.agreement(model, tiny_models.shared("qwen3"), inputs, 8)
    assert other["argmax"] < 0.5, other
    assert other["overlap"] < 0.8, other
