"""Draft trees: what a drafter hands to the engine, one tree for every lane of a batch.

    root        the last token of the row, which the target has not read yet; not a node
     |- 0       nodes stand in an order in which a parent comes before its children;
     |  |- 2    `parents` is the node above, -1 for the root:
     |  `- 3
     `- 1       parents = [-1, -1, 0, 0]

A chain is the tree in which every node hangs under the one before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from hf_ext.generation.speculative.acceptance import Rule


@dataclass
class DraftTree:
    """Drafted continuations of every lane, to be checked by the target in one forward pass.

    Trees of different sizes share the tensors: lane `r` uses the first `sizes[r]` nodes, what
    follows is padding that no node hangs under. Nodes from `candidates` on are *probes*: the target
    evaluates them and the drafter sees the result, but they can never become part of the text.

    Args:
        tokens: `(lanes, nodes)` int64.
        parents: for every lane the parent of each node, -1 for the root.
        probabilities: `(lanes, nodes + 1, vocabulary)` float, the law from which the children of the
            root (index 0) and of node `i` (index `i + 1`) were drawn; what stands for a node without
            children is not looked at. None for drafts that were not drawn at random.
        sizes: nodes of each lane; all of them by default.
        draws: for every lane, the children of each node in the order in which they were drawn, with
            repetitions, by node (-1 for the root). In order of their numbers by default.
        candidates: of each lane the number of nodes that may be accepted; all by default.
        scores: `(lanes, nodes + 1, vocabulary)` raw logits of the draft model, where a verifier wants them.
        rule: the acceptance rule that fits how these drafts came about; the strategy's own by default.

    Raises:
        ValueError: shapes that do not fit, or a parent that does not come before its child.

    Example:
        >>> tree = DraftTree(torch.tensor([[7, 8, 9]]), [[-1, -1, 0]])
        >>> tree.children(0)
        {-1: [0, 1], 0: [2]}
        >>> tree.depths(0)
        [1, 1, 2]
    """

    tokens: torch.Tensor
    parents: list[list[int]]
    probabilities: torch.Tensor | None = None
    sizes: list[int] | None = None
    draws: list[dict[int, list[int]]] | None = None
    candidates: list[int] | None = None
    scores: torch.Tensor | None = None
    rule: Rule | None = None

    def __post_init__(self) -> None:
        lanes, nodes = self.tokens.shape
        if len(self.parents) != lanes or any(len(p) != nodes for p in self.parents):
            raise ValueError(
                f"tokens are {lanes} lanes of {nodes} nodes, but parents are {list(map(len, self.parents))}"
            )
        for parents in self.parents:
            if any(not -1 <= parent < node for node, parent in enumerate(parents)):
                raise ValueError(f"a node must come after its parent, got parents {parents}")
        for name in ("probabilities", "scores"):
            table = getattr(self, name)
            if table is not None and table.shape[:2] != (lanes, nodes + 1):
                raise ValueError(
                    f"{name} must have the shape (lanes, nodes + 1, vocabulary) = ({lanes}, {nodes + 1}, ...), got "
                    f"{tuple(table.shape)}"
                )

    @classmethod
    def empty(cls, lanes: int, device: torch.device | str = "cpu") -> DraftTree:
        """Return trees without nodes."""
        return cls(torch.empty(lanes, 0, dtype=torch.long, device=device), [[] for _ in range(lanes)])

    @classmethod
    def chain(cls, tokens: torch.Tensor, probabilities: torch.Tensor | None = None, **more: object) -> DraftTree:
        """Return chains of `(lanes, nodes)` tokens."""
        parents = list(range(-1, tokens.shape[1] - 1))
        return cls(tokens, [parents] * len(tokens), probabilities, **more)  # type: ignore[arg-type]

    @classmethod
    def from_lists(
        cls, tokens: list[list[int]], parents: list[list[int]], device: torch.device | str = "cpu"
    ) -> DraftTree:
        """Return trees of different sizes from lists, padded to the largest.

        Example:
            >>> tree = DraftTree.from_lists([[5, 6], [7]], [[-1, 0], [-1]])
            >>> tree.tokens.tolist(), tree.parents, tree.sizes
            ([[5, 6], [7, 0]], [[-1, 0], [-1, -1]], [2, 1])
        """
        sizes = [len(row) for row in tokens]
        nodes = max(sizes, default=0)
        table = [row + [0] * (nodes - len(row)) for row in tokens]
        above = [row + [-1] * (nodes - len(row)) for row in parents]
        filled = torch.tensor(table, dtype=torch.long, device=device).view(len(tokens), nodes)
        return cls(filled, above, sizes=sizes)

    @functools.cached_property
    def listed(self) -> list[list[int]]:
        """The tokens of each lane, padding included, as lists."""
        found: list[list[int]] = self.tokens.tolist()
        return found

    @property
    def lanes(self) -> int:
        """Trees side by side."""
        return self.tokens.shape[0]

    @property
    def nodes(self) -> int:
        """Nodes of the largest tree."""
        return self.tokens.shape[1]

    def size(self, lane: int) -> int:
        """Number of nodes of a lane that may be accepted."""
        size = self.nodes if self.sizes is None else self.sizes[lane]
        return size if self.candidates is None else min(size, self.candidates[lane])

    def children(self, lane: int) -> dict[int, list[int]]:
        """Return the children of each node that has any, in the order in which they are to be tried."""
        if self.draws is not None:
            return self.draws[lane]
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents[lane][: self.size(lane)]):
            found.setdefault(parent, []).append(node)
        return found

    def depths(self, lane: int) -> list[int]:
        """Return the distance of each node from the root."""
        return list(shape_of(tuple(self.parents[lane])).depths)


@dataclass(frozen=True)
class TreeShape:
    """What follows from the parents of a tree alone.

    Args:
        parents: the parents, -1 for what the tree hangs under.
        depths: distance of each node from there, from 1 on.
        levels: one less, the distance from the first level.
        ancestors: `(nodes, nodes)` bool, `[i, j]` tells whether `j` is `i` or above it.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    levels: tuple[int, ...]
    ancestors: np.ndarray

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs under the one before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))


@functools.lru_cache(maxsize=512)
def shape_of(parents: tuple[int, ...]) -> TreeShape:
    """Return the depths and ancestors of a tree.

    Args:
        parents: the parent of each node, -1 for the root.

    Example:
        >>> shape_of((-1, 0, 0)).ancestors.astype(int)
        array([[1, 0, 0],
               [1, 1, 0],
               [1, 0, 1]])
    """
    nodes, size = len(parents), -(-len(parents) // 8)
    lines: list[int] = []  # as bits: a line of an array costs an operation on arrays
    depths: list[int] = []
    for node, parent in enumerate(parents):
        lines.append(1 << node | (lines[parent] if parent >= 0 else 0))
        depths.append(1 if parent < 0 else depths[parent] + 1)
    packed = np.frombuffer(b"".join([line.to_bytes(size, "little") for line in lines]), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(nodes, size), axis=1, count=nodes, bitorder="little")
    ancestors = bits.view(bool)
    ancestors.setflags(write=False)
    return TreeShape(parents, tuple(depths), tuple(depth - 1 for depth in depths), ancestors)
