"""Best-first trees are those of the papers' algorithms, node for node, on laws that stand in for a draft model."""

from __future__ import annotations

import heapq
import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_ext.generation.speculative import best_first
from hf_ext.generation.speculative.best_first import BestFirstDrafter
from hf_ext.generation.speculative.growing import GrowingTrees

VOCABULARY = 6


def law_after(prefix, sharpness: float = 1.5) -> torch.Tensor:
    """The law of the next token, a function of the tokens before it."""
    generator = torch.Generator().manual_seed(hash(tuple(prefix)) % 2**31)
    return (sharpness * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)).softmax(-1)


def draws_after(law: torch.Tensor, k: int) -> torch.Tensor:
    """Draws without replacement whose chance is a function of the law, so that two algorithms get the same."""
    rounded = tuple(round(mass, 9) for mass in law.tolist())  # it may have been through a logarithm
    generator = torch.Generator().manual_seed(hash(rounded) % 2**31)
    order = law.log() - torch.empty_like(law).exponential_(generator=generator).log()
    return torch.nn.functional.pad(order.argsort(descending=True)[:k], (0, max(k - len(law), 0)), value=-1)


class TabulatedTrees(GrowingTrees):
    """Trees that look laws up."""

    calls = 0

    def read(self, frontier):
        type(self).calls += 1
        start = sum(map(len, self.laws))
        where = [(lane, node) for lane, nodes in enumerate(frontier) for node in nodes]
        assert all(node not in self.lines[lane] for lane, node in where), "a node is read twice"
        for line, (lane, node) in enumerate(where, start):
            self.lines[lane][node] = line
        self.laws.append(torch.stack([law_after((lane, *self.prefixes[lane][node + 1])) for lane, node in where]))
        return self.laws[-1]


@pytest.fixture
def tabulated(monkeypatch):
    TabulatedTrees.calls = 0
    monkeypatch.setattr(best_first, "GrowingTrees", TabulatedTrees)
    monkeypatch.setattr(
        best_first, "gumbel_top_k", lambda scores, k: torch.stack([draws_after(row.exp(), k) for row in scores])
    )


def grow(lanes: int, greedy: bool = False, drafter: type[BestFirstDrafter] = BestFirstDrafter, **options):
    """Trees as paths of tokens, in the order of their nodes, and the tree itself."""
    found = drafter(None, **options)
    found.draft = SimpleNamespace(read_nodes=[[] for _ in range(lanes)])
    context = SimpleNamespace(
        lanes=list(range(lanes)), texts=[[0]] * lanes, greedy=greedy, device="cpu",
        useful_depth=lambda wanted: wanted, useful_nodes=lambda wanted: wanted,
    )  # fmt: skip
    tree = found.propose(context)
    paths = []
    for lane in range(lanes):
        own: list[tuple[int, ...]] = []
        for node in range(tree.size(lane)):
            parent = tree.parents[lane][node]
            own.append((*(own[parent] if parent >= 0 else ()), int(tree.tokens[lane, node])))
        paths.append(own)
    return paths, tree


def heap_tree(lane: int, nodes: int, depth: int, threshold: float = 0.0) -> list[tuple[int, ...]]:
    """The algorithm of DySpec as it stands: pop the best slot, draw, push two slots."""
    count = itertools.count()
    heap = [(-1.0, next(count), (), 0, 1.0)]
    tree: list[tuple[int, ...]] = []
    while heap and len(tree) < nodes:
        value, _, parent, number, reached = heapq.heappop(heap)
        if -value <= threshold:
            break
        law = law_after((lane, *parent))
        token = int(draws_after(law, VOCABULARY)[number])
        tree.append((*parent, token))
        q = float(law[token])
        if len(parent) + 1 < depth:
            heapq.heappush(heap, (-reached * q, next(count), tree[-1], 0, reached * q))
        if number + 1 < VOCABULARY:
            heapq.heappush(heap, (value + reached * q, next(count), parent, number + 1, reached))
    return tree


