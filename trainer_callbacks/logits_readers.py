"""Whether somebody beside an objective's loss reads the logits of a training pass, so that they have to be built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from hf_ext.layers import base_model

if TYPE_CHECKING:
    from hf_ext.trainer_callbacks.objective import Objective

#: Methods in which a trainer's own class sees what the model returns in training.
SEEING = ("compute_loss", "training_step")


def reader_of_logits(
    objective: Objective, model: nn.Module, args: TrainingArguments, trainer: Trainer | None
) -> str | None:
    """Say who may read the logits of training passes, or why they cannot be left out; None if they can.

    Args:
        objective: whose loss can do without them.
        model: the unwrapped model.
        args: of the training.
        trainer: that trains it, None if it is not known.
    """
    if trainer is None:
        return "no Trainer is known that calls the model"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func reads them"
    for name in SEEING:
        owner = _owner(trainer, name)
        if owner is not Trainer:
            return f"{owner.__name__}.{name} may read them"
    if args.deepspeed or trainer.is_fsdp_enabled:
        return "the head is in parts on several devices"
    if args.torch_compile:
        return "the model is compiled"
    return reader_of(model)


def reader_of(model: nn.Module) -> str | None:
    """Say what of a model itself may read its logits, or why they cannot be left out; None if they can."""
    base = base_model(model)
    for what, module in (("the model", model), ("the model", base), ("its head", base.get_output_embeddings())):
        if module is not None and (module._forward_hooks or (module is not model and module._forward_pre_hooks)):
            return f"a hook on {what} may read them"
    if isinstance(model, FSDPModule):
        return "the head is in parts on several devices"
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        return "the model is on several devices"
    return None


def _owner(trainer: Trainer, name: str) -> type[Any]:
    """Return the class whose method a trainer has, `attach` aside."""
    from hf_ext.trainer_callbacks.attachment import ObjectiveMixin

    if name in vars(trainer):
        return type(vars(trainer)[name])
    return next(cls for cls in type(trainer).__mro__ if cls is not ObjectiveMixin and name in vars(cls))
