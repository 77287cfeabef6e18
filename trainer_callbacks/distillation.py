"""A weighted sum of the two parts of a distillation's divergence, in one pass over the logits."""

# Functions of autograd have no types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from hf_ext.kernels.linear_statistics import statistics_dtype

#: Logits of that many numbers are worked on at a time.
PIECE = 2**21


def odds_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log of target against all others, `(tokens,)`; its sigmoid is the target's probability.

    Args:
        logits: `(tokens, vocabulary)`.
        targets: `(tokens,)` int64.

    Example:
        >>> odds_of(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([0])).exp()
        tensor([0.5000])
    """
    pieces = [torch.empty(0, dtype=statistics_dtype(logits.dtype), device=logits.device)]
    for at in _pieces(logits):
        pieces.append(_apart(logits[at].to(pieces[0].dtype, copy=True), targets[at])[0])
    return torch.cat(pieces)


def distillation(
    student: Tensor, teacher: Tensor, targets: Tensor, on_target: Tensor, on_rest: Tensor, on_data: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the parts of a student's divergence from its teacher, each token's with weights of its own.

    What `hf_ext.trainer_callbacks.atkd.divided_divergence` gives, weighed and summed; the gradient is made at
    once, with one matrix of the size of the logits.

    Args:
        student: `(tokens, vocabulary)` logits; the gradient is theirs.
        teacher: likewise.
        targets: `(tokens,)` int64.
        on_target: `(tokens,)`, of the divergence over target and not target.
        on_rest: `(tokens,)`, of the divergence among the other tokens.
        on_data: of the target's negative log-likelihood.

    Returns:
        The sum, differentiable; `(tokens,)` each, not differentiable: the target part and the rest part.

    Example:
        >>> logits, targets = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 7])
        >>> sum_, target, rest = distillation(logits, logits, targets, torch.ones(3), torch.ones(3))
        >>> round(float(sum_), 6), target.shape
        (0.0, torch.Size([3]))
    """
    found: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(  # type: ignore[no-untyped-call]
        student, teacher.detach(), targets, on_target, on_rest, on_data, torch.is_grad_enabled()
    )
    return found


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student, teacher, targets, on_target, on_rest, on_data: float, enabled: bool):
        """Return the sum and both parts; `enabled` says whether gradients are, which cannot be seen from here."""
        needed = enabled and ctx.needs_input_grad[0]
        dtype = statistics_dtype(student.dtype)
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if needed else None
        total, parts = student.new_zeros((), dtype=dtype), student.new_empty(2, len(student), dtype=dtype)
        for at in _pieces(student):
            place = targets[at, None]
            learnt, among_learnt = _apart(student[at].to(dtype, copy=True), targets[at])
            odds, among = _apart(teacher[at].to(dtype, copy=True), targets[at])
            weight = among.exp()
            # A token that teacher and student both exclude has no part in either.
            rest = among.sub_(among_learnt).masked_fill_(weight == 0, 0).mul_(weight).sum(-1)
            chance, uncertainty = odds.sigmoid(), (-odds).sigmoid()
            target = chance * (logsigmoid(odds) - logsigmoid(learnt))
            target += uncertainty * (logsigmoid(-odds) - logsigmoid(-learnt))
            parts[0, at], parts[1, at] = target, rest
            of_target, of_rest = on_target[at].to(dtype), on_rest[at].to(dtype)
            total += (of_target * target + of_rest * rest - on_data * logsigmoid(learnt)).sum()
            if gradient is None:
                continue
            slope = of_target * (learnt.sigmoid() - chance) - on_data * (-learnt).sigmoid()  # of the student's odds
            each = among_learnt.exp_().mul_((of_rest - slope)[:, None]).sub_(weight.mul_(of_rest[:, None]))
            gradient[at] = each.scatter_(1, place, slope[:, None]).to(gradient.dtype)
        ctx.gradient = gradient
        target, rest = parts
        ctx.mark_non_differentiable(target, rest)
        return total, target, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given, *_: Any):
        """Return the gradient of the student's logits."""
        if ctx.gradient is None:
            raise RuntimeError(
                "the gradient of distillation was made in its forward pass and is gone after one backward pass: "
                "compute the loss again"
            )
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(given), *(None,) * 6


def _pieces(logits: Tensor) -> list[slice]:
    rows = max(PIECE // max(logits.shape[-1], 1), 1)
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _apart(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's odds, and in place of the logits the log of the distribution over the other tokens."""
    place = targets[:, None]
    at_target = logits.gather(1, place)[:, 0]
    logits.scatter_(1, place, -torch.inf)
    others = logits.logsumexp(-1)
    return at_target - others, logits.sub_(others[:, None])
