"""What a training objective may define; each hook is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

#: Hooks that replace the loss on the model's output.
LOSS_HOOKS = ("loss_on_hidden", "token_loss", "statistics_loss", "distribution_loss")
#: Those of them that can do without the logits of all tokens.
WITHOUT_LOGITS = ("statistics_loss", "distribution_loss")
#: Hooks that only a trainer with the objective attached can call.
ATTACHED_HOOKS = ("step", "training_step", "make_optimizer", "on_window")
#: Hooks that a subclass may define. Each is optional.
HOOKS = ("rewrite", "corrupt", "on_layer", *LOSS_HOOKS, "on_gradients", *ATTACHED_HOOKS)


class Hooks:
    """The hooks of `hf_ext.trainer_callbacks.Objective`, which says when each is called."""

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Prepare for training on `model`: resolve token ids, check options against the model."""

    def corrupt(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch that the model shall read. See the class."""
        raise NotImplementedError

    def token_loss(self, logits: Tensor, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of targets. See the class."""
        raise NotImplementedError

    def on_layer(self, index: int, before: Tensor, after: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return what layer `index` (from 0) passes on in training.

        Called again when a checkpointed layer is recomputed, so it must give the same each time.

        Args:
            index: number of the layer.
            before: (batch, length, hidden), what it read.
            after: what it computed from that.
            batch: what the model reads.
        """
        raise NotImplementedError

    def states_needed(self) -> Iterable[int]:
        """Name the states that `loss_on_hidden` wants in this step; state `e` is what `e` layers have made."""
        raise NotImplementedError

    def loss_on_hidden(
        self,
        states: Mapping[int, Tensor],
        logits: Tensor,
        targets: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        **extra: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of targets. See the class."""
        raise NotImplementedError

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of targets.

        Args:
            statistics: `TokenStatistics` of the targets that are not -100, each (targets,).
            targets: (targets,), token ids.
            extra: what else the model hands its loss function.
        """
        raise NotImplementedError

    def distribution_loss(self, logits: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of targets.

        Args:
            logits: `hf_ext.kernels.linear_logits.Logits` of the targets that are not -100, of a head or there.
            targets: (targets,), token ids.
            extra: what else the model hands its loss function.
        """
        raise NotImplementedError

    def table(self) -> Tensor:
        """Return what the statistic `expectation` is over: (vocabulary, any width)."""
        raise NotImplementedError

    def apart(self) -> int | None:
        """Name a token that the statistics leave out and whose logit `statistics.apart` is, for an additive loss."""
        return None

    def is_plain(self) -> bool:
        """Tell whether the coming pass trains the next-token loss, which then is computed as plain training does.

        For objectives with a `statistics_loss`, whose statistics then leave no token out, or a `distribution_loss`,
        which then is not asked.
        """
        return False

    def rewrite(self, document: Any, draw: Any) -> Any:
        """Change a document and its labels; see `hf_ext.trainer_callbacks.Rewriting`."""
        raise NotImplementedError

    def on_gradients(self, model: nn.Module, optimizer: Any) -> None:
        """Change the gradients of `model.parameters()` in place, after accumulation and clipping."""
        raise NotImplementedError

    def step(
        self, trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Return the loss of a micro-batch, divided by `num_items_in_batch`. See the class."""
        raise NotImplementedError

    def training_step(
        self, trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Train on a micro-batch without the Trainer's backward pass and return its detached loss. See the class."""
        raise NotImplementedError

    def make_optimizer(self, model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
        """Return the optimizer to train `model` with. See the class."""
        raise NotImplementedError

    def on_window(self, trainer: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        """Look at all micro-batches of the coming optimizer step, on the device. See the class."""
        raise NotImplementedError
