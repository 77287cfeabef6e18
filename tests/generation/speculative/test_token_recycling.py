"""Token recycling: trees grown from what the target said before."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_ext.generation.speculative.context import Outcome
from hf_ext.generation.speculative.drafter import Verified
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.token_recycling import RecyclingDrafter, Successors, TokenRecycling, template
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.drafts_from_text import assert_laws
from hf_ext.testing.strategy import StrategyConformance


class TestConformance(StrategyConformance):
    def strategy(self):
        return TokenRecycling(nodes=12)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: TokenRecycling(nodes=14, branches=4), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    assert_laws(lambda model: TokenRecycling(nodes=7, branches=4))


@pytest.mark.parametrize(("nodes", "branches", "depth"), [(80, 8, 6), (25, 3, 4), (5, 1, 9)])
def test_the_template_has_the_likeliest_paths(nodes, branches, depth):
    shape = template(nodes, branches, depth)
    assert len(shape) == nodes
    paths = []
    for parent, rank in shape:
        paths.append((*(paths[parent] if parent >= 0 else ()), rank))
    assert len(set(paths)) == nodes, "a path is there twice"
    chances = sorted((0.5 ** (sum(path) + len(path)) for path in paths), reverse=True)
    longest = min(depth, 7)  # a longer path than 7 is below any of the 80 likeliest
    everything = itertools.chain.from_iterable(
        itertools.product(range(branches), repeat=n) for n in range(1, (depth if branches == 1 else longest) + 1)
    )
    best = sorted((0.5 ** (sum(path) + len(path)) for path in everything), reverse=True)[:nodes]
    assert chances == best, f"the template's paths add up to {sum(chances)}, the likeliest to {sum(best)}"


def test_a_template_ends_where_there_are_no_more_paths():
    assert len(template(80, 2, 2)) == 6


def test_trees_are_filled_breadth_first_and_end_where_nothing_is_known():
    successors = Successors(10, 3)
    successors.learn(np.array([1, 2, 4]), np.array([[2, 3, 4], [5, 6, 7], [1, 2, 0]]))
    tokens, parents = successors.grow(np.array([1, 9]), ((-1, 0), (-1, 1), (-1, 2), (0, 0), (0, 1), (1, 0), (2, 2)))
    # 1 -> 2, 3, 4; 2 -> 5, 6; nothing is known of 3; 4 -> 0 in rank 2. Of 9 nothing is known.
    assert tokens == [[2, 3, 4, 5, 6, 0], []]
    assert parents == [[-1, -1, -1, 0, 0, 2], []]


def test_neighbours_in_the_prompt_are_known_from_the_start():
    successors = Successors(10, 2)
    successors.follow([1, 2, 1, 3, 1, 2, 1, 2, 4])
    assert successors.table[[1, 2, 3]].tolist() == [[2, 3], [4, 1], [1, -1]]


def test_every_node_is_recycled_and_accepted_ones_have_the_last_word():
    drafter = RecyclingDrafter(8, 2, 4, Successors(6, 2), {})
    #   root 0 -> 1 -> 3   accepted: 1, 3
    #         `-> 2 -> 1   rejected; 1 stands in the tree twice, 5 is below a lane that is done
    tree = DraftTree.from_lists([[1, 2, 3, 1], [5]], [[-1, -1, 0, 1], [-1]])
    logits = torch.zeros(2, 5, 6)
    for node, (first, second) in enumerate([(1, 2), (3, 4), (0, 5), (2, 0), (5, 4)]):
        logits[0, node, first], logits[0, node, second] = 2.0, 1.0
    logits[1, 1, 3], logits[1, 1, 2] = 2.0, 1.0
    verified = Verified(tree, logits, [Outcome([0, 2], [1, 3, 2], [], []), Outcome([], [4], [], [])], continues=[0])
    drafter.observe(SimpleNamespace(texts=[[4, 0, 1, 3, 2]]), verified)
    expected = {0: [1, 2], 1: [3, 4], 2: [0, 5], 3: [2, 0], 4: [-1, -1], 5: [3, 2]}
    found = dict(enumerate(drafter.successors.table.tolist()))
    assert found == expected, f"the matrix is {found}, expected {expected}"


def test_a_call_begins_with_nothing_unless_the_matrix_is_kept():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()

    def calls(strategy):
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
        return strategy.report.target_calls

    fresh, kept = TokenRecycling(nodes=20), TokenRecycling(nodes=20, keep=True)
    first = calls(fresh)
    assert calls(fresh) == first == calls(kept), "a first call depends on keep, or a second one on the first"
    assert calls(kept) < first, "a matrix that has seen the text already saved no call"
    model = exactness.small_vocabulary(vocabulary=8)
    kept.generate(model, torch.tensor([[3, 4]]), do_sample=False, max_new_tokens=4)  # another vocabulary: a new matrix
    assert kept.report.details["matrix_bytes"] == 8 * 8 * 4


def test_the_matrix_of_the_papers_vocabulary_takes_less_than_two_megabytes():
    assert Successors(32_000, TokenRecycling().branches).bytes < 2e6


@pytest.mark.parametrize("options", [{"nodes": 0}, {"branches": -1}, {"depth": 1.5}, {"keep": 1}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenRecycling(**options)
