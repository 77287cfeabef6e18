"""Speculative decoding with a draft model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from hf_ext.generation.speculative_decoding import SpeculativeDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import refusal


def draft(kind: str = "llama", strength: float = 0.15):
    return exactness.perturbed(tiny_models.shared(kind), strength)


class TestConformance(StrategyConformance):
    def strategy(self):
        return SpeculativeDecoding(draft(), draft_tokens=3)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: SpeculativeDecoding(draft(kind), 4), kinds=(kind,))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_p": 0.8, "temperature": 1.3}, {"top_k": 3}, {"repetition_penalty": 1.5}],
    ids=str,
)
def test_sampled_text_follows_the_law_of_generate(settings):
    # A penalty looks at each text by itself, which takes time: fewer continuations, as many draws for each.
    sizes = {"vocabulary": 4, "draws": 2500} if "repetition_penalty" in settings else {"vocabulary": 5, "draws": 5000}
    model = exactness.small_vocabulary(vocabulary=sizes["vocabulary"])
    other = exactness.perturbed(model, 0.6)  # wrong often enough for what follows a rejection to show
    exactness.assert_sampling_law(
        lambda model: SpeculativeDecoding(other, 3), model, draws=sizes["draws"], prompt=torch.tensor([[3, 1, 2, 1]]),
        **settings,
    )  # fmt: skip


def test_a_draft_model_with_adapters_drafts_as_it_is_adapted():
    """As the same model with the adapters merged; a learned prompt is refused, since it would not be read."""
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny_models.build("llama"), lora).eval()
    reports = []
    for other in (wrapped, copy.deepcopy(wrapped).merge_and_unload()):
        strategy = SpeculativeDecoding(other, 3)
        settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
        assert strategy.generate(model, ids, **settings).tolist() == model.generate(ids, **settings).tolist()
        reports.append((strategy.report.target_calls, strategy.report.accepted))
    assert reports[0] == reports[1]
    prompted = get_peft_model(
        tiny_models.build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    refusal(
        lambda: SpeculativeDecoding(prompted).generate(model, ids, attention_mask=mask, max_new_tokens=2),
        "learned prompt", what="a draft model with a learned prompt",
    )  # fmt: skip
