"""Draft trees grown where they are most likely to be accepted.

A tree of a given number of nodes may spend them anywhere. Every place where a node could be added is
a *slot* with a value, an estimate from the draft law alone of the probability that the target's walk
gets there; values fall from a slot to those that open up below and beside it. Best-first growth fills
the most valuable slot again and again, one call of the draft model a node. Since values only fall, the
slots that it fills are simply the most valuable ones of all, so a whole level can be read in one call:

    read the nodes of the tree that have not been read   (one draft call for all lanes)
    offer what could stand below them, with its slots
    keep the `budget` most valuable nodes of all that were offered

A node is read only while something below it could still be kept.

*Why drawing stays exact.* Slot `i` below node `u` is filled by the i-th draw without replacement from
the law at `u`; its value is that of `u` times the probability that the draws before have left. Think of
all draws of all nodes as made in advance. Which slots are among the most valuable `budget` ones is
decided for a slot by the slots of higher value. Those neither lie below it nor come after it at its
parent, where values are lower, so they do not depend on which token the slot holds: given all that
stands before a kept draw, it has the law of a draw. What was drawn and not kept is not held back for
what it is, but because its place was not worth a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import ModelDrafter
from hf_ext.generation.speculative.growing import GrowingTrees
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.without_replacement import gumbel_top_k

#: Line of the parent, token, value of the slot and of the node, of everything that is offered; by lines.
Offers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Kept:
    """The nodes of one lane's tree, most valuable first, which puts parents before their children.

    Args:
        nodes: numbers of the nodes among all that were ever added.
        slots: value of each node's slot, falling.
        values: estimated probability that the walk of the target takes the node.
        closed: whether the lane grows no more.
        offered: nodes below which something has been offered, -1 for the root.
        read: where children are not drawn, the values of the nodes that have been read.
    """

    nodes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    slots: np.ndarray = field(default_factory=lambda: np.empty(0))
    values: np.ndarray = field(default_factory=lambda: np.empty(0))
    closed: bool = False
    offered: set[int] = field(default_factory=set)
    read: dict[int, float] = field(default_factory=dict)

    def bound(self, budget: int, threshold: float) -> float:
        """Return what a slot must exceed to be filled."""
        return max(threshold, float(self.slots[-1])) if len(self.nodes) == budget else threshold

    def values_of(self, nodes: list[int]) -> list[float]:
        """Return the values of nodes, 1 for the root."""
        if not nodes:
            return []
        value = {-1: 1.0, **dict(zip(self.nodes.tolist(), self.values.tolist(), strict=True))}
        return [value[node] for node in nodes]

    def frontier(self, trees: GrowingTrees, lane: int, depth: int, bound: float) -> list[int]:
        """Return the nodes below which something may still be worth a node, most valuable first."""
        if self.closed:
            return []
        if not self.offered:
            return [-1]
        return [
            node
            for node, value in zip(self.nodes.tolist(), self.values.tolist(), strict=True)
            if value > bound and node not in self.offered and trees.depth(lane, node) < depth
        ]


class BestFirstDrafter(ModelDrafter):
    """Drafts the nodes that are most likely to be accepted, by the draft model's own estimate.

    In greedy decoding, and where `drawn` is not set, children are the likeliest tokens and a slot is
    worth the product of the draft probabilities down to its node. Otherwise children are drawn without
    replacement, and a slot is worth the product down to its parent times what is left there.

    Args:
        model: the draft model.
        nodes: nodes of a tree.
        depth: levels of a tree.
        threshold: a slot worth no more than this is not filled.
        gain: end a lane's tree when a level has added less than this to the expected number of accepted nodes.
        drawn: draw children where tokens are drawn.
    """

    def __init__(
        self, model: Any, nodes: int, depth: int, *, threshold: float = 0.0, gain: float = 0.0, drawn: bool = True
    ) -> None:
        super().__init__(model)
        self.nodes, self.depth, self.threshold, self.gain, self.drawn = nodes, depth, threshold, gain, drawn

    def guess(self, context: DraftContext, lane: int, prefix: list[int]) -> list[int]:
        """Return tokens that are worth reading along with a node because they may come to stand below it; none here.

        Args:
            context: the call.
            lane: the lane.
            prefix: the tokens that follow its text, down to the node.
        """
        return []

    def heard(
        self, context: DraftContext, trees: GrowingTrees, where: list[tuple[int, int]], law: torch.Tensor
    ) -> None:
        """Learn, if the drafter learns, what the draft model said about nodes; `where` are their lanes and numbers."""

    def propose(self, context: DraftContext) -> DraftTree:
        """Grow a tree under every root."""
        depth, budget = context.useful_depth(self.depth), context.useful_nodes(self.nodes)
        if not depth or not budget:
            return DraftTree.empty(len(context.lanes), context.device)
        trees = GrowingTrees(context, self.draft)
        kept = [Kept() for _ in trees.lanes]
        drawn = self.drawn and not context.greedy
        while True:
            frontier = [
                tree.frontier(trees, lane, depth, tree.bound(budget, self.threshold)) for lane, tree in enumerate(kept)
            ]
            if not any(frontier):
                break
            if drawn:
                self._draw(context, trees, kept, frontier, depth, budget)
            else:
                self._choose(context, trees, kept, frontier, depth, budget)
        return trees.finish(drawn=drawn, keep=[tree.nodes.tolist() for tree in kept])

    def _read(
        self, context: DraftContext, trees: GrowingTrees, frontier: list[list[int]], depth: int
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Read the frontier and, below each lane's most valuable node of it, what is guessed; return nodes and laws."""
        rows = [list(nodes) for nodes in frontier]
        for lane, row in enumerate(rows):
            if not row:
                continue
            node, there = row[0], set(row)
            for token in self.guess(context, lane, trees.prefixes[lane][node + 1]):
                node = trees.add(lane, node, token)
                if trees.depth(lane, node) >= depth:
                    break  # nothing will be drafted below it
                if node not in trees.lines[lane] and node not in there:
                    row.append(node)
                    there.add(node)
        law = trees.read(rows)
        self.heard(context, trees, [(lane, node) for lane, row in enumerate(rows) for node in row], law)
        return rows, law

    def _choose(
        self, context: DraftContext, trees: GrowingTrees, kept: list[Kept], frontier: list[list[int]], depth: int,
        budget: int,
    ) -> None:  # fmt: skip
        """Read the frontier and offer the likeliest children: a slot is worth what its node is worth.

        What is guessed has a value as soon as it is read, so its children are offered along with it.
        """
        rows, law = self._read(context, trees, frontier, depth)
        parents: list[float] = []
        bounds: list[float] = []
        for lane, (tree, nodes, row) in enumerate(zip(kept, frontier, rows, strict=True)):
            tree.read.update(zip(nodes, tree.values_of(nodes), strict=True))
            for node in row[len(nodes) :]:
                above = trees.parents[lane][node]
                tree.read[node] = tree.read[above] * trees.chance(lane, above, trees.tokens[lane][node])
            parents += [tree.read[node] for node in row]
            bounds += [tree.bound(budget, self.threshold)] * len(row)
        self._offer_all(trees, kept, rows, _likeliest(law, parents, bounds, budget), budget)

    def _draw(
        self, context: DraftContext, trees: GrowingTrees, kept: list[Kept], frontier: list[list[int]], depth: int,
        budget: int,
    ) -> None:  # fmt: skip
        """Offer drawn children of the nodes of the frontier that have been read, or else read the frontier."""
        # What was read because it was guessed comes first: it may save the call that would follow.
        known = [[node for node in nodes if node in trees.lines[lane]] for lane, nodes in enumerate(frontier)]
        if not any(known):
            self._read(context, trees, frontier, depth)
            known = frontier
        law = trees.law([trees.lines[lane][node] for lane, nodes in enumerate(known) for node in nodes])
        parents, bounds = [], []
        for tree, nodes in zip(kept, known, strict=True):
            parents += tree.values_of(nodes)
            bounds += [tree.bound(budget, self.threshold)] * len(nodes)
        self._offer_all(trees, kept, known, _draws(law, parents, bounds, budget), budget)

    def _offer_all(
        self, trees: GrowingTrees, kept: list[Kept], parents: list[list[int]], offers: Offers, budget: int
    ) -> None:
        """Hand the offers to their lanes; they lie line by line, lane after lane."""
        start = 0
        for lane, nodes in enumerate(parents):
            if nodes:
                first, last = offers[0].searchsorted((start, start + len(nodes)))
                lines, tokens, slots, values = (column[first:last] for column in offers)
                self._offer(trees, lane, kept[lane], nodes, lines - start, tokens, slots, values, budget)
                start += len(nodes)

    def _offer(
        self, trees: GrowingTrees, lane: int, tree: Kept, parents: list[int], lines: np.ndarray, tokens: np.ndarray,
        slots: np.ndarray, values: np.ndarray, budget: int,
    ) -> None:  # fmt: skip
        """Keep the best of a lane's nodes and what could stand below `parents`."""
        tree.offered.update(parents)
        if not len(slots) and not self.gain:
            return
        old = len(tree.nodes)
        all_slots = np.concatenate((tree.slots, slots))
        # Stable: of equal slots the one that was there first, which is never below or after another, is kept.
        order = (-all_slots).argsort(kind="stable")[:budget]
        new = order >= old
        which = order[new] - old
        nodes = np.empty(len(order), dtype=np.int64)
        nodes[~new] = tree.nodes[order[~new]]
        nodes[new] = [
            trees.add(lane, parents[line], token)
            for line, token in zip(lines[which].tolist(), tokens[which].tolist(), strict=True)
        ]
        before = tree.values.sum()
        tree.nodes, tree.slots = nodes, all_slots[order]
        tree.values = np.concatenate((tree.values, values))[order]
        # Where children are drawn, a slot of high value may get an unlikely token, and the sum may fall.
        if self.gain and tree.values.sum() - before < self.gain:
            tree.closed = True


