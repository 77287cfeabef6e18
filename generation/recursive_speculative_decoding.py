"""Recursive speculative decoding: trees whose siblings are drawn without replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import without_replacement
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import ModelDrafter
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.growing import GrowingTrees
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative.without_replacement import gumbel_top_k, stochastic_beam_step
from hf_ext.generation.strategy import positive


class BranchingDrafter(ModelDrafter):
    """Drafts trees in which every node of a level has the same number of distinct children (RSD-C).

    Children are drawn without replacement; in greedy decoding they are the likeliest tokens.

    Args:
        model: the draft model.
        branching: children of a node, level by level.
    """

    def __init__(self, model: Any, branching: Sequence[int]) -> None:
        super().__init__(model)
        self.branching = tuple(branching)

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a tree under every root, one draft call a level."""
        widths = self._fitting(context)
        if not widths:
            return DraftTree.empty(len(context.lanes), context.device)
        trees = GrowingTrees(context, self.draft)
        frontier = [[-1] for _ in trees.lanes]
        for width in widths:
            law = trees.read(frontier)
            if context.greedy:
                found = law.topk(min(width, law.shape[-1]), dim=-1).indices
            else:
                found = gumbel_top_k(law.log(), width)
            tokens = iter(found.tolist())
            frontier = [
                [trees.add(lane, node, token) for node in nodes for token in next(tokens) if token >= 0]
                for lane, nodes in enumerate(frontier)
            ]
        return trees.finish(drawn=not context.greedy)

    def _fitting(self, context: DraftContext) -> list[int]:
        """Return the branching of the levels that are of use and fit into the cache."""
        widths: list[int] = []
        level, nodes = 1, 0
        for width in self.branching[: context.useful_depth(len(self.branching))]:
            free = context.useful_nodes(nodes + level * width) - nodes
            if free < level:
                break
            widths.append(free // level)
            level *= widths[-1]
            nodes += level
        return widths


class BeamDrafter(ModelDrafter):
    """Drafts the distinct sequences of a stochastic beam search (RSD-S); in greedy decoding of a beam search.

    Args:
        model: the draft model.
        width: nodes of a level.
        depth: levels.
    """

    def __init__(self, model: Any, width: int, depth: int) -> None:
        super().__init__(model)
        self.width, self.depth = width, depth

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a tree under every root, one draft call a level."""
        width = context.useful_nodes(self.width)
        depth = context.useful_depth(self.depth)
        if width and depth:
            depth = min(depth, context.useful_nodes(width * depth) // width)
        if not width or not depth:
            return DraftTree.empty(len(context.lanes), context.device)
        trees = GrowingTrees(context, self.draft)
        frontier = [[-1] for _ in trees.lanes]
        total = torch.zeros(len(frontier), 1, dtype=torch.float64, device=context.device)  # of log-probabilities
        noisy = total
        for _ in range(depth):
            law = _beside(trees.read(frontier), frontier, total.shape[1])
            if context.greedy:
                parents, tokens, total, noisy = _beam_step(law, total, width)
            else:
                parents, tokens, total, noisy = stochastic_beam_step(law, total, noisy, width)
            # In falling order of the noisy values, which is the order in which siblings were drawn.
            level = [
                [(place, token) for place, token in zip(*pairs, strict=True) if token >= 0]
                for pairs in zip(parents.tolist(), tokens.tolist(), strict=True)
            ]
            frontier = [
                [trees.add(lane, nodes[place], token) for place, token in level[lane]]
                for lane, nodes in enumerate(frontier)
            ]
        return trees.finish(drawn=not context.greedy)


def _beside(lines: torch.Tensor, frontier: list[list[int]], width: int) -> torch.Tensor:
    """Lay out the lines of all lanes' nodes as `(lanes, width, vocabulary)`; nodes that are not there get zeros."""
    if all(len(nodes) == width for nodes in frontier):
        return lines.view(len(frontier), width, -1)
    table = lines.new_zeros(len(frontier), width, lines.shape[-1])
    filled = [lane * width + place for lane, nodes in enumerate(frontier) for place in range(len(nodes))]
    table.view(-1, lines.shape[-1])[torch.tensor(filled, device=lines.device)] = lines
    return table


def _beam_step(
    law: torch.Tensor, total: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return parents, tokens and log-probabilities, twice, of the likeliest sequences, as the stochastic step does."""
    vocabulary = law.shape[-1]
    # Only a parent's best can be among the best of all; choosing from few is cheaper than from all.
    chances, tokens = law.topk(min(width, vocabulary), dim=-1)
    sequences = (total[..., None] + chances.double().log()).flatten(1)
    best, index = sequences.topk(min(width, sequences.shape[1]), dim=-1)
    none = best.isneginf()
    parents = (index // chances.shape[-1]).masked_fill(none, -1)
    return parents, tokens.flatten(1).gather(1, index).masked_fill(none, -1), best, best


@dataclass
class RecursiveSpeculativeDecoding(Speculative):
    """Speculative decoding with trees of distinct drafts.

    Siblings in the draft tree are drawn without replacement, so that none is wasted on a token that
    has been tried already. The target tries them one after the other: a rejected one leaves the draft
    law, and the target's law becomes what the rejection has left of it. The text has exactly the
    target's law. Trees either have a fixed number of children at each level (RSD-C, drawn by the
    Gumbel-top-k trick) or consist of the distinct sequences of a stochastic beam search (RSD-S).

    With `do_sample=False` there is nothing to draw: children are the likeliest tokens, the beam is
    that of plain beam search.

    Args:
        draft_model: a causal language model with the target's tokenizer, much cheaper than the target.
        branching: children of every node at each level, from the root down.
        beam_width: sequences of the beam, which takes the place of `branching`; None for RSD-C.
        beam_depth: tokens of each sequence of the beam.

    Raises:
        ValueError: the draft model has another tokenizer, or a model cannot forget rejected tokens.

    Source:
        Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement
        (arXiv:2402.14160): RSD-C, RSD-S and recursive rejection sampling.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = RecursiveSpeculativeDecoding(draft_model=target, branching=(2, 2, 1))
        >>> ours = target.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=9, do_sample=False)
        >>> bool((ours == target.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)).all())
        True
        >>> strategy.report.details["mean_accepted"]  # a draft model that is the target is always right
        3.0
    """

    rule: ClassVar[Rule] = staticmethod(without_replacement)

    draft_model: Any
    branching: Sequence[int] = (3, 2, 1, 1)
    beam_width: int | None = None
    beam_depth: int = 4

    def check_options(self) -> None:
        """Raise ValueError for trees that cannot be."""
        if isinstance(self.branching, int) or not all(
            isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in self.branching
        ):
            raise ValueError(
                f"branching must be the children of a node at each level, such as (3, 2, 1, 1), got {self.branching!r}"
            )
        if self.beam_width is not None:
            positive("beam_width", self.beam_width)
        positive("beam_depth", self.beam_depth)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the draft model, drafting trees of the shape that the options ask for."""
        if self.beam_width is not None:
            return BeamDrafter(self.draft_model, self.beam_width, self.beam_depth)
        return BranchingDrafter(self.draft_model, self.branching)
