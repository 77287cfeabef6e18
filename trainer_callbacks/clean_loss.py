"""The next-token loss on what the batch really says, measured without touching the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_ext.layers import in_evaluation


def next_token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy over the targets that are not -100.

    Args:
        logits: (..., vocab); `logits[i]` predicts `targets[i]`.
        targets: (...), already shifted.

    Returns:
        The sum and the number of targets.

    Example:
        >>> total, count = next_token_loss(torch.zeros(1, 3, 4), torch.tensor([[1, -100, 2]]))
        >>> round(float(total), 4), int(count)  # two targets among four equally likely tokens: 2 ln 4
        (2.7726, 2)
    """
    flat = targets.reshape(-1).to(logits.device)
    total = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), flat, reduction="sum")
    return total, (flat != -100).sum()


def loss_of_states(to_logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of the logits of states, without building them all where norm and head are known.

    Args:
        to_logits: what `loss_on_hidden` is given: from states to logits, with a `shortcut` where these are the head's
            output on the normed states, and nothing else.
        states: (batch, length, hidden).
        targets: (batch, length), -100 for none.

    Returns:
        The sum and the number of targets.

    Example:
        >>> loss_of_states(torch.nn.Identity(), torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))[0].exp()
        tensor(4.)
    """
    from hf_ext.kernels.linear_loss import linear_loss

    shortcut = getattr(to_logits, "shortcut", None)
    if shortcut is None or not is_plain_linear(shortcut[1]):
        return next_token_loss(to_logits(states), targets)
    norm, head = shortcut
    kept = (targets != -100).to(states.device)
    wanted = targets.to(states.device)[kept]
    total = linear_loss(norm(states[kept]), head.weight, wanted, lambda found, at: found.nll.sum(), bias=head.bias)
    return total, kept.sum()


def is_plain_linear(head: nn.Module | None) -> bool:
    """Tell whether a head is a linear layer and nothing more: no adapter, no offloading, no quantisation.

    Example:
        >>> is_plain_linear(nn.Linear(2, 3)), is_plain_linear(nn.Embedding(2, 3))
        (True, False)
    """
    return head is not None and type(head).forward is nn.Linear.forward and "forward" not in vars(head)


def shifted_targets(labels: Tensor, shift_labels: Tensor | None = None, *, shift: bool = True) -> Tensor:
    """Align labels with the logits that predict them.

    Args:
        labels: (batch, length) as the Trainer gives them.
        shift_labels: what the collator shifted already, if it did.
        shift: False for models whose labels are aligned with the logits (encoder-decoder).

    Example:
        >>> shifted_targets(torch.tensor([[7, 8, 9]]))
        tensor([[   8,    9, -100]])
    """
    if shift_labels is not None:
        return shift_labels
    return functional.pad(labels[..., 1:], (0, 1), value=-100) if shift else labels


def clean_loss(forward: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the model on `inputs` as evaluation would and return its next-token loss.

    No gradients, no dropout, random state and every module's mode as before. Costs one forward pass.

    Args:
        forward: what to call with the inputs: `model.forward`, or the wrapper around the model.
        model: the model itself, whose mode is switched.
        inputs: a batch with `labels` or `shift_labels`.

    Returns:
        The sum over targets and their number.
    """
    given = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
    with torch.no_grad(), as_in_evaluation(model):
        outputs = forward(**given)
    config = getattr(model, "config", None)
    targets = shifted_targets(
        given.get("labels"),  # type: ignore[arg-type]  # one of both is there, the caller made sure
        given.get("shift_labels"),
        shift=not getattr(config, "is_encoder_decoder", False),
    )
    count = (targets != -100).sum()
    # heads that never build the logits give log-probabilities (TRL's fused head) or only their mean loss
    if getattr(outputs, "log_probs", None) is not None:
        return -outputs.log_probs.float().sum(), count
    if getattr(outputs, "logits", None) is None:
        return outputs.loss.float() * count, count
    extra = outputs.logits.shape[1] - targets.shape[1]  # prompt tuning puts virtual tokens first
    return next_token_loss(outputs.logits[:, extra:] if extra > 0 else outputs.logits, targets)


@contextlib.contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode in the midst of its training, and leave nothing changed.

    Every module's mode and the random states are put back, and no weight that autocast casts here, maybe without
    gradients, is used by the training pass. Gradients are not switched off.

    Args:
        model: the model.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with as_in_evaluation(layer):
        ...     print(layer.training)
        False
        >>> layer.training
        True
    """
    device = next(model.parameters()).device
    cached = torch.is_autocast_cache_enabled()
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=_fork_type(device)), in_evaluation(model):
        try:
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


def _fork_type(device: torch.device) -> str:
    return device.type if device.type != "cpu" else "cuda"  # with no devices named, only the CPU's state is saved
