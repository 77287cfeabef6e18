"""SpecTr: several draft sequences at once, and the rule that makes the most of independent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import k_seq
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import ModelDrafter
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.growing import GrowingTrees
from hf_ext.generation.speculative.sampling import draw_several
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative_decoding import check_draft_tokens
from hf_ext.generation.strategy import positive


class SequencesDrafter(ModelDrafter):
    """Drafts several independent sequences; what they have in common is evaluated once.

    Sequences with a common beginning share its nodes, and each node notes which child every sequence
    through it goes on to, in the order of the sequences: independent draws from one law.
    In greedy decoding nothing is drawn: the sequences begin with the likeliest tokens, one each, and
    go on with the likeliest token.

    Args:
        model: the draft model.
        sequences: their number.
        length: tokens of each.
    """

    def __init__(self, model: Any, sequences: int, length: int) -> None:
        super().__init__(model)
        self.sequences, self.length = sequences, length

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft the sequences of every lane, one token of all of them at a time."""
        sequences = context.useful_nodes(self.sequences)
        depth = context.useful_depth(self.length)
        if sequences and depth:
            depth = min(depth, context.useful_nodes(sequences * depth) // sequences)
        if not sequences or not depth:
            return DraftTree.empty(len(context.lanes), context.device)
        trees = GrowingTrees(context, self.draft)
        draws: list[dict[int, list[int]]] = [{} for _ in trees.lanes]
        ends = [[-1] * sequences for _ in trees.lanes]  # node that each sequence has come to
        for place in range(depth):
            frontier = [list(dict.fromkeys(nodes)) for nodes in ends]
            law = trees.read(frontier)
            tokens = iter(self._continue(law, ends, context.greedy, place).tolist())
            for lane, nodes in enumerate(frontier):
                found = {node: iter(next(tokens)) for node in nodes}
                grown = []
                for node in ends[lane]:
                    child = trees.add(lane, node, next(found[node]))
                    draws[lane].setdefault(node, []).append(child)
                    grown.append(child)
                ends[lane] = grown
        return trees.finish(drawn=not context.greedy, draws=draws)

    def _continue(self, law: torch.Tensor, ends: list[list[int]], greedy: bool, place: int) -> torch.Tensor:
        """Return for every node as many tokens as there are sequences through any of them."""
        through = max(max(map(nodes.count, set(nodes))) for nodes in ends)
        if not greedy:
            return draw_several(law, through)
        if place:
            return law.argmax(-1, keepdim=True).expand(-1, through)
        best = law.topk(min(through, law.shape[-1]), dim=-1).indices
        return torch.nn.functional.pad(best, (0, through - best.shape[-1]), mode="replicate")


@dataclass
class SpecTr(Speculative):
    """Speculative decoding with several draft sequences, accepted by K-SEQ.

    The draft model draws `sequences` independent continuations of `draft_tokens` tokens. The target
    evaluates all of them in one forward pass. At the root the first of the k drafted tokens that
    passes a trial with probability min(1, p / (rho q)) is taken, where rho makes up for there being k
    trials; the sequences that begin with it compete for the next token, and so on down to a token
    from the residual law. Choosing among k drafts is a problem of optimal transport between their
    law and the target's; K-SEQ accepts at least 1 - 1/e times as often as its solution. The text has
    exactly the target's law, and one sequence gives plain speculative decoding.

    With `do_sample=False` there is nothing to draw: the sequences begin with the `sequences`
    likeliest tokens and each goes on with the likeliest.

    Args:
        draft_model: a causal language model with the target's tokenizer, much cheaper than the target.
        sequences: draft sequences, k in the paper.
        draft_tokens: tokens of each sequence; 0 decodes without drafts.

    Raises:
        ValueError: the draft model has another tokenizer, or a model cannot forget rejected tokens.

    Source:
        SpecTr: Fast Speculative Decoding via Optimal Transport (arXiv:2310.15141), K-SEQ.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = SpecTr(draft_model=target, sequences=3, draft_tokens=4)
        >>> ours = target.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=11, do_sample=False)
        >>> bool((ours == target.generate(ids, attention_mask=mask, max_new_tokens=11, do_sample=False)).all())
        True
        >>> strategy.report.details["mean_accepted"]  # a draft model that is the target is always right
        4.0
    """

    rule: ClassVar[Rule] = staticmethod(k_seq)

    draft_model: Any
    sequences: int = 4
    draft_tokens: int = 5

    def check_options(self) -> None:
        """Raise ValueError for drafts that cannot be."""
        positive("sequences", self.sequences)
        check_draft_tokens(self.draft_tokens)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the draft model, drafting sequences."""
        return SequencesDrafter(self.draft_model, self.sequences, self.draft_tokens)
