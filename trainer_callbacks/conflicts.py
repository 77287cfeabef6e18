"""What an objective cannot be combined with, said before the first step of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments

from hf_ext.layers import base_model

if TYPE_CHECKING:
    from hf_ext.trainer_callbacks.objective import Objective


def refuse_arguments(objective: Objective, args: TrainingArguments) -> None:
    """Raise if the training arguments ask for something that the objective cannot honour.

    Raises:
        ValueError: says which argument, and what to do.
    """
    mine, line = type(objective).__name__, f"attach(trainer, {type(objective).__name__}(...))"
    if objective.needs_attach and not objective.attached:
        what = "optimizer" if objective.needs_attach == ["make_optimizer"] else "training step"
        raise ValueError(f"{mine} replaces the whole {what}, which a callback cannot: use {line}.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{mine} does not work under torch.nn.DataParallel, which the Trainer uses when one process sees "
            f"{args.n_gpu} GPUs. Start it with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and (parallel.sp_enabled or parallel.cp_enabled):
        raise ValueError(f"{mine} does not work with sequence or context parallelism: a row is on several devices.")
    if objective.replaces_loss:
        if args.label_smoothing_factor:
            raise ValueError(f"{mine} replaces the loss, so label_smoothing_factor must be 0.")
        if getattr(args, "use_liger_kernel", False):
            raise ValueError(f"{mine} needs logits, which Liger's fused loss never builds: drop use_liger_kernel.")


def refuse_company(objective: Objective, others: list[Objective]) -> None:
    """Raise if `objective` cannot train a model together with the objectives that are on it already.

    Any number of objectives may change the data, the batch or the gradients; one may replace the loss.

    Raises:
        ValueError: names both, says why and what to do.
    """
    for other in others:
        reason = _reason(objective, other) or _reason(other, objective)
        if reason:
            raise ValueError(
                f"{objective.name} cannot be combined with {other.name}: {reason}. "
                "Train with one of them at a time, or remove the other one from the callbacks."
            )


def refuse_balanced_experts(objective: Objective, model: nn.Module) -> None:
    """Raise for a mixture of experts whose loss balances them: it counts the tokens by a mask that is no more there.

    Raises:
        ValueError: says which option of the model, and what to do.
    """
    config: Any = base_model(model).config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"{objective.name} puts a mask of who sees whom in the place of the mask of padding, which "
            f"{type(base_model(model)).__name__} needs to balance its experts: set "
            "model.config.output_router_logits = False, which leaves that term out of the loss."
        )


def _reason(one: Objective, other: Objective) -> str | None:
    if one.replaces_loss and other.replaces_loss:
        return f"both replace the loss ({one.replaces_loss}, {other.replaces_loss})"
    if one.has("training_step") and (hooks := _any(other, "corrupt", "on_layer", "on_gradients")):
        return f"{one.name} trains without gradients, so that {other.name}.{hooks[0]} would never be asked"
    if one.needs_attach and other.needs_attach:
        return "a trainer takes one attached objective"
    return None


def _any(objective: Objective, *hooks: str) -> list[str]:
    return [hook for hook in hooks if objective.has(hook)]
