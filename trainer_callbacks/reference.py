"""A model beside the one that trains, which reads its batches without gradients: a teacher, an earlier version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_ext.kernels.linear_logits import GivenLogits, HeadLogits, Logits
from hf_ext.trainer_callbacks.clean_loss import as_in_evaluation
from hf_ext.trainer_callbacks.logits_readers import reader_of
from hf_ext.trainer_callbacks.plain_head import PlainHead

#: What of a training batch says what is to be learnt, not what is to be read.
_LABELS = ("labels", "shift_labels", "num_items_in_batch")


class Reference:
    """The logits of another model on training batches, a piece at a time where its head allows that.

    Args:
        model: it is not trained, nor left in another mode than it is in.
        weights: to run it with in place of its own, by their names; None for its own.
        with_logits: True to have all its logits built.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> reference = Reference(build("llama"))
        >>> reference.line
        'forward hook on LlamaModel: last states, of a model whose logits are not built'
        >>> batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
        >>> found = reference.read(batch, torch.tensor([0]), torch.tensor([2]))
        >>> len(found), type(found).__name__
        (1, 'HeadLogits')
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor] | None = None, *, with_logits: bool = False
    ) -> None:
        self.model = model
        self.weights = (
            None if weights is None else {f"reference.model.{name}": value for name, value in weights.items()}
        )
        self._head, reason = None, "without_logits=False asks for them" if with_logits else reader_of(model)
        if reason is None:
            try:
                self._head = PlainHead(model)
            except ValueError as error:
                reason = str(error)
        self.line = f"nothing on {type(model).__name__}: its logits are built, since {reason}"
        if self._head is not None:
            where = self._head.line.partition(":")[0]
            self.line = f"{where}: last states, of a model whose logits are not built"

    def read(self, batch: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Logits:
        """Read a batch and return the logits of some of its tokens, those that predict the next ones.

        Args:
            batch: of the model that trains.
            rows: (tokens,) of the batch.
            columns: (tokens,) likewise, counted from its first column.
        """
        given = {name: value for name, value in batch.items() if name not in _LABELS}
        ids = given.get("input_ids")
        with as_in_evaluation(self.model), torch.no_grad():
            pass_, asked = _Pass(self), (given | {"use_cache": False}, ids, rows, columns)
            return pass_(*asked) if self.weights is None else functional_call(pass_, dict(self.weights), asked)

    def remove(self) -> None:
        """Take the hook off the model."""
        if self._head is not None:
            self._head.remove()


class _Pass(nn.Module):
    """A pass with what follows it: head and states have to be looked at while the weights are what they shall be."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference = nn.Module()
        self.reference.model = reference.model
        self._head = reference._head

    def forward(self, given: dict[str, Any], ids: Tensor | None, rows: Tensor, columns: Tensor) -> Logits:
        head, model = self._head, cast("nn.Module", self.reference.model)
        made = model(**(given if head is None else head.begin(given)))
        states, weight, bias = (made.logits, None, None) if head is None else head.take()
        # prompt tuning puts virtual tokens before those of the batch
        virtual = 0 if ids is None else states.shape[1] - ids.shape[1]
        places = rows.to(states.device) * states.shape[1] + columns.to(states.device) + virtual
        if bool((columns < -virtual).any()):
            raise ValueError(
                "the first token of a row is predicted by virtual tokens (prompt tuning), which the other "
                f"{type(model).__name__} does not read: set the labels of first tokens to -100"
            )
        flat = states.flatten(0, 1)
        if head is None or weight is None:
            return GivenLogits(flat, places)
        return HeadLogits(flat[places], weight, bias, head.scale, head.softcap)
