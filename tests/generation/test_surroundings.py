"""What libraries put around a model or a call changes no text: offloaded weights, the labels of a Trainer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from hf_ext.generation import PINE, DecodingStrategy, PrefixLM, SpeculativeDecoding
from hf_ext.testing import tiny_models

STRATEGIES: dict[str, Callable[[PreTrainedModel], DecodingStrategy]] = {
    "prefix-lm": lambda _: PrefixLM(),
    "pine": lambda _: PINE(),
    "speculative-decoding": lambda draft: SpeculativeDecoding(draft_model=draft),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_offloaded_model_gives_the_text_of_the_model(name: str) -> None:
    model, offloaded = tiny_models.build("llama"), tiny_models.build("llama")
    offloaded.load_state_dict(model.state_dict())
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    ids, mask = tiny_models.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings, custom_generate=STRATEGIES[name](model))
    found = offloaded.generate(ids, **settings, custom_generate=STRATEGIES[name](offloaded))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_labels_that_seq2seq_trainer_hands_on_are_dropped_as_generate_drops_them(name: str) -> None:
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings, custom_generate=STRATEGIES[name](model))
    found = model.generate(ids, **settings, custom_generate=STRATEGIES[name](model), labels=ids)
    assert found.tolist() == expected.tolist()
