"""Draft trees while a draft model grows them: which nodes there are, and the law of what follows each.

A call of the draft model reads nodes of all lanes side by side, as many of each lane as there are to
be read. A chain, a tree of fixed shape and one grown where it is most promising differ only in the
nodes that they add and read.
"""

from __future__ import annotations

import bisect
import itertools

import torch

from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import DraftModel
from hf_ext.generation.speculative.tree import DraftTree


class GrowingTrees:
    """A tree for every lane that grows under its root, the node -1.

    Args:
        context: the call.
        draft: the draft model.

    Attributes:
        tokens: of every lane the token of each node, in the order in which nodes were added.
        parents: likewise the node above.
        prefixes: likewise the tokens from below the root down to the node; that of node `n` has the
            place `n + 1`, after the root's empty one.
        lines: of every lane, by node, the line of `laws` that holds the law of what follows it.
        laws: laws `(lines, vocabulary)`, one tensor for each call of the draft model.
    """

    def __init__(self, context: DraftContext, draft: DraftModel) -> None:
        lanes = range(len(context.lanes))
        self.context, self.draft = context, draft
        self.tokens: list[list[int]] = [[] for _ in lanes]
        self.parents: list[list[int]] = [[] for _ in lanes]
        self.prefixes: list[list[list[int]]] = [[[]] for _ in lanes]
        self.lines: list[dict[int, int]] = [{} for _ in lanes]
        self.laws: list[torch.Tensor] = []
        self._known: list[dict[tuple[int, int], int]] = [{} for _ in lanes]

    @property
    def lanes(self) -> range:
        """The lanes."""
        return range(len(self.tokens))

    def add(self, lane: int, parent: int, token: int) -> int:
        """Return the number of the node that holds `token` below `parent`, a new one if there is none yet."""
        number = self._known[lane].setdefault((parent, token), len(self.tokens[lane]))
        if number == len(self.tokens[lane]):
            self.tokens[lane].append(token)
            self.parents[lane].append(parent)
            self.prefixes[lane].append([*self.prefixes[lane][parent + 1], token])
        return number

    def depth(self, lane: int, node: int) -> int:
        """Return the distance of a node from the root."""
        return len(self.prefixes[lane][node + 1])

    def read(self, frontier: list[list[int]]) -> torch.Tensor:
        """Let the draft model read nodes in one call.

        The first call reads the root of every lane, and nothing or nodes below it.

        Args:
            frontier: for every lane nodes that have not been read, parents before their children.

        Returns:
            `(lines, vocabulary)` float32 law of what follows each node, as the settings of the call
            make it of the draft model's logits; lane after lane.
        """
        width = max(map(len, frontier))
        logits = self._logits(frontier, width)
        if all(len(nodes) == width for nodes in frontier):
            chosen = logits.flatten(0, 1)
        else:
            filled = [lane * width + place for lane, nodes in enumerate(frontier) for place in range(len(nodes))]
            chosen = logits.flatten(0, 1).index_select(0, torch.tensor(filled, device=logits.device))
        start = sum(map(len, self.laws))
        where = [(lane, node) for lane, nodes in enumerate(frontier) for node in nodes]
        for line, (lane, node) in enumerate(where, start):
            self.lines[lane][node] = line
        prefixes = [self.prefixes[lane][node + 1] for lane, node in where]
        law = self.context.process([lane for lane, _ in where], prefixes, chosen).softmax(-1)
        self.laws.append(law)
        return law

    def law(self, lines: list[int]) -> torch.Tensor:
        """Return the laws on these lines, `(lines, vocabulary)`."""
        starts = list(itertools.accumulate(map(len, self.laws), initial=0))
        first, last = (bisect.bisect(starts, line) for line in (min(lines), max(lines)))
        there = self.laws[last - 1] if first == last else torch.cat(self.laws[first - 1 : last])
        places = [line - starts[first - 1] for line in lines]
        if places == list(range(len(there))):
            return there
        return there.index_select(0, torch.tensor(places, device=there.device))

    def chance(self, lane: int, parent: int, token: int) -> float:
        """Return the probability of a token below a node that has been read."""
        line = self.lines[lane][parent]
        for laws in self.laws:
            if line < len(laws):
                break
            line -= len(laws)
        return float(laws[line, token])

    def finish(
        self, *, drawn: bool, keep: list[list[int]] | None = None, draws: list[dict[int, list[int]]] | None = None
    ) -> DraftTree:
        """Return the trees as the engine takes them.

        Args:
            drawn: whether the nodes were drawn from the laws of their parents.
            keep: nodes of each lane to put into its tree, parents before their children and siblings
                in the order in which they were drawn; all, in their order, by default.
            draws: see `DraftTree`; only where all nodes are kept.
        """
        device = self.context.device
        if keep is None:
            tree = DraftTree.from_lists(self.tokens, self.parents, device)
        else:
            tokens, parents = [], []
            for lane, nodes in enumerate(keep):
                number = {-1: -1, **{node: place for place, node in enumerate(nodes)}}
                tokens.append([self.tokens[lane][node] for node in nodes])
                parents.append([number[self.parents[lane][node]] for node in nodes])
                # From here on a node is known by its place in the tree; what is not in it has none.
                self.draft.read_nodes[lane] = [
                    number.get(node, -1) if node >= 0 else -1 for node in self.draft.read_nodes[lane]
                ]
            tree = DraftTree.from_lists(tokens, parents, device)
        tree.draws = draws
        if drawn and tree.nodes:
            tree.probabilities = self._table(keep, tree.nodes)
        return tree

    def _logits(self, frontier: list[list[int]], width: int) -> torch.Tensor:
        if self.laws or width > 1:
            start = 0 if self.laws else 1
            padding = [[-1] * (width - len(nodes)) for nodes in frontier]
            nodes = [row[start:] + more for row, more in zip(frontier, padding, strict=True)]
            above = [[self.parents[lane][node] if node >= 0 else -1 for node in nodes[lane]] for lane in self.lanes]
            tokens = [[self.tokens[lane][node] if node >= 0 else 0 for node in nodes[lane]] for lane in self.lanes]
            table = torch.tensor(tokens, device=self.context.device)
            if self.laws:
                return self.draft.extend(table, nodes, above)
            return self.draft.catch_up_and_extend(self.context, table, nodes, above)
        return self.draft.catch_up(self.context)[:, None]

    def _table(self, keep: list[list[int]] | None, nodes: int) -> torch.Tensor:
        """Put the law of each node's children at its place; any law where there are no children."""
        laws = self.laws[0] if len(self.laws) == 1 else torch.cat(self.laws)
        index = []
        for lane, lines in enumerate(self.lines):
            order = range(len(self.tokens[lane])) if keep is None else keep[lane]
            row = [lines.get(node, 0) for node in itertools.chain((-1,), order)]
            index += row + [0] * (nodes + 1 - len(row))
        table = laws.index_select(0, torch.tensor(index, device=laws.device))
        return table.view(len(self.lines), nodes + 1, -1)
