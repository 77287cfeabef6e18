"""Training with a prefix mask: prompts see all of themselves, targets stay causal (arXiv:2204.05832)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.trainer_callbacks import noise
from hf_ext.trainer_callbacks.conflicts import refuse_balanced_experts
from hf_ext.trainer_callbacks.objective import Objective


@dataclass(eq=False)
class PrefixLMTraining(Objective):
    """Convert a causal model to a prefix language model, or train one, with the stock Trainer.

    The tokens of a row before its first label (the prompt, whose labels are -100) see each other in both
    directions; labels and loss stay as they are. What was trained so is read by
    `hf_ext.generation.PrefixLM`. Training without this callback converts a model back; with a `share` below 1
    some rows stay causal, and the model learns both.

    Args:
        share: of the rows that are read with the prefix mask, drawn at random by their tokens; 0 is plain
            training, bit for bit.
        seed: base of the draw; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`; the clean loss is that of causal attention.

    Raises:
        ValueError: `share` is out of range; in training, a batch without labels, or with several texts in a row.

    Example:
        >>> PrefixLMTraining(share=0.5).describe()["options"]["share"]
        0.5
        >>> PrefixLMTraining(share=2)
        Traceback (most recent call last):
        ...
        ValueError: share must be a number from 0 to 1, got 2
    """

    slug: ClassVar[str] = "prefix-lm-training"
    paper: ClassVar[str] = (
        "What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization? "
        "(arXiv:2204.05832)"
    )

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share <= 1:
            raise ValueError(f"share must be a number from 0 to 1, got {self.share!r}")

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Keep the model, whose attention decides which form the masks take."""
        if self.share:
            refuse_balanced_experts(self, model)
        self._model = model

    def corrupt(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace the attention mask; everything else is passed on."""
        if self.share == 0:
            return inputs
        labels, ids, mask = inputs.get("labels"), inputs["input_ids"], inputs.get("attention_mask")
        if labels is None:
            raise ValueError(
                f"{self.name} finds the prompts by their labels (-100), but the batch has only: {', '.join(inputs)}"
            )
        real = torch.ones_like(ids) if mask is None else mask
        if real.ndim != 2 or real.shape != ids.shape or _restarts(inputs.get("position_ids"), real):
            raise ValueError(
                f"{self.name} takes one text a row and a mask of padding; switch packing and padding_free off"
            )
        prefix = ((labels != -100).long().cumsum(-1) == 0) & real.bool()
        known = {**inputs, "attention_mask": real}
        prefix &= noise.document_uniform(known, seed=self._seed, step=self._state.global_step) < self.share
        self.record("prefix_share", prefix.sum(), real.sum())
        structure = AttentionStructure.causal(real).spans(prefix.long())
        return {**inputs, "attention_mask": masks_for(self._model, structure)}


def _restarts(positions: Tensor | None, real: Tensor) -> bool:
    """Tell whether positions go back within a row, as they do where texts are packed."""
    if positions is None:
        return False
    return bool(((positions[:, 1:] < positions[:, :-1]) & real[:, 1:].bool()).any())
