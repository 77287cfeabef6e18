"""Drafting with a part of the target itself: the nodes of the draft stand where the target will write its own.

A draft pass runs some layers of the target behind the text that the target has read. What it writes
into the cache lies where the nodes of the tree will lie, so verification writes over it, and layers
that have drafted with exactly the target's own numbers need not run again.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from hf_ext.generation.speculative.chain import draft_chain
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.stopping import ByConfidence
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.layers import captured, only_layers


class SelfDrafter(Drafter):
    """Base of drafters that draft a chain with a part of the target.

    Args:
        length: tokens to draft.
        confidence: draft no further where the likeliest token has a probability below this.
    """

    def __init__(self, length: int, confidence: float = 0.0) -> None:
        self.length, self.confidence = length, confidence
        self.calls = self.positions = 0

    @abc.abstractmethod
    def partly(self, context: DraftContext) -> AbstractContextManager[Any]:
        """Return what makes the target's forward pass the cheaper one, while it is held open."""

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a chain under every root."""
        tree, _ = draft_chain(
            context,
            self.length,
            lambda: self.evaluate(context, torch.tensor([text[-1] for text in context.texts], device=context.device)),
            lambda tokens, place: self.evaluate(context, tokens),
            ByConfidence(self.confidence) if self.confidence else None,
        )
        self.drafted(context, tree)
        context.target.rewind()
        return tree

    @torch.no_grad()
    def evaluate(self, context: DraftContext, tokens: torch.Tensor) -> torch.Tensor:
        """Return the cheap pass's `(lanes, vocabulary)` logits after one more token a lane."""
        with self.partly(context):
            logits = context.target.extend(tokens[:, None], counted=False).logits[:, -1]
        self.calls += 1
        self.positions += tokens.numel()
        return logits

    def drafted(self, context: DraftContext, tree: DraftTree) -> None:
        """Do what is left to do once a chain has been drafted, before the cache is rewound."""


class EarlyExitDrafter(SelfDrafter):
    """Drafts with the first layers, the final norm and the LM head; verification runs the other layers only.

    Args:
        exit_layer: number of layers that draft.
        length: tokens to draft.
        confidence: draft no further where the likeliest token has a probability below this.
    """

    def __init__(self, exit_layer: int, length: int, confidence: float = 0.0) -> None:
        super().__init__(length, confidence)
        self.exit_layer = exit_layer
        self._states: list[torch.Tensor] = []

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a chain under every root."""
        self._states = []
        return super().propose(context)

    @contextlib.contextmanager
    def partly(self, context: DraftContext) -> Iterator[None]:
        """Run the first layers only, and keep the state in which they end."""
        model = context.run.model
        with only_layers(model, 0, self.exit_layer), captured(model, [self.exit_layer]) as found:
            yield
        self._states.append(found[self.exit_layer])

    def drafted(self, context: DraftContext, tree: DraftTree) -> None:
        """Let the last token through the first layers as well, unless drafting stopped because of what they said."""
        if len(self._states) == tree.nodes > 0:
            self.evaluate(context, tree.tokens[:, -1])

    @contextlib.contextmanager
    def verifying(self, context: DraftContext, tree: DraftTree) -> Iterator[None]:
        """Go on from the states in which the first layers have ended."""
        if not self._states:
            yield
            return
        with only_layers(context.run.model, self.exit_layer, states=torch.cat(self._states, dim=1)):
            yield
