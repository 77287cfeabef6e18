"""What proposes tokens: the interface of all drafters."""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext, Outcome
from hf_ext.generation.speculative.tree import DraftTree


@dataclass
class Verified:
    """What the target said about a tree, as the drafter is told after each step.

    Lanes are those of the tree. A lane whose row is done has been told as well; `continues` names
    the lanes that go on, in their new order.

    Args:
        tree: the tree that was verified.
        logits: `(lanes, nodes + 1, vocabulary)` raw logits of the target at the root and every node.
        outcomes: for every lane the accepted nodes and tokens (before an end of the row cut them).
        continues: lanes that go on.
    """

    tree: DraftTree
    logits: torch.Tensor
    outcomes: list[Outcome]
    continues: list[int]


class Drafter(abc.ABC):
    """Proposes continuations of all lanes, and learns from what the target says about them.

    A drafter keeps its own state lane by lane. It may be wrong about anything without harm to the
    text, except for one thing: where tokens are drawn at random, `DraftTree.probabilities` must be
    the law they were really drawn from, and a token once drawn must not be held back.

    Attributes:
        calls: forward passes of a draft model, or of a part of the target.
        positions: token positions they evaluated.
        ahead: length of the longest chain it can draft from the texts alone, before the target has read
            the prompts; 0 for none. The target then checks the first draft in the call that reads the prompts.
    """

    calls: int = 0
    positions: int = 0
    ahead: int = 0

    def reading(self, run: DecodingRun) -> AbstractContextManager[Any]:
        """Return what to hold open while the target reads the prompts, for a drafter that looks inside."""
        return nullcontext()

    def start(self, context: DraftContext) -> None:  # noqa: B027  (many have nothing to prepare)
        """Prepare for a call.

        The prompts have been read and `context.outputs` is the target's answer, except for a drafter that
        drafts `ahead`.
        """

    def first(self, context: DraftContext) -> DraftTree:
        """Return a tree without nodes for the first token, which the target draws alone."""
        return DraftTree.empty(len(context.lanes), context.device)

    @abc.abstractmethod
    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a tree under the last token of every lane."""

    def verifying(self, context: DraftContext, tree: DraftTree) -> AbstractContextManager[Any]:
        """Return what to hold open while the target evaluates a tree, for a drafter that looks or works inside."""
        return nullcontext()

    def observe(self, context: DraftContext, verified: Verified) -> None:  # noqa: B027
        """Learn what became of the last tree.

        The context is that after the step: texts grown, lanes of finished rows gone.
        """
