"""Token recycling: the likeliest continuations of tokens seen before, kept and grown into a tree."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.strategy import positive


@functools.lru_cache(maxsize=32)
def template(nodes: int, branches: int, depth: int) -> tuple[tuple[int, int], ...]:
    """Return the shape of the tree: for every node its parent and which of the parent's successors it is.

    The rule: a token's next successor in rank is taken to be half as likely as the one before, and
    the likeliest of all paths are kept. So a path's cost is the sum of its ranks, counted from 1, and
    a tree has all paths up to a cost, those of the next cost in the order of depth, the shortest first.

    Args:
        nodes: nodes of the tree; fewer if `branches` and `depth` allow no more.
        branches: successors that a token has.
        depth: longest path.

    Returns:
        `(parent, rank)` of each node, level by level, the parent -1 for the root and ranks from 0.

    Example:
        >>> template(7, branches=8, depth=6)
        ((-1, 0), (-1, 1), (-1, 2), (0, 0), (0, 1), (1, 0), (3, 0))
    """
    kept: set[tuple[int, ...]] = set()
    paths: list[tuple[tuple[int, ...], int]] = [((), 0)]
    for cost in itertools.count(1):
        level = sorted(
            ((*path, rank) for path, spent in paths if len(path) < depth
             for rank in range(branches) if spent + rank + 1 == cost),
            key=lambda path: (len(path), path),
        )  # fmt: skip
        level = level[: nodes - len(kept)]
        kept.update(level)
        paths += [(path, cost) for path in level]
        if len(kept) >= nodes or cost > branches * depth:
            break
    ordered = sorted(kept, key=lambda path: (len(path), path))
    number = {path: node for node, path in enumerate(ordered)}
    return tuple((number.get(path[:-1], -1), path[-1]) for path in ordered)


class Successors:
    """The adjacency matrix: of every token the likeliest next tokens, as the target last saw it.

    Args:
        vocabulary: number of tokens.
        branches: successors kept of each.

    Attributes:
        table: `(vocabulary, branches)` int32, likeliest first; -1 where nothing is known.

    Example:
        >>> successors = Successors(8, 2)
        >>> successors.learn(np.array([3]), np.array([[5, 6]]))
        >>> successors.table[3].tolist(), successors.bytes
        ([5, 6], 64)
    """

    def __init__(self, vocabulary: int, branches: int) -> None:
        self.table = np.full((vocabulary, branches), -1, dtype=np.int32)

    @property
    def bytes(self) -> int:
        """Memory of the matrix."""
        return self.table.nbytes

    def learn(self, tokens: np.ndarray, likeliest: np.ndarray) -> None:
        """Overwrite the rows of `(n,)` tokens by `(n, branches)` successors; of equal tokens the last one counts."""
        _, last = np.unique(tokens[::-1], return_index=True)
        last = len(tokens) - 1 - last  # what an assignment with repeated indices keeps is not defined
        self.table[tokens[last]] = likeliest[last]

    def follow(self, text: list[int]) -> None:
        """Put every pair of neighbours of a text in: the latest successor of a token first, without repetition."""
        for token, following in itertools.pairwise(text):
            row = self.table[token]
            if following != row[0]:
                others = [other for other in row.tolist() if other != following]
                row[:] = [following, *others][: len(row)]

    def grow(self, roots: np.ndarray, shape: tuple[tuple[int, int], ...]) -> tuple[list[list[int]], list[list[int]]]:
        """Fill a template breadth first under every root.

        Args:
            roots: `(lanes,)` tokens.
            shape: of the tree, from `template`.

        Returns:
            Tokens and parents of each lane; nodes of which nothing is known are left out, and all below them.
        """
        tokens = np.empty((len(roots), len(shape) + 1), dtype=np.int64)
        tokens[:, -1] = roots  # the place that a parent of -1 means
        for nodes, parents, ranks in _levels(shape):
            above = tokens[:, parents]
            tokens[:, nodes] = np.where(above >= 0, self.table[above, ranks], -1)
        drafted, trees = [], []
        for row in tokens[:, :-1]:
            known = row >= 0
            number = np.append(np.cumsum(known) - 1, -1)
            drafted.append(row[known].tolist())
            trees.append(number[_parents(shape)[known]].tolist())
        return drafted, trees


@functools.lru_cache(maxsize=32)
def _parents(shape: tuple[tuple[int, int], ...]) -> np.ndarray:
    return np.array([parent for parent, _ in shape], dtype=np.int64)


@functools.lru_cache(maxsize=32)
def _levels(shape: tuple[tuple[int, int], ...]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return nodes, parents and ranks of each level of a template."""
    depths: list[int] = []
    for parent, _ in shape:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    found = []
    for depth in range(1, max(depths, default=0) + 1):
        nodes = np.array([node for node, d in enumerate(depths) if d == depth])
        found.append((nodes, _parents(shape)[nodes], np.array([shape[node][1] for node in nodes])))
    return found