#: Children that must be likelier than this are compared with their bound, others sorted.
RARE = 1e-4


def _likeliest(law: torch.Tensor, parents: list[float], bounds: list[float], budget: int) -> Offers:
    """Offer the likeliest children: a slot is worth what its node is worth."""
    # A node that rounding has made worthless has no children.
    least = [bound / value if value else 1.0 for bound, value in zip(bounds, parents, strict=True)]
    if min(least) < RARE:
        top, best = law.topk(min(budget, law.shape[-1]), dim=-1)
        probabilities = top.cpu().double().numpy()
        lines, places = (probabilities > np.array(least)[:, None]).nonzero()
        found, chosen = best.cpu().numpy()[lines, places], probabilities[lines, places]
    else:  # few tokens pass, and telling which is cheaper than sorting
        passing = law > torch.tensor(least, device=law.device)[:, None]
        # On a CPU numpy finds them several times faster; on a GPU only what passes is to be copied.
        at = np.flatnonzero(passing.numpy()) if law.device.type == "cpu" else passing.view(-1).nonzero()[:, 0]
        chosen = law.reshape(-1)[at].cpu().double().numpy()
        lines, found = np.divmod(torch.as_tensor(at).cpu().numpy(), law.shape[-1])
    values = chosen * np.array(parents)[lines]
    return lines, found, values, values


def _draws(law: torch.Tensor, parents: list[float], bounds: list[float], budget: int) -> Offers:
    """Offer children drawn without replacement: a slot is worth what the draws before have left of its parent."""
    drawn = gumbel_top_k(law.log(), budget)
    tokens = drawn.cpu().numpy()
    chosen = law.gather(1, drawn.clamp(min=0)).cpu().double().numpy()
    value = np.array(parents)[:, None]
    left = 1 - np.concatenate([np.zeros((len(chosen), 1)), chosen.cumsum(1)[:, :-1]], axis=1)
    slots = value * left
    lines, places = ((slots > np.array(bounds)[:, None]) & (tokens >= 0)).nonzero()
    # Rounding must not make a node worth more than its slot: what is below would outlive it.
    values = np.minimum(value * chosen, slots)
    return lines, tokens[lines, places], slots[lines, places], values[lines, places]
