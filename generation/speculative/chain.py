"""Draft a chain token by token, from whatever gives logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.sampling import draw_tokens
from hf_ext.generation.speculative.stopping import Stopping
from hf_ext.generation.speculative.tree import DraftTree


def draft_chain(
    context: DraftContext,
    length: int,
    start: Callable[[], torch.Tensor],
    follow: Callable[[torch.Tensor, int], torch.Tensor],
    stopping: Stopping | None = None,
) -> tuple[DraftTree, list[torch.Tensor]]:
    """Draft a chain under every root: the likeliest tokens when decoding is greedy, drawn ones otherwise.

    Whether a lane goes on is decided by what is known before its next token is drawn, so that the
    law of what is drafted stays the law it was drawn from.

    Args:
        context: the call.
        length: tokens to draft at most.
        start: returns the `(lanes, vocabulary)` logits after the texts; not called if nothing is drafted.
        follow: given the `(lanes,)` tokens of a node and its number, returns the logits after it.
        stopping: says before a token is drawn whether its lane goes on; all do by default.

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
        if place and stopping is not None and not stopping.reads_on():
            break
        if place:
            logits = follow(columns[-1], place - 1)
            seen.append(logits)
        scores = context.process(lanes, prefixes, logits)
        law = None if context.greedy else scores.softmax(-1)
        if stopping is not None:
            peaks = (scores.amax(-1) - scores.logsumexp(-1)).exp() if law is None else law.amax(-1)
            going = stopping.goes_on(place, peaks.tolist())
            sizes = [size if yes else min(size, place) for size, yes in zip(sizes, going, strict=True)]
            if max(sizes) <= place:
                break
        if law is None:
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
