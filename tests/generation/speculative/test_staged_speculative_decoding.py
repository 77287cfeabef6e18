"""Staged speculative decoding: n-grams spare the draft model calls, and change nothing else."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from hf_ext.generation.staged_speculative_decoding import NGrams, StagedDrafter, StagedSpeculativeDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance


def draft(kind: str = "llama", strength: float = 0.15):
    return exactness.perturbed(tiny_models.shared(kind), strength)


class TestConformance(StrategyConformance):
    def strategy(self):
        return StagedSpeculativeDecoding(draft(), nodes=5, depth=3)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(
        lambda model: StagedSpeculativeDecoding(draft(kind), 4, 3, ngram_tokens=2), kinds=(kind,)
    )


def test_sampled_text_follows_the_law_of_generate():
    model, other = (exactness.small_vocabulary(vocabulary=6, seed=seed) for seed in (None, 1))
    settings = {"prompt": torch.tensor([[3, 5, 2]]), "top_p": 0.9, "temperature": 1.3}
    exactness.assert_sampling_law(
        lambda model: StagedSpeculativeDecoding(other, 8, 3, threshold=0.0), model, draws=2500, beyond=3, **settings
    )


def looping_prompt() -> torch.Tensor:
    """Text that repeats itself, as n-grams like it; greedy decoding of the tiny model goes on like that."""
    return torch.tensor([[7, 8, 9, 10] * 6])


def test_n_grams_save_draft_calls_and_leave_greedy_trees_alone():
    model, other = tiny_models.shared("llama"), draft(strength=0.05)
    settings = {"do_sample": False, "max_new_tokens": 60}
    calls, trees = [], []
    for ngram_tokens in (0, 4):
        strategy = StagedSpeculativeDecoding(other, nodes=10, depth=6, ngram_tokens=ngram_tokens)
        trees.append(exactness.trees_of(strategy, model, looping_prompt(), **settings))
        calls.append(strategy.report.draft_calls)
    for step, (without, ahead) in enumerate(zip(*trees, strict=True)):
        assert without.parents == ahead.parents, f"step {step}"
        assert torch.equal(without.tokens, ahead.tokens), f"step {step}"
    assert calls[1] < 0.85 * calls[0], f"draft calls without and with n-grams: {calls}"


def noting(propose, texts):
    """Propose, and note the texts that it was done for."""

    def noted(drafter, context):
        texts.append(list(context.texts[0]))
        return propose(drafter, context)

    return noted


def test_laws_of_what_was_read_ahead_are_those_of_the_draft_model():
    """Read together with the text before it, a node has the law it has when read alone."""
    model, other = tiny_models.shared("llama"), draft(strength=0.05)
    prompt = looping_prompt()
    torch.manual_seed(0)
    settings = {"do_sample": True, "max_new_tokens": 30, "temperature": 0.7, "top_k": 0}
    strategy = StagedSpeculativeDecoding(other, nodes=8, depth=5)
    texts: list[list[int]] = []
    with mock.patch.object(StagedDrafter, "propose", noting(StagedDrafter.propose, texts)):
        trees = exactness.trees_of(strategy, model, prompt, **settings)
    worst = 0.0
    for text, tree in zip(texts, trees, strict=True):
        paths = [[]]
        for node in range(tree.size(0)):
            paths.append([*paths[tree.parents[0][node] + 1], int(tree.tokens[0, node])])
        for node in tree.children(0):
            with torch.no_grad():
                law = (other(torch.tensor([text + paths[node + 1]])).logits[0, -1] / 0.7).softmax(-1)
            worst = max(worst, float((law - tree.probabilities[0, node + 1]).abs().max()))
    assert len(texts) > 3
    assert worst < 1e-4, f"largest difference {worst:.2e}"


def test_n_grams_back_off_to_shorter_ones_and_follow_what_was_last_seen():
    grams = NGrams(order=2)
    grams.learn([1, 2, 3, 9, 2, 4])
    assert grams.go_on([1, 2], 1) == [3]
    assert grams.go_on([5, 2], 1) == [4]
    assert grams.go_on([5], 4) == []
    grams.learn([1, 2, 3, 9, 2, 4, 1, 2, 6], start=6)
    assert grams.go_on([1, 2], 2) == [6]


def test_nothing_of_an_earlier_call_is_remembered():
    model, strategy = tiny_models.shared("llama"), StagedSpeculativeDecoding(draft(), nodes=6, depth=4)
    reports = []
    for _ in range(2):
        strategy.generate(model, looping_prompt(), do_sample=False, max_new_tokens=18)
        reports.append((strategy.report.draft_calls, strategy.report.target_calls))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"nodes": 0}, "nodes"), ({"ngram_tokens": -1}, "ngram_tokens"), ({"ngram_order": 0}, "ngram_order")],
    ids=str,
)
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        StagedSpeculativeDecoding(draft(), **options)
