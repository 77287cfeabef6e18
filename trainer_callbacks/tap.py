"""Look at what one module of the model read in the training pass that has just been."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.trainer_callbacks import noise


class Tap:
    """Keep the arguments of the last call of a module in training, until they are taken.

    For losses that want more than the logits: `Tap(model.get_output_embeddings())` has the states that the
    head reads. It is a forward pre-hook on that instance, quiet outside training and on copies of the model.

    Args:
        module: the module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> tap = Tap(layer)
        >>> _ = layer(torch.ones(1, 2))
        >>> tap.take()[0][0]
        tensor([[1., 1.]])
        >>> tap.remove()
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._name = type(module).__name__
        self._handle = module.register_forward_pre_hook(_Recorder(self, module), with_kwargs=True)

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, and forget them.

        Raises:
            RuntimeError: the module was not called since.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError(f"the model did not call its {self._name} in this training pass")
        return seen

    def remove(self) -> None:
        """Take the hook off. Calling it twice does nothing."""
        self._handle.remove()
        self._seen = None


class _Recorder:
    """The hook: holds tap and module weakly, so that a copy of the model does not report here."""

    def __init__(self, tap: Tap, module: nn.Module) -> None:
        self._tap, self._module = weakref.ref(tap), weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recorder:
        return self

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap = self._tap()
        if tap is not None and module is self._module() and module.training and torch.is_grad_enabled():
            tap._seen = (args, kwargs)


def texts_of(batch: Mapping[str, Any], rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
    """Number the texts of a batch, for losses that compare the targets of one text.

    Args:
        batch: see `document_numbers`.
        rows: (targets,) of the batch.
        columns: (targets,) from which each is predicted; -1 for the last of the virtual tokens of prompt tuning.

    Returns:
        (targets,) the number of each target's text, and a number that is above all of them.

    Example:
        >>> batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
        >>> texts_of(batch, torch.tensor([0, 1, 1]), torch.tensor([0, -1, 1]))
        (tensor([0, 3, 3]), 6)
    """
    documents = document_numbers(batch)
    rows, columns = (places.to(documents.device) for places in (rows, columns.clamp(min=0)))
    return documents[rows, columns] + rows * documents.shape[1], documents.numel()


def document_numbers(batch: Mapping[str, Any]) -> Tensor:
    """Number the documents of each row of a batch, for losses that compare tokens of one text.

    Args:
        batch: with `input_ids` (batch, length), and `attention_mask` or `position_ids` where it has them.

    Returns:
        (batch, length) int64: which document of its row a token belongs to, from 0; -1 on padding.

    Raises:
        ValueError: the mask is not one of padding, so padding cannot be told from text.

    Example:
        >>> ids = torch.ones(1, 5, dtype=torch.long)
        >>> document_numbers({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2]])})
        tensor([[0, 0, 1, 1, 1]])
        >>> document_numbers({"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])})
        tensor([[-1, -1,  0,  0,  0]])
    """
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"this objective tells texts from padding by a mask of (batch, length), but the batch's attention_mask has "
            f"{mask.dim()} dimensions; do not combine it with an objective that changes the attention mask"
        )
    positions = noise.document_positions(batch)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = real[:, 1:] & real[:, :-1] & (positions[:, 1:] != positions[:, :-1] + 1)
    return starts.cumsum(-1).masked_fill(~real, -1)
