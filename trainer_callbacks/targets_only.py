"""The model's own next-token loss, of the targets alone: no logits are made where nothing is to be predicted."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import adapter
from hf_ext.layers import base_model, in_evaluation
from hf_ext.trainer_callbacks.clean_loss import shifted_targets
from hf_ext.trainer_callbacks.plain_head import PlainHead


class TargetsOnly:
    """Let training passes compute the model's next-token loss from the states that have a target.

    The loss is that of the model, to rounding: a sum of cross-entropies over the count that the Trainer made. It stands
    in for `model.loss_function` during one pass at a time, so that what the model adds to it stays.

    Args:
        model: the model that trains (a PEFT wrapper is looked through).

    Raises:
        ValueError: see `PlainHead`; or the model's loss is not transformers' loss of causal models.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> TargetsOnly(build("llama")).head.line
        'forward hook on LlamaModel: last states, where the loss does without logits'
    """

    def __init__(self, model: nn.Module) -> None:
        owner: Any = base_model(model)
        self._owner = weakref.ref(owner)
        if not adapter.has_causal_loss(owner):
            raise ValueError(f"the loss of {type(owner).__name__} is not that of next tokens as transformers has it")
        self.head = PlainHead(model)
        try:
            if not self._asked(owner):
                raise ValueError(f"{type(owner).__name__} computes its loss without its loss_function")
        except BaseException:
            self.head.remove()
            raise

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with a request for no logits, and put this loss into the pass over it.

        The batch comes back as it is where somebody else has put a loss there.
        """
        self.end()
        owner = self._owner()
        if owner is None or not adapter.has_causal_loss(owner):
            return batch
        owner.loss_function = self
        return self.head.begin(batch)

    def end(self) -> None:
        """Give the model its loss back."""
        owner = self._owner()
        if owner is not None:
            adapter.give_loss_back(owner, self)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.end()
        self.head.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetsOnly:
        return self  # a copy of the model made within a pass: see `__call__`

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """Return the loss of the pass that ends here."""
        from hf_ext.kernels.linear_loss import linear_loss

        self.end()
        states, weight, bias = self.head.take()
        targets = shifted_targets(labels, shift_labels).to(states.device)  # type: ignore[arg-type]
        kept = targets != -100
        total = linear_loss(
            states[kept], weight, targets[kept], lambda found, at: found.nll.sum(), bias=bias,
            scale=self.head.scale, softcap=self.head.softcap,
        )  # fmt: skip
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    @torch.no_grad()
    def _asked(self, owner: Any) -> bool:
        """Tell whether a forward pass with labels asks `loss_function`."""
        calls = []

        def note(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return logits.new_zeros(())

        ids = torch.arange(2, device=adapter.device_of(owner))[None]
        owner.loss_function = note
        try:
            with in_evaluation(owner):
                owner(ids, labels=ids, use_cache=False)
        finally:
            adapter.give_loss_back(owner, note)
        return bool(calls)
