"""The training half of LayerSkip (arXiv:2404.16710): layer dropout and a loss on early exits.

A model trained so predicts well from its early layers, so that it can draft for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ext.layers import decoder_layers
from hf_ext.trainer_callbacks import noise
from hf_ext.trainer_callbacks.clean_loss import next_token_loss
from hf_ext.trainer_callbacks.objective import Objective

CURRICULA = ("rotational", "gradual", "none")


@dataclass(eq=False)
class LayerSkipTraining(Objective):
    """Drop layers at random, the more the deeper, and train every layer to predict the next token.

    Layer l of L (from 0) is dropped for a whole document with probability `S(t) D(l) layer_dropout`,
    where `D(l) = exp(l ln 2 / (L - 1)) - 1` rises from 0 to 1; a dropped layer passes its input on, and
    nothing is rescaled. As in the paper each sample draws for itself; here the draw depends on seed,
    step and the sample's tokens, so that no split of the batch changes it.

    The loss is the weighted mean of the next-token losses of the exits, all through the model's own
    final norm and LM head. The weights are `e(l) = early_exit_scale (0 + ... + l)` and
    `L - 1 + early_exit_scale (0 + ... + (L - 2))` for the last layer, times the curriculum, normalised.
    The first layer has weight 0, as in the paper.

    Args:
        layer_dropout: the last layer's probability to be dropped, from 0 up to but not including 1.
        early_exit_scale: strength of the early exits; 0 trains the last layer alone. With both at 0,
            training is plain, bit for bit.
        curriculum: which exits train in a step. `"rotational"`: every `period`-th layer, another set
            each step; `"gradual"`: from the last layer downwards, all of them after half of the
            training; `"none"`: all of them always. The last layer always trains.
        period: of the rotation.
        dropout_curriculum: let the dropout rise from 0 over the training, `S(t) = exp(t ln 2 / (T - 1)) - 1`,
            as the paper does when it trains from scratch; otherwise `S(t) = 1`.
        seed: base of the random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> objective = LayerSkipTraining(curriculum="none")
        >>> [round(weight, 3) for weight in objective.exit_weights(layers=4, step=0, steps=100)]
        [0.0, 0.1, 0.3, 0.6]
    """

    slug: ClassVar[str] = "layerskip-training"
    paper: ClassVar[str] = "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding (arXiv:2404.16710)"

    layer_dropout: float = 0.1
    early_exit_scale: float = 1.0
    curriculum: str = "rotational"
    period: int = 3
    dropout_curriculum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer_dropout, bool) or not 0 <= self.layer_dropout < 1:
            raise ValueError(f"layer_dropout must be a share from 0 up to but not 1, got {self.layer_dropout!r}")
        if not (self.early_exit_scale >= 0 and math.isfinite(self.early_exit_scale)):
            raise ValueError(f"early_exit_scale must be a number from 0, got {self.early_exit_scale!r}")
        if self.curriculum not in CURRICULA:
            raise ValueError(f"curriculum must be one of {', '.join(CURRICULA)}, got {self.curriculum!r}")
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period must be a number of layers from 1, got {self.period!r}")

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Count the layers."""
        self._layers = len(decoder_layers(model))

    def drop_rates(self, layers: int, step: int, steps: int) -> list[float]:
        """Return each layer's probability to be dropped at optimizer step `step` of `steps`.

        Example:
            >>> [round(rate, 3) for rate in LayerSkipTraining(layer_dropout=0.2).drop_rates(3, 0, 10)]
            [0.0, 0.083, 0.2]
        """
        rise = math.exp(step * math.log(2) / max(steps - 1, 1)) - 1 if self.dropout_curriculum else 1.0
        return [
            rise * self.layer_dropout * (math.exp(layer * math.log(2) / max(layers - 1, 1)) - 1)
            for layer in range(layers)
        ]

    def exit_weights(self, layers: int, step: int, steps: int) -> list[float]:
        """Return each layer's share of the loss at optimizer step `step` of `steps`."""
        last = layers - 1
        weights = [self.early_exit_scale * layer * (layer + 1) / 2 for layer in range(last)]
        weights.append(max(last, 1) + self.early_exit_scale * (last - 1) * last / 2)
        if self.curriculum == "rotational":
            weights[:last] = [weights[i] if (i - step) % self.period == 0 else 0.0 for i in range(last)]
        elif self.curriculum == "gradual":
            lowest = last - step * 2 * layers // max(steps, 1)
            weights[:last] = [weights[i] if i >= lowest else 0.0 for i in range(last)]
        total = sum(weights)
        return [weight / total for weight in weights]

    def on_layer(self, index: int, before: Tensor, after: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Pass on what the layer read, for the documents for which it is dropped."""
        rate = self.drop_rates(self._layers, self._state.global_step, self._state.max_steps)[index]
        if rate == 0:
            return after
        if batch.get("input_ids") is None:
            raise ValueError(f"{self.name} draws by the tokens, but the batch has only: {', '.join(batch)}")
        drawn = noise.document_uniform(batch, seed=self._seed, step=self._state.global_step, stream=index)
        extra = after.shape[1] - drawn.shape[1]  # prompt tuning puts virtual tokens first
        if extra > 0:
            drawn = torch.cat((drawn[:, :1].expand(-1, extra), drawn), dim=1)
        return torch.where((drawn < rate)[..., None], before, after)

    def states_needed(self) -> Iterable[int]:
        """Name the states whose exits train in this step, except the last."""
        return [layer + 1 for layer, weight in enumerate(self._weights()[:-1]) if weight]

    def loss_on_hidden(
        self,
        states: Mapping[int, Tensor],
        logits: Tensor,
        targets: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        **extra: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the next-token losses of the exits."""
        weights = self._weights()
        total, count = next_token_loss(logits, targets)
        self.record(f"exit_loss_{self._layers}", total, count)
        if states:
            total = weights[-1] * total
        for state, hidden in sorted(states.items()):
            early, _ = next_token_loss(to_logits(hidden[:, -targets.shape[1] :]), targets)
            self.record(f"exit_loss_{state}", early, count)
            total = total + weights[state - 1] * early
        return total, count

    def _weights(self) -> list[float]:
        return self.exit_weights(self._layers, self._state.global_step, self._state.max_steps)
