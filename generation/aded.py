"""ADED: drafts searched for in tri-gram statistics of what the target says, balancing exploration and exploitation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.strategy import positive

#: Stands for the token before the first one.
START = -1


class TriGrams:
    """What the target is taken to say after two tokens, learned as it speaks.

    Every time a context is met, what was known of it counts half as much, so that the statistics
    follow the text. A context met rarely leans on its last token alone: with `n` the weight of what
    is known after `a b`, `P(c | a b) = (n(a b c) + P(c | b)) / (n(a b) + 1)`, and likewise below that.

    Args:
        branches: continuations that are kept of a context.
        forgetting: share of a context's weight that stays when it is met again.

    Example:
        >>> known = TriGrams()
        >>> known.learn(1, 2, [3], [1.0])
        >>> known.after(1, 2), known.after(9, 2), known.after(2, 1)
        ([(3, 0.75)], [(3, 0.5)], [])
    """

    def __init__(self, branches: int = 8, forgetting: float = 0.5) -> None:
        self.branches, self.forgetting = branches, forgetting
        self._pairs: dict[tuple[int, int], dict[int, float]] = {}
        self._singles: dict[int, dict[int, float]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def learn(self, before: int, last: int, tokens: list[int], weights: list[float]) -> None:
        """Count `tokens` as continuations of `before last`, with weights that add up to 1 at most."""
        for known in (self._pairs.setdefault((before, last), {}), self._singles.setdefault(last, {})):
            for token in known:
                known[token] *= self.forgetting
            for token, weight in zip(tokens, weights, strict=True):
                known[token] = known.get(token, 0.0) + weight
            if len(known) > 4 * self.branches:
                for token in sorted(known, key=known.__getitem__)[: len(known) - 2 * self.branches]:
                    del known[token]

    def after(self, before: int, last: int) -> list[tuple[int, float]]:
        """Return the likeliest continuations of `before last` and their probabilities, falling."""
        single = self._singles.get(last)
        if single is None:
            return []
        weight = 1 / (sum(single.values()) + 1)
        law = {token: count * weight for token, count in single.items()}
        pair = self._pairs.get((before, last))
        if pair is not None:
            weight = 1 / (sum(pair.values()) + 1)
            law = {token: (pair.get(token, 0.0) + chance) * weight for token, chance in law.items()}
        return sorted(law.items(), key=lambda item: -item[1])[: self.branches]


def search(
    known: TriGrams, before: int, last: int, nodes: int, depth: int, exploration: float
) -> tuple[list[int], list[int]]:
    """Grow a draft tree by simulations, as in Monte Carlo tree search.

    Each simulation goes down from the root and takes at every node the child with the largest

        Q + exploration * P * sqrt(N) / (1 + n)

    where `P` is the child's probability, `n` and `N` are the visits of child and parent, and `Q` is the
    mean gain of the simulations through the child (P before the first). It ends with a new node; its
    gain at a node above is the probability, given that node's parent, that the text gets to the new one.

    Args:
        known: the statistics.
        before: the token before the last.
        last: the last token of the text.
        nodes: nodes of the tree at most.
        depth: longest path.
        exploration: weight of the second term.

    Returns:
        Tokens and parents, -1 for the root. Siblings stand in the order of their probability.

    Example:
        >>> known = TriGrams()
        >>> known.learn(1, 2, [3, 4], [0.75, 0.25])
        >>> known.learn(2, 3, [5], [1.0])
        >>> search(known, 1, 2, nodes=3, depth=4, exploration=1.0)
        ([3, 5, 4], [-1, 0, -1])
    """
    tokens, parents, chances = [last], [-1], [1.0]
    above = [before]
    visits, gains = [1], [0.0]
    choices = [known.after(before, last)]
    children: list[list[int]] = [[]]
    for _ in range(2 * nodes):
        if len(tokens) > nodes:
            break
        node, path, gain = 0, [0], 0.0
        while len(path) <= depth:
            options, below = choices[node], children[node]
            explore = exploration * math.sqrt(visits[node])
            best, score = -1, 0.0
            for child in below:
                value = gains[child] / visits[child] + explore * chances[child] / (1 + visits[child])
                if value > score:
                    best, score = child, value
            if len(below) < len(options):  # the likeliest of those that are not in the tree yet
                token, chance = options[len(below)]
                if chance * (1 + explore) > score:
                    below.append(len(tokens))
                    path.append(len(tokens))
                    tokens.append(token)
                    parents.append(node - 1)
                    chances.append(chance)
                    above.append(tokens[node])
                    visits.append(0)
                    gains.append(0.0)
                    choices.append(known.after(tokens[node], token))
                    children.append([])
                    gain = 1.0
                    break
            if best < 0:
                break  # nothing follows; the visits alone make the others more attractive
            node = best
            path.append(node)
        for node in reversed(path):
            gain *= chances[node]
            visits[node] += 1
            gains[node] += gain
    return tokens[1:], parents[1:]


class TriGramDrafter(Drafter):
    """Drafts trees from statistics that grow with every answer of the target.

    Args:
        known: the statistics.
        nodes: nodes of a tree.
        depth: longest path.
        exploration: weight of exploration.
    """

    def __init__(self, known: TriGrams, nodes: int, depth: int, exploration: float) -> None:
        self.known, self.nodes, self.depth, self.exploration = known, nodes, depth, exploration

    def start(self, context: DraftContext) -> None:
        """Learn the prompts."""
        for text in context.texts:
            for before, last, token in zip([START, *text], text, text[1:], strict=False):
                self.known.learn(before, last, [token], [1.0])

    def propose(self, context: DraftContext) -> DraftTree:
        """Search a tree for every lane."""
        nodes, depth = context.useful_nodes(self.nodes), context.useful_depth(self.depth)
        found = [
            search(self.known, text[-2] if len(text) > 1 else START, text[-1], nodes, depth, self.exploration)
            for text in context.texts
        ]
        return DraftTree.from_lists([tokens for tokens, _ in found], [above for _, above in found], context.device)

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Learn the target's law after every node that it evaluated, the accepted ones last."""
        tree, going = verified.tree, verified.continues
        if not going or not verified.outcomes[going[0]].tokens:
            return
        likeliest = verified.logits.float().softmax(-1).topk(min(self.known.branches, verified.logits.shape[-1]))
        answers, chances, drafted = likeliest.indices.tolist(), likeliest.values.tolist(), tree.tokens.tolist()
        for text, lane in zip(context.texts, going, strict=True):
            outcome = verified.outcomes[lane]
            root = len(text) - len(outcome.tokens) - 1
            tokens, before = [text[root], *drafted[lane]], text[root - 1] if root else START
            accepted = set(outcome.nodes)
            for node in (*(n for n in range(tree.size(lane)) if n not in accepted), -1, *outcome.nodes):
                above = before if node < 0 else tokens[tree.parents[lane][node] + 1]
                self.known.learn(above, tokens[node + 1], answers[lane][node + 1], chances[lane][node + 1])


