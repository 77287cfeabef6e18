"""The per-token statistics that a `statistics_loss` reads, with the vocabulary-sized logits or without."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_ext.trainer_callbacks.objective import Objective
    from hf_ext.trainer_callbacks.plain_head import PlainHead

#: If at least this share of the positions has a target, statistics are computed everywhere and then
#: selected: a copy of the selected logits would cost more.
MOSTLY = 0.5


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
    from hf_ext.kernels.linear_loss import linear_loss, linear_statistics, loss_of_logits

    kept = targets != -100
    (rows, columns), wanted = kept.nonzero().unbind(-1), targets[kept]
    plain, options = objective.is_plain(), _options(objective)
    states, weight = logits, logits
    if head is not None:
        states, weight, bias = head.take()
        options.update(bias=bias, scale=head.scale, softcap=head.softcap)
    wanted = wanted.to(states.device)
    ids = objective.batch.get("input_ids")
    if ids is not None:  # prompt tuning puts virtual tokens before them
        columns = columns - (targets.shape[1] - ids.shape[1])
    if not objective.additive or (plain and head is None):  # plain: by autograd, to the last bit what training does
        if head is None:
            found = _of_logits(logits, targets, kept, wanted, options)
        else:
            found = linear_statistics(states[kept.to(states.device)], weight, wanted, **options)
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

    if head is None:
        places = kept.flatten().nonzero()[:, 0].to(logits.device)
        total = loss_of_logits(logits.flatten(0, 1), places, wanted, piece, apart=apart, **options)
    else:
        given = states[kept.to(states.device)]
        total = linear_loss(given, weight, wanted, piece, apart=apart, **options)
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


def _of_logits(logits: Tensor, targets: Tensor, kept: Tensor, wanted: Tensor, options: Mapping[str, Any]) -> Any:
    """Return the statistics of the logits that predict a target."""
    from hf_ext.kernels.linear_loss import statistics_of_logits

    flat, places = logits.flatten(0, 1), kept.flatten().to(logits.device)
    if len(wanted) < MOSTLY * kept.numel():
        return statistics_of_logits(flat[places], wanted, **options)
    found = statistics_of_logits(flat, targets.flatten().to(logits.device).clamp(min=0), **options)
    values = {item.name: getattr(found, item.name) for item in dataclasses.fields(found)}
    selected: dict[str, Any] = {name: None if value is None else value[places] for name, value in values.items()}
    return dataclasses.replace(found, **selected)
