"""What losses of statistics or of distributions read, with the vocabulary-sized logits or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ext.trainer_callbacks.clean_loss import next_token_loss

if TYPE_CHECKING:
    from hf_ext.kernels.linear_logits import Logits
    from hf_ext.trainer_callbacks.objective import Objective
    from hf_ext.trainer_callbacks.plain_head import PlainHead


def loss_of_statistics(
    objective: Objective, head: PlainHead | None, logits: Tensor, targets: Tensor, extra: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask an objective for its loss on the statistics of a batch.

    Args:
        objective: its `statistics_loss` is asked, once for each piece of the targets, whose gradients are made
            at once, unless the objective says that it is not `additive`, or that it `is_plain`.
        head: where the last states are, if the model was asked for no logits.
        logits: (batch, length, vocabulary), `logits[:, i]` predicts `targets[:, i]`; unused with a `head`.
        targets: (batch, length), -100 for none.
        extra: what else the model hands its loss function.

    Returns:
        The summed loss, the number of targets that it counts, and the summed next-token loss.
    """
    from hf_ext.kernels.linear_loss import loss_of_pieces

    plain, options = objective.is_plain(), _options(objective)
    source, wanted, rows, columns = _of_targets(objective, head, logits, targets)
    if not objective.additive or (plain and head is None):  # plain: by autograd, to the last bit what training does
        found = source.statistics(wanted, **options)
        objective.rows, objective.columns = rows, columns
        return *objective.statistics_loss(found, wanted, **extra), found.nll.detach().sum()
    apart = None if plain else objective.apart()
    counts, sums = [], []

    def piece(found: Any, at: slice) -> Tensor:
        objective.rows, objective.columns = rows[at], columns[at]
        total, count = objective.statistics_loss(found, wanted[at], **extra)
        counts.append(count)
        sums.append(_plain_nll(found, wanted[at], apart).sum())
        return total

    total = loss_of_pieces(source, wanted, piece, apart=apart, **options)
    if not counts:  # a batch without targets
        return total, torch.zeros((), dtype=torch.long), torch.zeros(())
    return total, torch.stack([torch.as_tensor(count) for count in counts]).sum(), torch.stack(sums).sum()


@torch.no_grad()
def _plain_nll(found: Any, targets: Tensor, apart: int | None) -> Tensor:
    """Return the negative log-likelihoods under the softmax of all logits, also where a token stands apart."""
    if apart is None:
        plain: Tensor = found.nll
        return plain.detach()
    return torch.logaddexp(found.lse, found.apart) - torch.where(targets == apart, found.apart, found.lse - found.nll)


def _options(objective: Objective) -> dict[str, Any]:
    needed = objective.statistics_needed
    options: dict[str, Any] = {name: name in needed for name in ("entropy", "best")}
    return {**options, "table": objective.table()} if "expectation" in needed else options


def loss_of_distributions(
    objective: Objective, head: PlainHead | None, logits: Tensor, targets: Tensor, extra: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """Ask an objective for its loss on the distributions of a batch.

    Args:
        objective: its `distribution_loss` is asked once, unless it says that it `is_plain`.
        head: see `loss_of_statistics`.
        logits: see there.
        targets: see there.
        extra: see there.

    Returns:
        The summed loss, the number of targets that it counts, and what gives the summed next-token loss.
    """
    if head is None and objective.is_plain():
        total, count = next_token_loss(logits, targets)
        return total, count, total.detach
    source, wanted, objective.rows, objective.columns = _of_targets(objective, head, logits, targets)

    @torch.no_grad()
    def measured() -> Tensor:
        return source.statistics(wanted).nll.sum()

    if objective.is_plain():
        return source.statistics(wanted).nll.sum(), torch.as_tensor(len(wanted)), measured
    return *objective.distribution_loss(source, wanted, **extra), measured


def _of_targets(
    objective: Objective, head: PlainHead | None, logits: Tensor, targets: Tensor
) -> tuple[Logits, Tensor, Tensor, Tensor]:
    """Return the logits that predict a target, the targets, and row and column of the batch of each."""
    from hf_ext.kernels.linear_logits import GivenLogits, HeadLogits

    kept = targets != -100
    (rows, columns), wanted = kept.nonzero().unbind(-1), targets[kept]
    ids = objective.batch.get("input_ids")
    if ids is not None:  # prompt tuning puts virtual tokens before them
        columns = columns - (targets.shape[1] - ids.shape[1])
    if head is None:
        places = kept.flatten().nonzero()[:, 0].to(logits.device)
        return GivenLogits(logits.flatten(0, 1), places), wanted.to(logits.device), rows, columns
    states, weight, bias = head.take()
    found = HeadLogits(states[kept.to(states.device)], weight, bias, head.scale, head.softcap)
    return found, wanted.to(states.device), rows, columns