@dataclass
class ADED(Speculative):
    """Adaptive draft-verification: a tree searched in statistics of the target's own answers, no draft model.

    What the target says after two tokens is counted while it speaks (`TriGrams`), from the text and
    from its law at every node it evaluates. Drafts are found by a search that balances exploration
    against exploitation (`search`) and verified in one call; the answers feed the next search. The
    statistics begin with the prompts of a call, and all rows of a batch share them; `keep=True` goes on
    with those of the last call, so that later calls begin with what earlier ones have taught.

    The paper starts from statistics of a corpus and describes its search as inspired by Monte Carlo
    tree search; here there is no corpus, and the search is PUCT as its docstring has it.

    Args:
        nodes: nodes of the tree at most.
        depth: longest path.
        exploration: weight of exploration; 0 always follows what looked best so far.
        keep: go on with the statistics of the last call.

    Raises:
        ValueError: the model cannot forget rejected tokens.

    Source:
        Adaptive Draft-Verification for Efficient Large Language Model Decoding (arXiv:2407.12021).

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = ADED(nodes=16)
        >>> ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)).all())
        True
        >>> strategy.report.target_calls < 40
        True
    """

    nodes: int = 32
    depth: int = 8
    exploration: float = 1.0
    keep: bool = False
    _kept: TriGrams | None = field(default=None, init=False, repr=False, compare=False)

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        for name in ("nodes", "depth"):
            positive(name, getattr(self, name))
        if isinstance(self.exploration, bool) or not isinstance(self.exploration, (int, float)) or self.exploration < 0:
            raise ValueError(f"exploration must be a number from 0 on, got {self.exploration!r}")
        if not isinstance(self.keep, bool):
            raise ValueError(f"keep must be True or False, got {self.keep!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return a drafter over the statistics."""
        if not self.keep or self._kept is None:
            self._kept = TriGrams()
        return TriGramDrafter(self._kept, self.nodes, self.depth, self.exploration)