@pytest.mark.parametrize(("nodes", "depth"), [(1, 3), (7, 2), (12, 5), (40, 4), (60, 9)])
def test_drawn_trees_are_those_of_the_greedy_heap(tabulated, nodes, depth):
    paths, tree = grow(25, nodes=nodes, depth=depth)
    for lane, found in enumerate(paths):
        expected = heap_tree(lane, nodes, depth)
        assert sorted(found) == sorted(expected)
        for parent in {path[:-1] for path in found}:
            order = [path[-1] for path in found if path[:-1] == parent]
            drawn = draws_after(law_after((lane, *parent)), VOCABULARY).tolist()
            assert order == drawn[: len(order)], f"children of {parent} stand as {order}, drawn as {drawn}"
    assert TabulatedTrees.calls <= depth, f"{TabulatedTrees.calls} draft calls for {depth} levels"
    assert tree.probabilities is not None


def test_a_threshold_leaves_poor_slots_empty(tabulated):
    paths, _ = grow(25, nodes=40, depth=5, threshold=0.1)
    for lane, found in enumerate(paths):
        assert sorted(found) == sorted(heap_tree(lane, 40, 5, 0.1))
    assert {len(found) for found in paths} != {40}


def test_laws_stand_where_their_children_were_drawn(tabulated):
    paths, tree = grow(4, nodes=20, depth=4)
    for lane, found in enumerate(paths):
        for parent in {path[:-1] for path in found}:
            place = found.index(parent) + 1 if parent else 0
            assert torch.equal(tree.probabilities[lane, place], law_after((lane, *parent)))


def products(lane: int, path: tuple[int, ...]) -> float:
    value = 1.0
    for at, token in enumerate(path):
        value *= float(law_after((lane, *path[:at]))[token])
    return value


def connected(slots: tuple, size: int, depth: int):
    """Go through all trees of `size` nodes, each once."""
    if not size:
        yield ()
        return
    for at, path in enumerate(slots):
        below = tuple((*path, token) for token in range(VOCABULARY)) if len(path) < depth else ()
        for rest in connected(slots[at + 1 :] + below, size - 1, depth):
            yield (path, *rest)


@pytest.mark.parametrize(("nodes", "depth"), [(1, 2), (3, 3), (4, 2), (5, 4)])
def test_no_tree_of_the_same_size_has_a_larger_expected_acceptance(tabulated, nodes, depth):
    paths, _ = grow(3, nodes=nodes, depth=depth, drawn=False)
    roots = tuple((token,) for token in range(VOCABULARY))
    for lane, found in enumerate(paths):
        value = {}
        for tree in connected(roots, nodes, depth):
            for path in tree:
                if path not in value:
                    value[path] = products(lane, path)
        best = max(sum(value[path] for path in tree) for tree in connected(roots, nodes, depth))
        ours = sum(products(lane, path) for path in found)
        assert ours == pytest.approx(best, rel=1e-6), f"lane {lane}: expected {ours:.6f} accepted, possible {best:.6f}"


def test_growth_ends_when_a_level_adds_too_little(tabulated):
    for gain in (0.0, 0.25, 0.4, 2.0):
        paths, _ = grow(25, nodes=10, depth=6, drawn=False, gain=gain)
        for lane, found in enumerate(paths):
            expected, before = [], -1.0
            for depth in range(1, 7):  # the best tree of each depth, until one is hardly better than the last
                every = {
                    path: products(lane, path)
                    for path in expected + [(*path, t) for path in [(), *expected] for t in range(VOCABULARY)]
                    if len(path) <= depth
                }
                expected = sorted(every, key=every.get, reverse=True)[:10]
                now = sum(every[path] for path in expected)
                if now - max(before, 0) < gain:
                    break
                before = now
            assert sorted(found) == sorted(expected), f"gain {gain}, lane {lane}"


class Guessing(BestFirstDrafter):
    """Reads the likeliest tokens ahead, without being told."""

    def guess(self, context, lane, prefix):
        found = []
        for _ in range(3):
            found.append(int(law_after((lane, *prefix, *found)).argmax()))
        return found


@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_read_ahead_saves_calls_and_changes_no_tree(tabulated, greedy):
    options = {"nodes": 12, "depth": 6, "greedy": greedy, "threshold": 0.02}
    plain, _ = grow(12, **options)
    ahead, _ = grow(12, drafter=Guessing, **options)
    assert ahead == plain
    calls = []
    for drafter in (BestFirstDrafter, Guessing):
        TabulatedTrees.calls = 0
        grow(1, drafter=drafter, **options)
        calls.append(TabulatedTrees.calls)
    assert calls[1] < calls[0], f"draft calls without and with guesses: {calls}"
