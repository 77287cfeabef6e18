"""DySpec: trees grown by estimated acceptance. That they are those of the greedy heap, test_best_first.py proves."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.dyspec import DySpec
from hf_ext.generation.speculative import best_first
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance


def draft(kind: str = "llama", strength: float = 0.15):
    return exactness.perturbed(tiny_models.shared(kind), strength)


class TestConformance(StrategyConformance):
    def strategy(self):
        return DySpec(draft(), nodes=5, depth=3)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: DySpec(draft(kind), 4, 3), kinds=(kind,))


@pytest.mark.parametrize("nodes", [10])
def test_sampled_text_follows_the_law_of_generate(nodes):
    model, other = (exactness.small_vocabulary(vocabulary=6, seed=seed) for seed in (None, 1))
    settings = {"prompt": torch.tensor([[3, 5, 2]]), "top_p": 0.9, "temperature": 1.3}
    exactness.assert_sampling_law(lambda model: DySpec(other, nodes, 3), model, draws=2500, beyond=3, **settings)


def test_a_tree_that_prefers_likely_tokens_breaks_the_law(monkeypatch):
    """What the test above can see: siblings tried in the order of their probabilities, not of drawing."""
    draw = best_first.gumbel_top_k

    def sorted_draws(scores, k):
        drawn = draw(scores, min(k, 2))
        values = scores.gather(1, drawn.clamp(min=0)).masked_fill(drawn < 0, -torch.inf)
        return drawn.gather(1, values.argsort(descending=True))

    monkeypatch.setattr(best_first, "gumbel_top_k", sorted_draws)
    model, other = (exactness.small_vocabulary(vocabulary=6, seed=seed) for seed in (None, 1))
    settings = {"prompt": torch.tensor([[3, 5, 2]]), "temperature": 1.3}
    with pytest.raises(AssertionError, match="away from the law"):
        exactness.assert_sampling_law(lambda model: DySpec(other, 8, 3), model, draws=2500, beyond=2, **settings)


def test_a_tree_of_sixty_nodes_takes_a_draft_call_a_level():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    torch.manual_seed(0)
    strategy = DySpec(draft(), nodes=60, depth=6)
    trees = exactness.trees_of(strategy, model, ids, attention_mask=mask, do_sample=True, max_new_tokens=18)
    assert trees[0].nodes == 60
    assert strategy.report.draft_calls <= 6 * strategy.report.details["steps"]


def test_likely_branches_get_more_nodes():
    """Over many trees, the first child of the root has more below it the likelier it is."""
    model, (ids, _) = tiny_models.shared("llama"), tiny_models.prompts((6,))
    torch.manual_seed(0)
    settings = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 200, "temperature": 0.5}
    tree = exactness.trees_of(DySpec(draft(), nodes=12, depth=4), model, ids, **settings)[0]
    pairs = []
    for lane in range(tree.lanes):
        below = {0}
        for node, parent in enumerate(tree.parents[lane][: tree.size(lane)]):
            if parent in below:
                below.add(node)
        pairs.append((float(tree.probabilities[lane, 0, tree.tokens[lane, 0]]), float(len(below))))
    correlation = torch.corrcoef(torch.tensor(pairs).T)[0, 1]
    assert correlation > 0.5, f"correlation of probability and size: {correlation:.2f}"


def test_a_threshold_makes_trees_smaller():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    drafted = []
    for threshold in (0.0, 0.8, 1.0):
        torch.manual_seed(0)
        strategy = DySpec(draft(), nodes=30, threshold=threshold)
        strategy.generate(model, ids, attention_mask=mask, do_sample=True, max_new_tokens=12, pad_token_id=0)
        drafted.append(strategy.report.details["drafted"] / strategy.report.details["steps"])
    assert drafted[0] > drafted[1] > drafted[2] == 0, f"nodes a step: {drafted}"


@pytest.mark.parametrize(
    ("options", "word"), [({"nodes": 0}, "nodes"), ({"depth": 0}, "depth"), ({"threshold": 2}, "threshold")], ids=str
)
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        DySpec(draft(), **options)
