"""CAFT: fine-tuning on several tokens ahead through auxiliary heads that drop away (arXiv:2506.07833)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ext.generation.heads.multi_token import MultiTokenHead
from hf_ext.trainer_callbacks.clean_loss import loss_of_states, next_token_loss
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.tap import document_numbers

SCHEDULES = ("rsine", "sine", "constant")


def ahead(targets: Tensor, documents: Tensor, places: int) -> Tensor:
    """Return the tokens some places after the next one.

    Args:
        targets: (batch, length), the next token of each position, -100 where none trains.
        documents: (batch, length), the number of each position's document, -1 for padding.
        places: how far after the next one.

    Returns:
        (batch, length): for position t the target of position `t + places`, -100 where that is behind the row's end,
        in another document, or not trained. Whether the tokens in between train does not matter.

    Example:
        >>> ahead(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]]), 1)
        tensor([[-100, -100,    8, -100]])
    """
    found = torch.full_like(targets, -100)
    length = targets.shape[1]
    if places >= length:
        return found
    later = targets[:, places:]
    # The target of position t is the token of position t + 1; behind the last one there is no other document.
    of_targets = torch.cat((documents[:, 1:], documents[:, -1:]), 1)[:, places:]
    same = (of_targets == documents[:, : length - places]) & (of_targets >= 0)
    found[:, : length - places] = torch.where(same, later, -100)
    return found


@dataclass(eq=False)
class CAFT(Objective):
    """Fine-tune a model on the next token and, through frozen heads, on those after it.

    With heads 1 to m that predict the k-th token after the next one from the model's last state, the loss is

        L = L_0 + coefficient * s(t) * sum_k decay^k L_k

    where L_0 is the next-token loss and L_k that of head k. `s(t)` falls from 1 to 0 over the training by default
    (`"rsine"`, `sin((1 - t/T) pi/2)`), so that what is trained in the end is next-token prediction. The heads are
    trained once for the model, before this and on it frozen (`TrainDraftHead(MultiTokenHead.for_target(model))`), and
    are not changed here: what they ask for, the model has to put into its states. The trained model is stock; the
    heads are no part of it, and can serve as its drafter (`hf_ext.generation.MultiTokenDrafting`).

    All losses are sums over tokens divided by the number of next-token targets in the whole accumulated batch. (The
    released code takes the mean of each head's own targets in a micro-batch, which depends on the split.)

    Args:
        heads: a `MultiTokenHead` trained for the model, or the folder of a saved one.
        coefficient: weight of the auxiliary losses; 0 is plain training, bit for bit, and never asks the heads.
        decay: factor of the weight from head to head.
        schedule: `"rsine"` falls from 1 to 0, `"sine"` rises, `"constant"` stays.
        seed: base of all random numbers; none are drawn here.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: options are out of range; in training, the heads are for another model.

    Source:
        "Improving large language models with concept-aware fine-tuning" (arXiv:2506.07833); form of the loss and
        defaults (0.01, 0.8, rsine, heads frozen) as in the released code.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> objective = CAFT(heads=MultiTokenHead.for_target(build("llama"), heads=3), schedule="constant")
        >>> [round(weight, 6) for weight in objective.weights(step=5, steps=10)]
        [0.008, 0.0064, 0.00512]
    """

    slug: ClassVar[str] = "caft"
    paper: ClassVar[str] = "Improving large language models with concept-aware fine-tuning (arXiv:2506.07833)"

    heads: Any
    coefficient: float = 0.01
    decay: float = 0.8
    schedule: str = "rsine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.heads, (str, os.PathLike, MultiTokenHead)):
            raise ValueError(
                "heads must be a MultiTokenHead or the folder of a saved one, got an object of type "
                f"{type(self.heads).__name__}; train them once with TrainDraftHead(MultiTokenHead.for_target(model))"
            )
        for name in ("coefficient", "decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {value!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        self._loaded = (
            self.heads if isinstance(self.heads, MultiTokenHead) else MultiTokenHead.from_pretrained(self.heads)
        )

    def describe(self) -> dict[str, Any]:
        """Return name, paper, options and hooks, with the number of heads in their place."""
        described = super().describe()
        if isinstance(self.heads, MultiTokenHead):
            described["options"]["heads"] = f"MultiTokenHead of {self.heads.config.heads}"
        return described

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Check that the heads are the model's, and put a frozen copy on its device."""
        self._loaded.check_target(model)
        weight = next(model.parameters())
        self._heads = copy.deepcopy(self._loaded).to(weight.device, weight.dtype).requires_grad_(False).eval()

    def weights(self, step: int, steps: int) -> list[float]:
        """Return the weight of each head's loss at optimizer step `step` of `steps`."""
        part = step / max(steps, 1)
        factor = {"rsine": math.sin((1 - part) * math.pi / 2), "sine": math.sin(part * math.pi / 2), "constant": 1.0}
        number: int = self._loaded.config.heads
        return [self.coefficient * factor[self.schedule] * self.decay**k for k in range(1, number + 1)]

    def states_needed(self) -> Iterable[int]:
        """Name the last state, unless the heads have no weight."""
        return self._loaded.trained_on if any(self._weights()) else ()

    def loss_on_hidden(
        self,
        states: Mapping[int, Tensor],
        logits: Tensor,
        targets: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        **extra: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the next-token loss and the weighted losses of the heads."""
        total, count = next_token_loss(logits, targets)
        if not states:
            return total, count
        [hidden] = states.values()
        hidden = hidden[:, -targets.shape[1] :]  # prompt tuning puts virtual tokens first
        documents = document_numbers(self.batch)[:, -targets.shape[1] :]
        for number, weight in enumerate(self._weights(), start=1):
            if weight == 0:
                continue
            wanted = ahead(targets, documents, number)
            loss, some = loss_of_states(to_logits, self._heads(hidden, number), wanted)
            self.record(f"loss_ahead_{number}", loss, some)
            total = total + weight * loss
        return total, count

    def _weights(self) -> list[float]:
        return self.weights(self._state.global_step, self._state.max_steps)