class RecyclingDrafter(Drafter):
    """Grows trees from the successors that the target gave tokens before, right or wrong as drafts.

    Args:
        nodes: nodes of a tree.
        branches: successors kept of each token.
        depth: longest path.
        successors: the matrix to use, None to begin one of the model's vocabulary.
        report: receives the size of the matrix.
    """

    def __init__(
        self, nodes: int, branches: int, depth: int, successors: Successors | None, report: dict[str, Any]
    ) -> None:
        self.nodes, self.branches, self.depth, self.report = nodes, branches, depth, report
        self.successors = successors

    def start(self, context: DraftContext) -> None:
        """Learn what follows what in the prompts, and what the target says of their ends."""
        logits = context.outputs.logits[:, -1:]
        if self.successors is None:
            self.successors = Successors(logits.shape[-1], min(self.branches, logits.shape[-1]))
        for text in context.texts:
            self.successors.follow(text)
        self._learn([text[-1:] for text in context.texts], logits, [])
        self.report["matrix_bytes"] = self.successors.bytes

    def propose(self, context: DraftContext) -> DraftTree:
        """Fill the template under every root."""
        assert self.successors is not None  # begun by `start`
        nodes, depth = context.useful_nodes(self.nodes), context.useful_depth(self.depth)
        if not nodes or not depth:
            return DraftTree.empty(len(context.lanes), context.device)
        roots = np.array([text[-1] for text in context.texts])
        tokens, parents = self.successors.grow(roots, template(nodes, self.branches, depth))
        return DraftTree.from_lists(tokens, parents, context.device)

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Recycle: every node that was evaluated says what follows its token, accepted or not."""
        tree, outcomes = verified.tree, verified.outcomes
        if not outcomes[0].tokens:
            return  # rows have ended with their first token, of which `start` has heard
        tokens = [row[: tree.size(lane)] for lane, row in enumerate(tree.tokens.tolist())]
        # The root of a row that is done is not in a text any more; its place is left empty.
        roots = [-1] * tree.lanes
        for text, lane in zip(context.texts, verified.continues, strict=True):
            roots[lane] = text[-1 - len(outcomes[lane].tokens)]
        self._learn([[root, *row] for root, row in zip(roots, tokens, strict=True)], verified.logits,
                    [[-1, *outcome.nodes] for outcome in outcomes])  # fmt: skip

    def _learn(self, tokens: list[list[int]], logits: torch.Tensor, paths: list[list[int]]) -> None:
        """Keep what the target says follows `tokens[lane][i]`; nodes on `paths` (-1 the first) have the last word."""
        assert self.successors is not None
        best = np.array(logits.topk(self.successors.table.shape[1], dim=-1).indices.tolist(), dtype=np.int32)
        lanes = [np.full(len(row), lane) for lane, row in enumerate([*tokens, *paths])]
        lane = np.concatenate(lanes) % len(tokens)
        place = np.concatenate([*(np.arange(len(row)) for row in tokens), *(np.array(path) + 1 for path in paths)])
        said = np.zeros((len(tokens), best.shape[1]), dtype=np.int64)
        for filled, row in zip(said, tokens, strict=True):
            filled[: len(row)] = row
        token = said[lane, place]
        self.successors.learn(token[token >= 0], best[lane, place][token >= 0])


@dataclass
class TokenRecycling(Speculative):
    """Speculative decoding from what the target has said before, without a draft model.

    A matrix keeps the `branches` likeliest next tokens of every token, as the target saw them last. A
    tree grows from it under the last token of each row, by a fixed template, and the target evaluates
    it in one call. What it says at each node, also at those that are rejected, goes back into the
    matrix. It needs `4 * vocabulary * branches` bytes (1 MB for 32,000 tokens).

    The template takes a token's successors to be half as likely from rank to rank and keeps the
    likeliest paths (`template`); the paper's, found by counting, has as many nodes and the same depth.
    Pairs of neighbouring tokens of the prompt are put in at the start. All rows of a batch share one
    matrix. It begins empty with each call, so that a text does not depend on the calls before and a
    measurement does not profit from them; `keep=True` keeps it for later calls, as the paper does.

    Args:
        nodes: nodes of the tree.
        branches: successors kept of each token.
        depth: longest path of the tree.
        keep: go on with the matrix of the last call.

    Raises:
        ValueError: the model cannot forget rejected tokens.

    Source:
        Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
        Recycling (arXiv:2408.08696), section 3. Drafts that are sampled against follow the rule for
        drafts that were not drawn; the paper has greedy decoding only.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = TokenRecycling(nodes=20)
        >>> ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)).all())
        True
        >>> strategy.report.target_calls < 40, strategy.report.details["matrix_bytes"]
        (True, 3072)
    """

    nodes: int = 80
    branches: int = 8
    depth: int = 6
    keep: bool = False
    _kept: Successors | None = field(default=None, init=False, repr=False, compare=False)

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        for name in ("nodes", "branches", "depth"):
            positive(name, getattr(self, name))
        if not isinstance(self.keep, bool):
            raise ValueError(f"keep must be True or False, got {self.keep!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return a drafter over the matrix."""
        if not self.keep:
            return RecyclingDrafter(self.nodes, self.branches, self.depth, None, run.report.details)
        size = run.model.config.get_text_config(decoder=True).vocab_size
        if self._kept is None or self._kept.table.shape != (size, min(self.branches, size)):
            self._kept = Successors(size, min(self.branches, size))
        return RecyclingDrafter(self.nodes, self.branches, self.depth, self._kept, run.report.details)
