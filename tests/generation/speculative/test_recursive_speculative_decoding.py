"""Recursive speculative decoding: siblings drawn without replacement, by level or by stochastic beam search."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.recursive_speculative_decoding import RecursiveSpeculativeDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance

#: Both kinds of trees.
SHAPES = ({"branching": (2, 1, 1)}, {"beam_width": 3, "beam_depth": 2})


def draft(kind: str = "llama", strength: float = 0.15):
    return exactness.perturbed(tiny_models.shared(kind), strength)


class TestConformance(StrategyConformance):
    def strategy(self):
        return RecursiveSpeculativeDecoding(draft(), branching=(2, 2))


class TestConformanceOfTheBeam(StrategyConformance):
    models = ("llama", "gemma3")

    def strategy(self):
        return RecursiveSpeculativeDecoding(draft(), beam_width=2, beam_depth=2)


@pytest.mark.parametrize(
    ("kind", "shape"), [(kind, SHAPES[at % 2]) for at, kind in enumerate(tiny_models.DECODERS)], ids=str
)
def test_greedy_text_is_that_of_generate(kind, shape):
    exactness.assert_greedy_identity(lambda model: RecursiveSpeculativeDecoding(draft(kind), **shape), kinds=(kind,))


@pytest.mark.parametrize("shape", [{"branching": (3, 2, 1)}, {"beam_width": 3, "beam_depth": 3}], ids=str)
def test_sampled_text_follows_the_law_of_generate(shape):
    model, other = (exactness.small_vocabulary(vocabulary=6, seed=seed) for seed in (None, 1))
    settings = {"prompt": torch.tensor([[3, 5, 2]]), "top_p": 0.9, "temperature": 1.3}
    exactness.assert_sampling_law(
        lambda model: RecursiveSpeculativeDecoding(other, **shape), model, draws=2500, beyond=3, **settings
    )


def sampled_trees(strategy, **settings):
    torch.manual_seed(0)
    ids, mask = tiny_models.prompts()
    model = tiny_models.shared("llama")
    settings = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 16, **settings}
    return exactness.trees_of(strategy, model, ids, **settings)


def test_each_level_branches_as_asked_and_siblings_are_distinct():
    tree = sampled_trees(RecursiveSpeculativeDecoding(draft(), branching=(3, 2, 1)))[0]
    for lane in range(tree.lanes):
        assert [tree.depths(lane).count(level) for level in (1, 2, 3)] == [3, 6, 6]
        for children in tree.children(lane).values():
            tokens = tree.tokens[lane, children].tolist()
            assert len(set(tokens)) == len(tokens), f"siblings {tokens}"


def test_the_beam_has_as_many_distinct_sequences_as_asked_at_each_level():
    for tree in sampled_trees(RecursiveSpeculativeDecoding(draft(), beam_width=4, beam_depth=3), temperature=1.5)[:3]:
        for lane in range(tree.lanes):
            assert [tree.depths(lane).count(level) for level in (1, 2, 3)] == [4, 4, 4]
            places = set(zip(tree.parents[lane], tree.tokens[lane].tolist(), strict=True))
            assert len(places) == tree.nodes, "a sequence is there twice"


def test_tokens_that_processors_rule_out_are_not_drafted():
    """Two tokens are possible, three are asked for."""
    for strategy in (
        RecursiveSpeculativeDecoding(draft(), branching=(3, 3)),
        RecursiveSpeculativeDecoding(draft(), beam_width=5, beam_depth=2),
    ):
        tree = sampled_trees(strategy, top_k=2, temperature=2.0)[0]
        sizes = [tree.size(lane) for lane in range(tree.lanes)]
        assert sizes == [6, 6, 6]
        for lane in range(tree.lanes):
            for children in tree.children(lane).values():
                assert len(children) == 2


def test_greedy_trees_hold_the_likeliest_tokens():
    model = draft()
    ids = tiny_models.prompts()[0][:1]
    settings = {"do_sample": False, "max_new_tokens": 12}
    [tree, *_] = exactness.trees_of(
        RecursiveSpeculativeDecoding(model, branching=(3,)), tiny_models.shared("llama"), ids, **settings
    )
    text = torch.cat([ids, tiny_models.shared("llama").generate(ids, do_sample=False, max_new_tokens=1)[:, -1:]], dim=1)
    assert tree.probabilities is None
    assert tree.tokens[0].tolist() == model(text).logits[0, -1].topk(3).indices.tolist()
    [tree, *_] = exactness.trees_of(
        RecursiveSpeculativeDecoding(model, beam_width=3, beam_depth=2), tiny_models.shared("llama"), ids, **settings
    )
    every = model(text).logits[0, -1].log_softmax(-1)[:, None] + model(
        torch.cat([text.expand(96, -1), torch.arange(96)[:, None]], dim=1)
    ).logits[:, -1].log_softmax(-1)
    firsts = tree.tokens[0, :3].tolist()
    best = every[firsts].flatten().topk(3).indices.tolist()
    expected = [(firsts[index // 96], index % 96) for index in best]
    found = [(tree.tokens[0, tree.parents[0][node]].item(), tree.tokens[0, node].item()) for node in (3, 4, 5)]
    assert found == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_target_as_draft_model_has_a_whole_path_accepted(shape):
    model = tiny_models.shared("llama")
    strategy = RecursiveSpeculativeDecoding(model, **shape)
    torch.manual_seed(0)
    strategy.generate(model, tiny_models.prompts()[0][:1], do_sample=True, max_new_tokens=25)
    depth = shape.get("beam_depth", 3)
    # A beam may leave the accepted sequence; a fixed tree goes on below every node.
    accepted = strategy.report.details["mean_accepted"]
    assert accepted == depth if "branching" in shape else accepted > 1
    assert strategy.report.draft_calls == depth * strategy.report.details["steps"]


def test_trees_shrink_to_what_a_static_cache_holds():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    for shape in ({"branching": (4, 3, 2)}, {"beam_width": 6, "beam_depth": 4}):
        strategy = RecursiveSpeculativeDecoding(draft(), **shape)
        ours = strategy.generate(model, ids, cache_implementation="static", **settings)
        assert torch.equal(ours, expected)
        assert strategy.report.accepted > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [({"branching": (2, 0)}, "branching"), ({"branching": 3}, "branching"), ({"beam_width": 0}, "beam_width")],
    ids=str,
)
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        RecursiveSpeculativeDecoding(draft(), **options)
