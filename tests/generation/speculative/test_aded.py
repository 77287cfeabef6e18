"""ADED: a tree search over tri-gram statistics."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from hf_ext.generation.aded import ADED, TriGramDrafter, TriGrams, search
from hf_ext.generation.speculative.context import Outcome
from hf_ext.generation.speculative.drafter import Verified
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.drafts_from_text import assert_laws
from hf_ext.testing.strategy import StrategyConformance


class TestConformance(StrategyConformance):
    def strategy(self):
        return ADED(nodes=10)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: ADED(nodes=12, depth=5), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    assert_laws(lambda model: ADED(nodes=7))


def some_statistics(seed: int) -> TriGrams:
    rng, known = random.Random(seed), TriGrams(branches=3)
    for _ in range(200):
        weight = rng.random()
        known.learn(rng.randrange(5), rng.randrange(5), rng.sample(range(5), 2), [weight, 1 - weight])
    return known


def test_probabilities_fall_and_leave_room_for_what_is_not_known():
    known = some_statistics(0)
    for before in range(5):
        for last in range(5):
            chances = [chance for _, chance in known.after(before, last)]
            assert chances == sorted(chances, reverse=True)
            assert 0 < sum(chances) < 1
    assert known.after(0, 9) == [], "nothing was said after 9"


def test_what_was_said_last_counts_most():
    known = TriGrams()
    for token in (3, 3, 4):
        known.learn(1, 2, [token], [1.0])
    # After b the counts are 3: 1.5 / 2, 4: 1, and so after a b; both are normalised with one count more.
    single = {3: 0.75 / 2.75, 4: 1 / 2.75}
    expected = {token: (weight + single[token]) / 2.75 for token, weight in ((3, 0.75), (4, 1.0))}
    found = dict(known.after(1, 2))
    assert list(found) == [4, 3]
    assert found == pytest.approx(expected)


def by_gain(known: TriGrams, before: int, last: int, nodes: int, depth: int) -> float:
    """Return the largest sum of path probabilities that a tree of so many nodes can have."""
    frontier, level = [], [(before, last, 1.0)]
    for _ in range(depth):
        level = [(b, t, p * q) for a, b, p in level for t, q in known.after(a, b)]
        frontier += [p for _, _, p in level]
    return sum(sorted(frontier, reverse=True)[:nodes])


def test_the_search_finds_most_of_what_the_best_tree_would_accept():
    shares = []
    for seed in range(20):
        known = some_statistics(seed)
        tokens, parents = search(known, 0, 1, nodes=12, depth=4, exploration=1.0)
        assert len(tokens) == len(parents) == 12
        assert len(set(zip(parents, tokens, strict=True))) == 12, "a path is there twice"
        gain, chances = 0.0, []
        for token, parent in zip(tokens, parents, strict=True):
            grandparent = parents[parent] if parent >= 0 else None
            above = 0 if parent < 0 else 1 if grandparent < 0 else tokens[grandparent]
            law = dict(known.after(above, 1 if parent < 0 else tokens[parent]))
            chances.append(law[token] * (chances[parent] if parent >= 0 else 1.0))
            gain += chances[-1]
        shares.append(gain / by_gain(known, 0, 1, 12, 4))
    assert max(shares) <= 1 + 1e-9
    assert min(shares) > 0.8, f"the worst of 20 searches finds {min(shares):.3f} of what the best tree has"


def test_exploration_makes_trees_wider():
    known = TriGrams()
    for token in range(1, 7):  # one very likely chain, and a less likely way out at each token
        known.learn(token - 1, token, [token + 1, 9 + token], [0.8, 0.2])

    def width(exploration: float) -> int:
        return search(known, 0, 1, 6, 6, exploration)[1].count(-1)

    assert width(0.0) == 1 < width(3.0), (width(0.0), width(3.0))


def test_a_search_ends_where_nothing_is_known():
    known = TriGrams()
    known.learn(1, 2, [3], [1.0])
    assert search(known, 1, 2, 10, 5, 1.0) == ([3], [-1])
    assert search(known, 1, 7, 10, 5, 1.0) == ([], [])
    assert search(known, 1, 2, 10, 0, 1.0) == ([], [])


def test_the_targets_law_is_learned_at_every_node():
    known = TriGrams(branches=2)
    logits = torch.full((1, 3, 6), -20.0)
    for node, (first, second) in enumerate([(1, 2), (3, 4), (0, 5)]):
        logits[0, node, first], logits[0, node, second] = 1.0, 0.0
    tree = DraftTree.from_lists([[2, 1]], [[-1, -1]])  # 2 is rejected, 1 accepted, 3 follows
    verified = Verified(tree, logits, [Outcome([1], [1, 0], [], [])], continues=[0])
    TriGramDrafter(known, 4, 4, 1.0).observe(SimpleNamespace(texts=[[5, 4, 1, 0]]), verified)
    likelier = 1 / (1 + torch.tensor(-1.0).exp().item())
    for before, last, expected in ((5, 4, (1, 2)), (4, 2, (3, 4)), (4, 1, (0, 5))):
        found = known.after(before, last)
        assert tuple(token for token, _ in found) == expected, f"after {before} {last}: {found}"
        # One meeting: (n + P) / 2, where P = n / 2 is what the single token says.
        assert found[0][1] == pytest.approx(0.75 * likelier, abs=1e-6)


def test_calls_fall_when_the_statistics_are_kept():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()

    def calls(strategy):
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
        return strategy.report.target_calls

    fresh, kept = ADED(nodes=16), ADED(nodes=16, keep=True)
    first = calls(fresh)
    assert calls(fresh) == first == calls(kept), "a first call depends on keep, or a second one on the first"
    assert calls(kept) < first


@pytest.mark.parametrize("options", [{"nodes": 0}, {"depth": True}, {"exploration": -1}, {"keep": 1}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ADED(**options)
