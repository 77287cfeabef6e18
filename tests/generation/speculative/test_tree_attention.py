"""Draft trees as structures and as masks."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

from hf_ext.generation.speculative import tree_attention
from hf_ext.generation.speculative.tree import DraftTree, shape_of
from hf_ext.generation.speculative.tree_attention import mask_for, structure_of


def random_parents(nodes, rng):
    return tuple(rng.choice([-1, *range(node)]) for node in range(nodes))


def by_definition(lengths, columns, parents, queries, keys, window):
    """Who sees whom, key by key."""
    nodes = len(parents[0])
    mask = np.zeros((len(lengths), 1, queries, keys), dtype=bool)
    for lane, (length, held) in enumerate(zip(lengths, columns, strict=True)):

        def depth(node, lane=lane):
            return 0 if parents[lane][node] < 0 else 1 + depth(parents[lane][node])

        for query in range(queries):
            node = nodes - queries + query
            above, at = set(), node
            while at >= 0:
                above.add(at)
                at = parents[lane][at]
            for key in range(keys):
                if key < held:
                    position, visible = key + length - held, True
                elif key - held < nodes:
                    position, visible = length + depth(key - held), key - held in above
                else:
                    continue
                near = window is None or length + depth(node) - position < window
                mask[lane, 0, query, key] = visible and near
    return mask


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("window", [None, 4, 7, 50])
def test_masks_are_what_the_definition_says(even, window):
    rng = random.Random(0)
    for _ in range(60):
        lanes, nodes = rng.randint(1, 4), rng.randint(1, 9)
        queries = rng.randint(1, nodes)
        lengths = [rng.randint(0, 12)] * lanes if even else [rng.randint(0, 12) for _ in range(lanes)]
        # A layer with a window may have dropped what no query can see.
        dropped = [0 if window is None else rng.randint(0, max(n - window + 1, 0)) for n in lengths]
        if even:
            dropped = dropped[:1] * lanes
        columns = [n - d for n, d in zip(lengths, dropped, strict=True)]
        parents = [random_parents(nodes, rng) for _ in range(lanes)]
        if rng.random() < 0.5:
            parents = parents[:1] * lanes
        keys = max(columns) + nodes
        structure = structure_of(
            tuple(lengths), tuple(columns), parents, queries=queries, keys=keys, window=window
        )  # fmt: skip
        expected = torch.from_numpy(by_definition(lengths, columns, parents, queries, keys, window))
        found = structure.dense()
        assert found.shape == expected.shape
        assert torch.equal(structure.structure().dense(), expected), f"as an attention structure: {parents}"
        wrong = (found != expected).sum().item()
        assert wrong == 0, f"{wrong} entries wrong for lengths {lengths}, held {columns}, {parents}, window {window}"
        additive = mask_for("eager", structure, torch.float32, torch.device("cpu"))
        assert torch.equal(additive == 0, expected)
        assert additive.min() in (0, torch.finfo(torch.float32).min)
        if structure.is_causal:
            causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            assert torch.equal(expected, causal.expand_as(expected)), "called causal, but is not"


def test_a_block_mask_shows_the_same():
    structure = structure_of((5, 3), (5, 3), [(-1, 0, 0, 1), (-1, -1, 1, 2)], queries=3, keys=9)
    block = mask_for("flex_attention", structure, torch.float32, torch.device("cpu"))
    lanes, queries, keys = torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(9), indexing="ij")
    assert torch.equal(block.mask_mod(lanes, torch.zeros_like(lanes), queries, keys), structure.dense()[:, 0])


def test_masks_of_one_tree_are_made_without_a_warning():
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says it once in a process otherwise, perhaps before this test
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            structure_of((5, 5), (5, 5), [(-1, 0, 0)] * 2, queries=3, keys=8).dense()
    finally:
        torch.set_warn_always(always)


def test_bits_are_the_ancestors():
    parents = random_parents(70, random.Random(1))
    bits = structure_of((3,), (3,), [parents], queries=20, keys=73).ancestor_bits()
    assert bits.shape == (1, 20, 2)
    ancestors = shape_of(parents).ancestors[-20:]
    read = [[bool(int(bits[0, q, j // 64]) >> (j % 64) & 1) for j in range(70)] for q in range(20)]
    assert np.array_equal(np.array(read), ancestors)


def test_a_backend_that_registers_gets_the_structure_itself(monkeypatch):
    monkeypatch.setattr(tree_attention, "_BUILDERS", dict(tree_attention._BUILDERS))
    structure = structure_of((3,), (3,), [(-1, 0, 0)], queries=3, keys=6)
    with pytest.raises(ValueError, match=r"trees_of_mine.*eager, flex_attention, hf_ext, sdpa"):
        mask_for("trees_of_mine", structure, torch.float32, torch.device("cpu"))
    tree_attention.register("trees_of_mine", lambda structure, dtype, device: structure)
    assert mask_for("trees_of_mine", structure, torch.float32, torch.device("cpu")) is structure


def test_an_implementation_without_masks_still_takes_chains():
    chain = structure_of((3,), (3,), [(-1, 0, 1)], queries=2, keys=6)
    assert mask_for("some_flash_attention", chain, torch.float32, torch.device("cpu")) is None


def test_a_tree_says_what_is_wrong_with_it():
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="after its parent"):
        DraftTree(tokens, [[-1, 2, 0]])
    with pytest.raises(ValueError, match="lanes of 3 nodes"):
        DraftTree(tokens, [[-1, 0]])
    with pytest.raises(ValueError, match=r"nodes \+ 1, vocabulary"):
        DraftTree(tokens, [[-1, 0, 1]], probabilities=torch.ones(1, 3, 5))


def test_probes_and_padding_never_become_children():
    tree = DraftTree.from_lists([[5, 6, 7], [8]], [[-1, 0, 0], [-1]])
    assert tree.children(0) == {-1: [0], 0: [1, 2]}
    assert tree.children(1) == {-1: [0]}
    tree = DraftTree(torch.tensor([[5, 6, 7]]), [[-1, 0, 1]], candidates=[2])
    assert tree.children(0) == {-1: [0], 0: [1]}
