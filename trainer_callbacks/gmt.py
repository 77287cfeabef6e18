"""Gradient-Mask Tuning (arXiv:2406.15330): update only the entries with the largest gradients.

Before each update, after the gradients of the whole accumulated batch are there, the entries of every
tensor whose gradient is small in absolute value get a gradient of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ext.trainer_callbacks.objective import Objective


def smallest_kept(gradient: Tensor, ratio: float) -> Tensor:
    """Return the absolute value from which on entries of a gradient are kept.

    Args:
        gradient: of one whole tensor.
        ratio: share of its entries to mask, rounded to whole entries; one entry is kept at least.

    Returns:
        A scalar. Entries that equal it are all kept, so ties keep more than the share.

    Example:
        >>> smallest_kept(torch.tensor([0.1, -4.0, 3.0, -0.2]), 0.5)
        tensor(3.)
    """
    masked = min(round(ratio * gradient.numel()), gradient.numel() - 1)
    sizes = gradient.abs().flatten()
    if sizes.device.type == "cpu" and sizes.dtype in _BITS:
        return _ranked(sizes, masked)
    if torch.are_deterministic_algorithms_enabled():  # kthvalue is refused then, for the index that it also returns
        return sizes.sort().values[masked]
    return sizes.kthvalue(masked + 1).values


#: Integers of the size of a float, and by how much to shift them for no more than 2**15 different ones.
_BITS = {torch.float32: (torch.int32, 16), torch.float16: (torch.int16, 0), torch.bfloat16: (torch.int16, 0)}


def _ranked(sizes: Tensor, rank: int) -> Tensor:
    """Return what stands at place `rank` among non-negative floats in their order, by counting and not by sorting.

    The bits of non-negative floats, read as integers, are in the order of the floats. Numbers that share the upper
    ones are counted; among those with the wanted value's upper bits the rest of it is looked for.
    """
    whole, shift = _BITS[sizes.dtype]
    upper = sizes.view(whole) >> shift
    before = torch.bincount(upper).cumsum(0)
    found = int(torch.searchsorted(before, rank, right=True))
    some = sizes[upper == found]
    return some.kthvalue(rank - (int(before[found - 1]) if found else 0) + 1).values


@dataclass(eq=False)
class GMT(Objective):
    """Mask the small gradients of each tensor before every update.

    For every trained tensor the entries with the largest absolute gradients keep them and the others
    get zero: `theta <- theta - lr * M(gradient, k)`, with the gradient averaged over the accumulated
    batch. That is the paper's rule, written for plain gradient descent. An optimizer with momentum
    or weight decay, such as AdamW, moves masked entries all the same, by what it remembers and by the
    decay; `freeze=True` puts them back after the update.

    Tensors that FSDP2 shards are masked as wholes: each one's gradient is gathered to find its
    threshold (as much traffic as gathering the weights for a forward pass, one tensor at a time).

    Args:
        mask_ratio: share of each tensor's entries that are masked, from 0 up to but not including 1;
            0 is plain training, bit for bit.
        freeze: leave masked entries as they were, whatever the optimizer remembers. Costs a copy of
            the trained weights. Entries whose gradient happens to be zero stay as well.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: `mask_ratio` is out of range; in training, FSDP1 or sparse gradients.
        RuntimeError: no gradients are to be seen (DeepSpeed ZeRO keeps them to itself).

    Example:
        >>> GMT(mask_ratio=0.4).describe()["options"]["mask_ratio"]
        0.4
        >>> GMT(mask_ratio=40)
        Traceback (most recent call last):
        ...
        ValueError: mask_ratio must be a share from 0 up to but not including 1 (0.4 masks 40 %), got 40
    """

    slug: ClassVar[str] = "gmt"
    paper: ClassVar[str] = "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance (arXiv:2406.15330)"

    mask_ratio: float = 0.4
    freeze: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mask_ratio, bool) or not 0 <= self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio must be a share from 0 up to but not including 1 (0.4 masks 40 %), got {self.mask_ratio!r}"
            )
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def on_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Set the small gradients to zero, in place."""
        if self.mask_ratio == 0:
            return
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("GMT cannot tell the tensors apart that FSDP1 flattens: use fsdp_config={'version': 2}.")
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if not trained:
            raise RuntimeError("GMT sees no gradients. DeepSpeed ZeRO keeps them to itself: use DDP or FSDP2 instead.")
        for parameter in trained:
            gradient: Any = parameter.grad
            if gradient.layout != torch.strided:
                raise ValueError(f"GMT needs dense gradients, got a {gradient.layout} one: build the model without it")
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            threshold = smallest_kept(whole, self.mask_ratio)
            gradient = _local(gradient)
            masked = gradient.abs() < threshold
            gradient.masked_fill_(masked, 0)
            self.record("gmt_masked_share", masked.sum(), masked.numel())
            if self.freeze:
                self._before.append((parameter, _local(parameter.detach()).clone()))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put masked entries back, if they are to be frozen; the gradients are still there."""
        with torch.no_grad():
            for parameter, before in self._before:
                values, gradient = _local(parameter.detach()), _local(parameter.grad)  # type: ignore[arg-type]
                values.copy_(torch.where(gradient == 0, before, values))
        self._before.clear()

    def remove(self) -> None:
        """Forget the copy of the weights as well."""
        super().remove()
        self._before.clear()


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
