"""Walk down draft trees along the tokens that the target's law accepts.

At every node the target's law of the next token is known. Greedy decoding goes on at the child that
holds the likeliest token; sampling goes on at a child that the acceptance rule accepts, or ends with
a token from the residual law. Only nodes on the way are looked at, so logits processors see exactly
the prefixes that `generate` would show them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch

from hf_ext.generation.speculative.context import DraftContext, Outcome
from hf_ext.generation.speculative.sampling import arrays, draw_tokens
from hf_ext.generation.speculative.tree import DraftTree

#: Decides at one node; see `hf_ext.generation.speculative.acceptance`.
Rule = Callable[[torch.Tensor, torch.Tensor | None, list[int]], Generator[float, None, torch.Tensor]]


def verify(
    tree: DraftTree, logits: torch.Tensor, context: DraftContext, rule: Rule, raw: torch.Tensor | None = None
) -> list[Outcome]:
    """Find the accepted path of every lane and the token that follows it.

    Args:
        tree: the drafted trees.
        logits: `(lanes, nodes + 1, vocabulary)` of the target at the root and at every node.
        context: the call.
        rule: the acceptance rule, where tokens are drawn and the tree does not bring one.
        raw: what the caller is shown as the model's logits, if those are not it.

    Returns:
        One outcome a lane.
    """
    if context.greedy and context.plain and not (context.run.keep_scores or context.run.keep_logits):
        return _likeliest(tree, logits)
    return _walk(tree, logits, context, tree.rule or rule, logits if raw is None else raw)


def _likeliest(tree: DraftTree, logits: torch.Tensor) -> list[Outcome]:
    """Greedy decoding without processors: on a CPU an argmax for each node on the way, elsewhere one for all nodes."""
    best = arrays(logits) if logits.device.type == "cpu" else logits.argmax(-1).tolist()
    outcomes = []
    for lane, drafted in enumerate(tree.listed):
        lines = best[lane]
        nodes: list[int] = []
        tokens = [int(lines[0].argmax()) if isinstance(lines, np.ndarray) else lines[0]]
        at = -1
        # A child stands behind its parent, so that one pass finds the whole way.
        for node, (parent, token) in enumerate(zip(tree.parents[lane][: tree.size(lane)], drafted, strict=False)):
            if parent == at and token == tokens[-1]:
                nodes.append(node)
                tokens.append(int(lines[node + 1].argmax()) if isinstance(lines, np.ndarray) else lines[node + 1])
                at = node
        outcomes.append(Outcome(nodes, tokens, [], []))
    return outcomes


def _walk(tree: DraftTree, logits: torch.Tensor, context: DraftContext, rule: Rule, raw: torch.Tensor) -> list[Outcome]:
    """Go down all trees side by side, one node a lane at a time."""
    run = context.run
    outcomes = [Outcome([], [], [], []) for _ in range(tree.lanes)]
    below = [tree.children(lane) for lane in range(tree.lanes)]
    drafted = tree.listed
    at = [-1] * tree.lanes
    walking = list(range(tree.lanes))
    while walking:
        lines = _lines(logits, walking, at)
        scores = context.process(walking, [outcomes[lane].tokens for lane in walking], lines)
        children = [below[lane].get(at[lane], []) for lane in walking]
        if context.greedy:
            chosen = (arrays(scores) if scores.device.type == "cpu" else scores).argmax(-1).tolist()
        else:
            laws = [_law(tree, lane, at[lane]) for lane in walking]
            texts = [[drafted[lane][node] for node in nodes] for lane, nodes in zip(walking, children, strict=True)]
            if tree.nodes:
                chosen = draw(scores.softmax(-1), laws, texts, rule)
            else:  # with the random numbers that `generate` would use: the same text for the same seed
                chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()
        still = []
        for line, lane in enumerate(walking):
            outcome, token = outcomes[lane], chosen[line]
            outcome.tokens.append(token)
            if run.keep_scores:
                outcome.scores.append(scores[line])
            if run.keep_logits:
                outcome.logits.append(raw[lane, at[lane] + 1])
            node = next((node for node in children[line] if drafted[lane][node] == token), None)
            if node is not None:
                outcome.nodes.append(node)
                at[lane] = node
                still.append(lane)
        walking = still
    return outcomes


def _lines(logits: torch.Tensor, lanes: list[int], nodes: list[int]) -> torch.Tensor:
    """Return the `(lanes, vocabulary)` logits at a node of each of some lanes."""
    if len(lanes) == 1:
        lane, place = lanes[0], nodes[lanes[0]] + 1
        return logits[lane, place : place + 1]
    return logits[lanes, [nodes[lane] + 1 for lane in lanes]]


def _law(tree: DraftTree, lane: int, node: int) -> torch.Tensor | None:
    return None if tree.probabilities is None else tree.probabilities[lane, node + 1]


def draw(target: torch.Tensor, drafts: list[torch.Tensor | None], tokens: list[list[int]], rule: Rule) -> list[int]:
    """Draw a token for each line so that its law is the target's, preferring drafted ones.

    A token from the residual law may equal a draft of the same node. The walk then goes on below it:
    what was drafted there depends on the tokens above it only, not on how they came about.

    Args:
        target: `(lines, vocabulary)` law of the target.
        drafts: law the drafts of each line were drawn from, None for drafts not drawn at random.
        tokens: drafts of each line, in the order in which they were drawn.
        rule: the acceptance rule.

    Returns:
        A token for each line.
    """
    found: list[int | None] = []
    residuals: list[torch.Tensor] = []
    for line, drafted in enumerate(tokens):
        accepted, residual = (
            _try(rule(target[line], drafts[line], drafted), drafted) if drafted else (None, target[line])
        )
        found.append(accepted)
        if residual is not None:
            residuals.append(residual)
    if residuals:
        laws = residuals[0][None] if len(residuals) == 1 else torch.stack(residuals)
        drawn = iter(draw_tokens(laws).tolist())
        return [next(drawn) if token is None else token for token in found]
    return [token for token in found if token is not None]


def _try(decisions: Generator[float, None, torch.Tensor], drafted: list[int]) -> tuple[int | None, torch.Tensor | None]:
    """Try the drafts in turn: the accepted one, or else the law of the token to draw."""
    chance = torch.rand(len(drafted)).tolist()  # on the CPU, where a seed also holds and nothing waits
    try:
        for token, luck in zip(drafted, chance, strict=True):
            if luck < next(decisions):
                return token, None
        next(decisions)
    except StopIteration as end:
        return None, end.value
    raise RuntimeError("the acceptance rule yielded more decisions than there are drafts")
