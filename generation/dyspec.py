"""DySpec: draft trees that grow, draw by draw, where acceptance is most likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import without_replacement
from hf_ext.generation.speculative.best_first import BestFirstDrafter
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.strategy import positive, share


@dataclass
class DySpec(Speculative):
    """Speculative decoding with draft trees grown greedily by estimated acceptance.

    Every node has a slot for its next child, worth the estimated probability that the target's walk
    gets there and all the siblings before are rejected. The algorithm of the paper takes the most
    valuable slot, draws its token without replacement from the draft law, and opens two slots: the
    first child's of the new node, worth the slot times the probability of the token in what was left
    of the law, and the next sibling's, worth the rest. The target tries siblings in the order of
    drawing by recursive rejection, so the text has exactly the target's law.

    The tree is the paper's, its draft calls are fewer: since slots are worth less the later they open,
    the slots filled are the `nodes` most valuable ones in whatever order one looks at them. They are
    found level by level, one draft call a level for all rows, at most `depth` calls instead of one
    a node (`hf_ext.generation.speculative.best_first` says why the law stays exact).

    With `do_sample=False` there is nothing to draw: children are the likeliest tokens, and a slot is
    worth the product of the draft probabilities down to its node.

    Args:
        draft_model: a causal language model with the target's tokenizer, much cheaper than the target.
        nodes: nodes of a tree.
        depth: levels of a tree at most, and draft calls.
        threshold: slots worth no more than this stay empty, which makes trees smaller where the draft
            model is unsure; 0 always fills all nodes.

    Raises:
        ValueError: the draft model has another tokenizer, or a model cannot forget rejected tokens.

    Source:
        DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure (arXiv:2410.11744), the greedy
        construction and its version by layers.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> target, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = DySpec(draft_model=target, nodes=12, depth=4)
        >>> ours = target.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=10, do_sample=False)
        >>> bool((ours == target.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
    """

    rule: ClassVar[Rule] = staticmethod(without_replacement)

    draft_model: Any
    nodes: int = 24
    depth: int = 8
    threshold: float = 0.0

    def check_options(self) -> None:
        """Raise ValueError for trees that cannot be."""
        positive("nodes", self.nodes)
        positive("depth", self.depth)
        share("threshold", self.threshold)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the draft model, growing the trees."""
        return BestFirstDrafter(self.draft_model, self.nodes, self.depth, threshold=self.threshold)
