"""Stock models of all shapes that attention comes in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from hf_ext.testing import tiny_models

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "vocab_size": 96,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "sliding_window": tiny_models.WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def _build(kind: str) -> Any:
    import transformers as tf

    if kind == "gemma2":  # caps low enough to bind
        caps = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
        return tiny_models.fill(tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE, **caps)))
    if kind == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        model = tiny_models.fill(tf.GptOssForCausalLM(tf.GptOssConfig(**SHAPE, **experts)))
        for layer in model.model.layers:
            layer.self_attn.sinks.data.mul_(50)  # of the size of the scores
        return model
    return tiny_models.build(kind)


@pytest.fixture(scope="session")
def build() -> Callable[[str], Any]:
    """A function that builds a fresh model, as `tiny_models.build`, of more kinds."""
    return _build


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Any]:
    """The same, the same object every time; whoever changes its attention changes it back."""
    return functools.cache(_build)
