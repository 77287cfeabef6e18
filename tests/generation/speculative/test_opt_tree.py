"""OPT-Tree: the draft tree of the largest expected acceptance. That it is the largest, test_best_first.py proves."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.opt_tree import OptTree
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy import StrategyConformance


def draft(kind: str = "llama", strength: float = 0.15):
    return exactness.perturbed(tiny_models.shared(kind), strength)


class TestConformance(StrategyConformance):
    def strategy(self):
        return OptTree(draft(), nodes=5, depth=3, threshold=0.05)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: OptTree(draft(kind), 4, 3, 0.0), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    model, other = (exactness.small_vocabulary(vocabulary=6, seed=seed) for seed in (None, 1))
    settings = {"prompt": torch.tensor([[3, 5, 2]]), "top_p": 0.9, "temperature": 1.3}
    exactness.assert_sampling_law(lambda model: OptTree(other, 7, 3, 0.0), model, draws=2500, beyond=3, **settings)


def expected_acceptance(model, text: list[int], tree, lane: int) -> list[float]:
    """Products of the draft model's probabilities down to each node of a tree."""
    paths, values = [], []
    for node in range(tree.size(lane)):
        parent = tree.parents[lane][node]
        paths.append([*(paths[parent] if parent >= 0 else []), int(tree.tokens[lane, node])])
        before = torch.tensor([text + paths[-1][:-1]])
        with torch.no_grad():
            law = model(before).logits[0, -1].softmax(-1)
        values.append((values[parent] if parent >= 0 else 1.0) * float(law[paths[-1][-1]]))
    return values


def test_trees_of_every_lane_hold_the_largest_products_of_draft_probabilities():
    """By going through all places that are not in the tree and hang under it, or under the root."""
    model, other, (ids, mask) = tiny_models.shared("llama"), draft(), tiny_models.prompts()
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    [tree, *_] = exactness.trees_of(OptTree(other, nodes=10, depth=3, threshold=0.0), model, ids, **settings)
    first = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=1)
    for lane in range(3):
        text = first[lane, ids.shape[1] - int(mask[lane].sum()) :].tolist()
        inside = expected_acceptance(other, text, tree, lane)
        assert len(inside) == 10
        paths = [[]]
        for node in range(10):
            paths.append([*paths[tree.parents[lane][node] + 1], int(tree.tokens[lane, node])])
        outside = 0.0
        for path, value in zip(paths, [1.0, *inside], strict=True):
            if len(path) == 3:
                continue
            with torch.no_grad():
                law = other(torch.tensor([text + path])).logits[0, -1].softmax(-1)
            law[[p[-1] for p in paths if p and p[:-1] == path]] = 0
            outside = max(outside, value * float(law.max()))
        assert outside <= min(inside) * (1 + 1e-5), (
            f"a node of {outside:.5f} is missing, one of {min(inside):.5f} there"
        )


def test_a_higher_threshold_saves_draft_calls():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    calls = []
    for threshold in (0.0, 0.3, 5.0):
        strategy = OptTree(draft(), nodes=8, depth=5, threshold=threshold)
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)
        calls.append(strategy.report.draft_calls / strategy.report.details["steps"])
    assert calls[0] > calls[1] > calls[2], f"draft calls a step: {calls}"
    assert calls[2] <= 1.0


def test_trees_shrink_to_what_a_static_cache_holds():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    strategy = OptTree(draft(), nodes=40)
    ours = strategy.generate(model, ids, cache_implementation="static", **settings)
    assert torch.equal(ours, model.generate(ids, **settings))
    assert strategy.report.accepted > 0


@pytest.mark.parametrize(
    ("options", "word"), [({"nodes": 0}, "nodes"), ({"depth": 0}, "depth"), ({"threshold": -1}, "threshold")], ids=str
)
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        OptTree(draft(), **options)
