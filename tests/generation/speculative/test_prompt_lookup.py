"""Prompt lookup: drafts copied from the row's own text."""

from __future__ import annotations

import random

import pytest
import torch

from hf_ext.generation.prompt_lookup import NgramIndex, PromptLookup
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.drafts_from_text import assert_laws
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import same_tokens


class TestConformance(StrategyConformance):
    def strategy(self):
        return PromptLookup(draft_tokens=4)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: PromptLookup(5, max_ngram=2), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    assert_laws(lambda model: PromptLookup(3, max_ngram=2))


def by_searching(text: list[int], max_ngram: int, count: int) -> list[int]:
    """Try all suffixes at all places, the longest and the latest first."""
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                endless = list(text)
                while len(endless) < start + n + count:
                    endless.append(endless[len(endless) - (len(text) - start - n)])
                return endless[start + n : start + n + count]
    return []


def test_the_index_finds_what_a_search_of_the_whole_text_finds():
    rng = random.Random(0)
    found = 0
    for _ in range(60):
        index, text = NgramIndex(3), [rng.randrange(6)]
        for _ in range(30):
            text += [rng.randrange(6) for _ in range(rng.randint(1, 3))]
            ours, expected = index.copy(text, 5), by_searching(text, 3, 5)
            assert ours == expected, f"after {text} the index copies {ours}, a search {expected}"
            found += bool(ours)
    assert found > 1000, f"only {found} of 1800 look-ups found something"


def test_a_text_without_repetition_is_not_drafted():
    assert NgramIndex(3).copy([1, 2, 3, 4], 5) == []
    assert NgramIndex(3).copy([7], 5) == []


def test_a_loop_is_accepted_at_full_length():
    """A model that only counts on in a circle of three: all of each draft is right."""
    model = tiny_models.build("llama", num_hidden_layers=1)
    with torch.no_grad():  # without attention and MLP the next token is a function of the last one
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = torch.nn.functional.one_hot(torch.arange(tiny_models.VOCABULARY) % 3, 32).float()
        model.model.embed_tokens.weight.copy_(states)
        model.lm_head.weight.zero_()
        for token in (3, 4, 5):
            model.lm_head.weight[token, (token - 1) % 3] = 1.0
    strategy = PromptLookup(draft_tokens=7)
    out = strategy.generate(
        model, torch.tensor([[3, 4, 5, 3]]), attention_mask=torch.ones(1, 4), do_sample=False, max_new_tokens=32
    )
    expected = torch.tensor([[3, 4, 5, 3] + [4, 5, 3] * 11])[:, :36]
    same_tokens(out, expected, "a loop of three tokens")
    assert strategy.report.target_calls == 4, strategy.report  # 8 a call, the prompt's included
    assert strategy.report.details["mean_accepted"] == 7.0


def test_a_row_that_finds_nothing_drafts_nothing_while_another_does():
    model = tiny_models.shared("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8], [10, 11, 12, 13, 14, 15, 16, 17]])
    strategy = PromptLookup(draft_tokens=4)
    strategy.generate(model, ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    rows = strategy.report.details["rows"]
    alone = PromptLookup(draft_tokens=4)
    alone.generate(model, ids[:1], attention_mask=torch.ones(1, 8), do_sample=False, max_new_tokens=4)
    assert rows[0]["drafted"] == alone.report.details["drafted"], "a row's drafts depend on its batch mates"


@pytest.mark.parametrize("options", [{"draft_tokens": -1}, {"max_ngram": 0}, {"max_ngram": True}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PromptLookup(**options)
