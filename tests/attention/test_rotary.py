"""Keys and queries at other positions: what is found out about a model, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from hf_ext.attention.intercept import intercept
from hf_ext.attention.rotary import Rotary
from hf_ext.layers import captured
from hf_ext.testing import tiny_models

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
THETA = {"rope_theta": 1e4}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
LATENT = {
    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16,
    "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip
#: Model class, config class and what its config has beyond `SHAPE`.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "partly": ("StableLmForCausalLM", "StableLmConfig", {}),
    "partly, another factor": ("PhiForCausalLM", "PhiConfig", {}),
    "neighbours": ("CohereForCausalLM", "CohereConfig", {}),
    "neighbours, partly": ("GlmForCausalLM", "GlmConfig", {"head_dim": 8}),
    "the last numbers of a head": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "a layer without positions": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "scaled linearly": (
        "LlamaForCausalLM", "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}},
    ),
    "scaled by frequency": (
        "LlamaForCausalLM", "LlamaConfig", {"rope_parameters": {"rope_type": "llama3", **LLAMA3, **THETA}},
    ),
    "scaled with a temperature": (
        "LlamaForCausalLM", "LlamaConfig",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}},
    ),
}  # fmt: skip
ROTARY = ("llama", "qwen2", "qwen3", "mistral", "gemma3")


def build(name: str) -> Any:
    if name not in OTHERS:
        return tiny_models.shared(name)
    model, config, more = OTHERS[name]
    return tiny_models.fill(getattr(tf, model)(getattr(tf, config)(**{**SHAPE, **more})))


def cached(model: Any, positions: torch.Tensor) -> list[torch.Tensor]:
    ids, found = tiny_models.prompts((7,))[0], []

    def keep(module: Any, query: Any, key: Any, value: Any, mask: Any, plain: Any, **kwargs: Any) -> Any:
        found.append(key)
        return plain(module, query, key, value, mask, **kwargs)

    with torch.no_grad(), intercept(model, keep):
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=True)
    return found


@pytest.mark.parametrize("name", [*ROTARY, *OTHERS])
def test_moved_keys_are_those_of_the_model_at_the_other_positions(name):
    model = build(name)
    rotary, places = Rotary.of(model), torch.arange(7)[None]
    near, far = cached(model, 3 + places), cached(model, 61 + places)
    for layer, (a, b) in enumerate(zip(near, far, strict=True)):
        forth = (rotary.rotate(layer, a, torch.tensor(58)) - b).abs().max().item()
        back = (rotary.rotate(layer, b, torch.tensor(-58)) - a).abs().max().item()
        largest = a.abs().max().item()
        assert max(forth, back) < 2e-5 * largest, f"{name}, layer {layer}: {forth:.3g}, {back:.3g} of {largest:.3g}"
    first = cached(model, 3 + 5 * places)[0]  # the first layer does not know of other tokens
    apart = (rotary.rotate(0, near[0], 4 * torch.arange(7)) - first).abs().max().item()
    assert apart < 1e-4 * near[0].abs().max().item(), f"{name}: each token by another distance, off by {apart:.3g}"


def test_distances_may_differ_by_head_and_are_broadcast():
    model = build("neighbours, partly")
    rotary, states = Rotary.of(model), torch.randn(1, 4, 6, 8)
    by = torch.randint(-50, 50, (3, 1, 4, 6))
    found = rotary.rotate(1, states, by)
    assert found.shape == (3, 1, 4, 6, 8)
    for where in ((0, 0, 1, 2), (2, 0, 3, 5)):
        alone = rotary.rotate(1, states[where[1:]], by[where])
        assert (found[where] - alone).abs().max() < 1e-6


def test_turns_add_up_and_keep_lengths():
    rotary, states = Rotary.of(tiny_models.shared("llama")), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    there = rotary.rotate(0, rotary.rotate(0, states, torch.tensor(30)), torch.tensor(-47))
    difference = (there - rotary.rotate(0, states, torch.tensor(-17))).abs().max().item()
    assert difference < 1e-5, f"30 forth and 47 back against 17 back: {difference:.3g}"
    assert (there.norm(dim=-1) - states.norm(dim=-1)).abs().max() < 1e-5
    assert rotary.rotate(0, states.bfloat16(), torch.tensor(3)).dtype == torch.bfloat16


def test_the_positions_of_a_pass_are_seen():
    model = tiny_models.shared("gemma3")
    with Rotary.of(model).positions() as positions:
        cached(model, torch.arange(20, 27)[None])
        assert positions().tolist() == [list(range(20, 27))]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_asked_once_and_left_as_it_was():
    model = tiny_models.build("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with captured(model, [1]) as found:
        rotary = Rotary.of(model)
        assert found
        found.clear()
        assert Rotary.of(model) is rotary
        assert not found
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_is_recognised():
    model = tiny_models.build("qwen3").to(torch.bfloat16)
    assert all(Rotary.of(model).turns)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gpt2", "absolute"), ("opt", "absolute"), ("openai-gpt", "AttentionInterface"), ("mamba", "0 of its 2 layers")],
)
def test_models_without_rotations_are_refused(kind, reason):
    model = tiny_models.shared(kind)
    for _ in range(2):  # asked, and remembered
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no rotary positions.*{reason}"):
            Rotary.of(model)


@pytest.mark.parametrize(
    ("model", "config", "rope"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {"rope_type": "dynamic", "factor": 4.0}),
        ("Phi3ForCausalLM", "Phi3Config", {"rope_type": "longrope", **LONG}),
    ],
)
def test_frequencies_that_depend_on_the_length_are_refused(model, config, rope):
    more = {"original_max_position_embeddings": 64} if config == "Phi3Config" else {}
    settings = {**SHAPE, **more, "rope_parameters": {**rope, **THETA}}
    model = tiny_models.fill(getattr(tf, model)(getattr(tf, config)(**settings)))
    ids = tiny_models.prompts((7,))[0]
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"depend on the length|not rotations of each other"):
        Rotary.of(model)
    assert torch.equal(model(ids).logits, expected), "asking has changed the model"


def test_rotations_on_top_of_absolute_positions_are_refused():
    class Both(tf.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            embeds = self.get_input_embeddings()(input_ids) + position_ids[..., None].float().sin()
            return super().forward(inputs_embeds=embeds, position_ids=position_ids, **kwargs)

    model = tiny_models.fill(Both(tf.LlamaConfig(**SHAPE)))
    with pytest.raises(ValueError, match="not rotations of each other"):
        Rotary.of(model)
