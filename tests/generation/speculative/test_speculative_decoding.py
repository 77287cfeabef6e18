"""Speculative decoding with a draft model."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.speculative_decoding import SpeculativeDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance


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
