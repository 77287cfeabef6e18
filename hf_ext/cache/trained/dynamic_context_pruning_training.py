"""Training to drop tokens: the price of what is kept, and the schedule of the sparse sigmoid (arXiv:2305.15805)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ext.cache.trained.dynamic_context_pruning_model import DynamicContextPruningModel
from hf_ext.trainer_callbacks.clean_loss import next_token_loss
from hf_ext.trainer_callbacks.objective import Objective


@dataclass(eq=False)
class DynamicContextPruningTraining(Objective):
    """Teach a `DynamicContextPruningModel` to drop what it can do without.

    The loss is the next-token loss plus `gamma` times the share of what came before that a row's tokens keep, averaged
    over layers and pairs of tokens (and over rows by their targets, so that no split of the batch changes it). In every
    step `alpha` follows a cosine from its first to its last value: what fades at first is gone or not gone at the end,
    nearly as in evaluation mode, where `alpha` is infinite.

    The log has `kept`, that share, `alpha`, and `clean_loss`, the next-token loss without the price.

    Args:
        gamma: the price; the larger, the more is dropped. The authors' script has 0.3.
        first_alpha: at the first step.
        last_alpha: after `steps` of them.
        steps: of the optimizer, over which `alpha` rises; all steps of the training if None.
        seed: of nothing, as nothing is drawn.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range; in training, another model.

    Example:
        >>> training = DynamicContextPruningTraining(gamma=0.3)
        >>> [round(training.alpha(step, 4), 2) for step in range(5)]
        [1.0, 2.03, 4.5, 6.97, 8.0]
    """

    slug: ClassVar[str] = "dynamic-context-pruning-training"
    paper: ClassVar[str] = (
        "Dynamic Context Pruning for Efficient and Interpretable Autoregressive Transformers (arXiv:2305.15805)"
    )

    gamma: float = 0.3
    first_alpha: float = 1.0
    last_alpha: float = 8.0
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be a number from 0, got {self.gamma!r}")
        if not 1 <= self.first_alpha <= self.last_alpha < math.inf:
            raise ValueError(
                f"alpha must rise from a number from 1, got {self.first_alpha!r} first and {self.last_alpha!r} last"
            )
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"steps must be a number of optimizer steps from 1, got {self.steps!r}")

    def alpha(self, step: int, steps: int) -> float:
        """Return alpha at a step of so many."""
        done = min(step / steps, 1.0)
        return self.last_alpha + 0.5 * (self.first_alpha - self.last_alpha) * (1 + math.cos(math.pi * done))

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Keep the model, whose alpha follows the schedule."""
        if not isinstance(model, DynamicContextPruningModel):
            raise ValueError(
                f"{self.name} trains a DynamicContextPruningModel, got a {type(model).__name__}; wrap it: "
                "DynamicContextPruningModel(model, LoraConfig(...))"
            )
        self._model = model

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set alpha."""
        super().on_step_begin(args, state, control, **kwargs)
        self._model.alpha = self.alpha(state.global_step, self.steps or state.max_steps)

    def token_loss(self, logits: Tensor, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the summed next-token loss and the price of what each row keeps, once for each of its targets."""
        total, count = next_token_loss(logits, targets)
        kept = self._model.kept
        if kept is None or not kept.requires_grad:
            raise RuntimeError(
                "the parts that say what is dropped are frozen: load the model with is_trainable=True, or call "
                "model.parts.requires_grad_(True)"
            )
        kept, weight = kept.mean(0), (targets != -100).sum(-1).to(kept.device)
        price = (kept * weight).sum()
        self.record("kept", price.detach(), weight.sum())
        self.record("alpha", torch.tensor(self._model.alpha), 1)
        return total + self.gamma * price.to(total.device), count
