"""OPT-Tree: for every step the draft tree of the largest expected acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import deterministic
from hf_ext.generation.speculative.best_first import BestFirstDrafter
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.strategy import positive


@dataclass
class OptTree(Speculative):
    """Speculative decoding with the draft tree that is expected to have the most tokens accepted.

    The expected number of accepted nodes of a tree is the sum, over its nodes, of the probability
    that the walk of the target gets there, estimated by the product of the draft probabilities down
    to the node. The tree of the `nodes` largest products has the largest sum, and it is connected,
    because a node's product is at most its parent's. It is built level by level, one draft call a
    level for all rows; growth ends at `depth`, when nothing further down can have a large enough
    product, or when a level has added less than `threshold` expected tokens, since a draft call costs
    time as well. The draft is a function of the text, not drawn: sampling takes the rule for
    deterministic drafts, which accepts a token with the probability that the target gives it.

    Args:
        draft_model: a causal language model with the target's tokenizer, much cheaper than the target.
        nodes: nodes of a tree, n in the paper.
        depth: levels of a tree at most.
        threshold: expected accepted tokens that a level must add for growth to go on, delta in the
            paper; more than the time of a draft call divided by that of a target call is sensible.

    Raises:
        ValueError: the draft model has another tokenizer, or a model cannot forget rejected tokens.

    Source:
        OPT-Tree: Speculative Decoding with Adaptive Draft Tree Structure (arXiv:2406.17276).

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = OptTree(draft_model=target, nodes=12, depth=4)
        >>> ours = target.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=10, do_sample=False)
        >>> bool((ours == target.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
    """

    rule: ClassVar[Rule] = staticmethod(deterministic)

    draft_model: Any
    nodes: int = 24
    depth: int = 8
    threshold: float = 0.2

    def check_options(self) -> None:
        """Raise ValueError for trees that cannot be."""
        positive("nodes", self.nodes)
        positive("depth", self.depth)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or self.threshold < 0:
            raise ValueError(f"threshold must be a number of tokens from 0 on, got {self.threshold!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the draft model, growing the trees."""
        return BestFirstDrafter(self.draft_model, self.nodes, self.depth, gain=self.threshold, drawn=False)
