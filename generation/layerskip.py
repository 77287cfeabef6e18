"""LayerSkip's self-speculation: the first layers draft, the others check, and both share one cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import single_draft
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.self_draft import EarlyExitDrafter
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative_decoding import check_draft_tokens
from hf_ext.generation.strategy import positive, share
from hf_ext.layers import decoder_layers


@dataclass
class LayerSkip(Speculative):
    """Self-speculative decoding with early exits: no draft model, no further weights, one cache.

    The first `exit_layer` layers, the final norm and the LM head draft `draft_tokens` tokens. The
    other layers then check them all in one pass, starting from the states in which the first layers
    have ended, so the first layers never run twice. It pays if early exits predict well, which
    training with `hf_ext.trainer_callbacks.LayerSkipTraining` brings about.

    Args:
        exit_layer: number of layers that draft; half of the model's if None.
        draft_tokens: tokens drafted a step; 0 decodes without drafts.
        confidence: draft no further where the likeliest token has a probability below this, from 0 to 1.

    Raises:
        ValueError: the model has not so many layers, or cannot forget rejected tokens.

    Source:
        LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding (arXiv:2404.16710), section 4.3.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = LayerSkip(exit_layer=1, draft_tokens=3)
        >>> ours = model.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=10, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
    """

    rule: ClassVar[Rule] = staticmethod(single_draft)
    drafts_with_target: ClassVar[bool] = True

    exit_layer: int | None = None
    draft_tokens: int = 4
    confidence: float = 0.0

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        if self.exit_layer is not None:
            positive("exit_layer", self.exit_layer)
        check_draft_tokens(self.draft_tokens)
        share("confidence", self.confidence)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the first layers as a drafter."""
        return EarlyExitDrafter(exit_of(run.model, self.exit_layer), self.draft_tokens, self.confidence)


def exit_of(model: object, exit_layer: int | None) -> int:
    """Return the number of layers before an exit: half of the model's, or what was asked for.

    Raises:
        ValueError: nothing would be left to check the drafts.
    """
    count = len(decoder_layers(model))  # type: ignore[arg-type]
    if exit_layer is None:
        return max(count // 2, 1)
    if exit_layer >= count:
        raise ValueError(f"exit_layer={exit_layer}, but {type(model).__name__} has {count} layers; exit before that")
    return exit_layer
