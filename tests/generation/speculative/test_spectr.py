"""SpecTr: several independent draft sequences."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.spectr import SpecTr
from hf_ext.generation.speculative_decoding import SpeculativeDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import same_tokens


def draft(kind: str = "llama", strength: float = 0.15):
    return exactness.perturbed(tiny_models.shared(kind), strength)


class TestConformance(StrategyConformance):
    def strategy(self):
        return SpecTr(draft(), sequences=2, draft_tokens=2)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: SpecTr(draft(kind), 2, 2), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    model, other = (exactness.small_vocabulary(vocabulary=6, seed=seed) for seed in (None, 1))
    settings = {"prompt": torch.tensor([[3, 5, 2]]), "top_p": 0.9, "temperature": 1.3}
    exactness.assert_sampling_law(lambda model: SpecTr(other, 3, 3), model, draws=2500, beyond=3, **settings)


def test_one_sequence_is_speculative_decoding():
    """With one draft rho is 1: the same random numbers lead to the same text."""
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    # A prompt that may be read in pieces is read before the first draft, by both.
    settings = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 18, "prefill_chunk_size": 64}
    texts = []
    for strategy in (SpecTr(draft(), 1, 4), SpeculativeDecoding(draft(), 4)):
        torch.manual_seed(5)
        texts.append(strategy.generate(model, ids, **settings))
    same_tokens(texts[0], texts[1], "one sequence against speculative decoding")


def test_every_sequence_is_there_in_the_order_of_drawing():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    torch.manual_seed(0)
    settings = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 16, "temperature": 1.5}
    shared = 0
    for tree in exactness.trees_of(SpecTr(draft(), 5, 3), model, ids, **settings):
        for lane in range(tree.lanes if tree.nodes else 0):
            depth = max(tree.depths(lane))
            through = dict.fromkeys(range(-1, tree.size(lane)), 0) | {-1: 5}
            for node in range(-1, tree.size(lane)):
                children = tree.draws[lane].get(node, [])
                at_end = node >= 0 and tree.depths(lane)[node] == depth
                assert len(children) == (0 if at_end else through[node])
                assert [tree.parents[lane][child] for child in children] == [node] * len(children)
                assert sorted(set(children)) == list(dict.fromkeys(children)), "new children are numbered as drawn"
                for child in children:
                    through[child] += 1
            shared += any(count > 1 for node, count in through.items() if node >= 0)
    assert shared, "some sequences have a common beginning"


def test_sequences_are_independent_draws_from_the_noted_law():
    model, other = (exactness.small_vocabulary(vocabulary=4, seed=seed) for seed in (None, 1))
    torch.manual_seed(0)
    settings = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2000, "temperature": 2.0}
    pairs, expected = torch.zeros(4, 4), torch.zeros(4, 4)
    tree = exactness.trees_of(SpecTr(other, 3, 2), model, torch.tensor([[1, 2]]), **settings)[0]
    for lane in range(tree.lanes):
        for node, children in tree.draws[lane].items():
            if len(children) > 1:
                first, second = tree.tokens[lane, children[:2]].tolist()
                pairs[first, second] += 1
                expected += torch.outer(tree.probabilities[lane, node + 1], tree.probabilities[lane, node + 1])
    deviation = (pairs - expected).abs() / expected.clamp(min=1).sqrt()
    assert deviation.max() < 4.5, f"largest deviation {deviation.max():.1f} standard errors"


def test_the_target_as_draft_model_has_all_its_tokens_accepted():
    model = tiny_models.shared("llama")
    strategy = SpecTr(model, 3, 4)
    torch.manual_seed(0)
    strategy.generate(model, tiny_models.prompts()[0][:1], do_sample=True, max_new_tokens=21)
    assert strategy.report.details["mean_accepted"] == 4.0
    assert strategy.report.draft_calls == 4 * strategy.report.details["steps"]


def test_greedy_sequences_begin_with_the_likeliest_tokens_and_go_on_alone():
    model = tiny_models.shared("llama")
    [tree, *_] = exactness.trees_of(
        SpecTr(draft(), 3, 3), model, tiny_models.prompts()[0][:1], do_sample=False, max_new_tokens=10
    )
    assert tree.parents == [[-1, -1, -1, 0, 1, 2, 3, 4, 5]]
    assert tree.probabilities is None


def test_more_sequences_are_accepted_more_often():
    model, other = (exactness.small_vocabulary(vocabulary=16, seed=seed) for seed in (None, 1))
    accepted = []
    for sequences in (1, 4):
        torch.manual_seed(0)
        strategy = SpecTr(other, sequences, 3)
        strategy.generate(
            model, torch.tensor([[3, 5]]), do_sample=True, max_new_tokens=24, num_return_sequences=100, pad_token_id=0
        )
        accepted.append(strategy.report.details["mean_accepted"])
    assert accepted[1] > accepted[0] + 0.1, f"mean accepted tokens with 1 and 4 sequences: {accepted}"


@pytest.mark.parametrize(("options", "word"), [({"sequences": 0}, "sequences"), ({"draft_tokens": -1}, "draft_tokens")])
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        SpecTr(draft(), **options)
