"""Draft a chain token by token, from whatever gives logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.sampling import draw_tokens
from hf_ext.generation.speculative.tree import DraftTree


def draft_chain(
    context: DraftContext,
    length: int,
    start: Callable[[], torch.Tensor],
    follow: Callable[[torch.Tensor, int], torch.Tensor],
    confidence: float = 0.0,
) -> tuple[DraftTree, list[torch.Tensor]]:
    """Draft a chain under every root: the likeliest tokens when decoding is greedy, drawn ones otherwise.

    Whether a lane goes on is decided by what is known before its next token is drawn, so that the
    law of what is drafted stays the law it was drawn from.

    Args:
        context: the call.
        length: tokens to draft at most.
        start: returns the `(lanes, vocabulary)` logits after the texts; not called if nothing is drafted.
        follow: given the `(lanes,)` tokens of a node and its number, returns the logits after it.
        confidence: draft no further where the likeliest token has a probability below this.

    Returns:
        The trees, and the logits at the root and at every node but the last.
    """
    lanes = list(range(len(context.lanes)))
    depth = context.useful_depth(length)
    if depth == 0:
        return DraftTree.empty(len(lanes), context.device), []
    logits = start()
    seen = [logits]
    prefixes: list[list[int]] = [[] for _ in lanes]
    laws: list[torch.Tensor] = []
    columns: list[torch.Tensor] = []
    sizes = [depth] * len(lanes)
    for place in range(depth):
        if place:
            logits = follow(columns[-1], place - 1)
            seen.append(logits)
        scores = context.process(lanes, prefixes, logits)
        law = scores.softmax(-1) if confidence or not context.greedy else None
        if confidence and law is not None and place:
            sure = (law.amax(-1) >= confidence).tolist()
            sizes = [size if yes else min(size, place) for size, yes in zip(sizes, sure, strict=True)]
            if max(sizes) <= place:
                break
        if context.greedy or law is None:
            tokens = scores.argmax(-1)
        else:
            tokens = draw_tokens(law)
            laws.append(law)
        columns.append(tokens)
        for prefix, token in zip(prefixes, tokens.tolist(), strict=True):
            prefix.append(token)
    # The law at the last node is not known and not needed: nothing was drafted below it.
    table = torch.stack([*laws, laws[-1]], dim=1) if laws else None
    drafted = torch.stack(columns, dim=1)
    tree = DraftTree.chain(drafted, table, sizes=[min(size, drafted.shape[1]) for size in sizes])
    return tree, seen[: len(columns)]
