"""Gradients of statistics, and of losses of statistics, by functions of autograd.

`Statistics` knows what is given for each statistic only when all of them have been used, and computes the logits
again. `Loss` is told how the loss uses them, and makes the gradients while it has the logits: one product less.
"""

# Functions of autograd have no types.
# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_ext.kernels import configs, language, linear_loss_kernels, linear_loss_torch
from hf_ext.kernels.linear_loss_pieces import Given, Head, Piece, Wanted
from hf_ext.kernels.linear_statistics import TokenStatistics, statistics_dtype


def takes_kernel(hidden: torch.Tensor) -> bool:
    """Tell whether statistics of such hidden states are computed by the Triton kernels."""
    if language.triton is None or hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if hidden.device.type == "cuda":
        return configs.has_room(hidden.device.index)
    return hidden.device.type == "cpu" and bool(language.triton.knobs.runtime.interpret)


class Statistics(torch.autograd.Function):
    """Statistics whose gradient computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, table, queries, head: Head, wanted: Wanted):
        """Return nll, entropy, expectation, best and best_nll."""
        if table is not None:
            table = table.detach()
            queries = table[targets] if queries is None else queries.detach()
        way = linear_loss_kernels if takes_kernel(hidden) else linear_loss_torch
        with torch.autocast(hidden.device.type, enabled=False):
            lse, found = way.statistics(head, hidden, weight, bias, targets, table, queries, wanted)
        ctx.head, ctx.way = head, way
        ctx.save_for_backward(
            hidden, weight, bias, targets, table, queries, lse, found.entropy, found.expectation, found.best
        )
        ctx.set_materialize_grads(False)
        if found.best is not None:
            ctx.mark_non_differentiable(found.best)
        return found.nll, found.entropy, found.expectation, found.best, found.best_nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll, entropy, expectation, best, best_nll):
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, bias, targets, table, queries, lse, *found = ctx.saved_tensors
        if all(g is None for g in (nll, entropy, expectation, best_nll)):
            return (None,) * 8
        if expectation is None:
            table = queries = None
        given = Given(nll, entropy, expectation, best_nll)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.way.gradients(
                ctx.head, hidden, weight, bias, targets, table, queries, lse, TokenStatistics(lse, *found), given,
                ctx.needs_input_grad[:3],
            )  # fmt: skip
        return *gradients, None, None, None, None, None


class Loss(torch.autograd.Function):
    """The sum of a loss of statistics, with gradients that are made while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden, weight, bias, targets, table, queries, head: Head, wanted: Wanted, apart, loss, enabled
    ):
        """Return the sum over all tokens; `enabled` says whether gradients are, which cannot be seen from here."""
        needed = [enabled and need for need in ctx.needs_input_grad[:3]]
        dtype = statistics_dtype(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden) if needed[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
        grad_bias = None if bias is None or not needed[2] else bias.new_zeros(bias.shape, dtype=dtype)
        total = hidden.new_zeros((), dtype=dtype)
        room = head.room(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), head.chunk):
                at = slice(start, min(start + head.chunk, len(hidden)))
                some = hidden[at]
                logits = head.logits(some, weight, bias, room)
                asked = None if queries is None else queries[at]
                piece = Piece(logits, targets[at], table, asked, wanted, head.softcap, any(needed), apart)
                value, given = _gradient_of_loss(loss, piece.statistics, at, any(needed))
                total += value
                if given is None:
                    continue
                grad = piece.gradient(given)
                if head.scale != 1:
                    grad.mul_(head.scale)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[at])
                if grad_weight is not None:
                    linear_loss_torch.add_product(grad_weight, grad.t(), some)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given):
        """Return the gradients of hidden, weight and bias."""
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of linear_loss were made in its forward pass and are gone after one backward pass: "
                "compute the loss again, or use linear_statistics, which keeps what it needs under retain_graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(given) for g in gradients), *(None,) * 8


class LossOfLogits(torch.autograd.Function):
    """The sum of a loss of statistics of logits that are there, with the gradient made in one pass over them."""

    @staticmethod
    def forward(
        ctx: Any, logits, places, targets, table, wanted: Wanted, apart, rows: int, loss, enabled
    ):  # fmt: skip
        """Return the sum over the tokens at `places`, `rows` of them at a time."""
        needed = enabled and ctx.needs_input_grad[0]
        dtype = statistics_dtype(logits.dtype)
        grad = torch.zeros_like(logits, memory_format=torch.contiguous_format) if needed else None
        total = logits.new_zeros((), dtype=dtype)
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, len(places), rows):
                at = slice(start, min(start + rows, len(places)))
                some = logits[places[at]].to(dtype)  # a copy, which is used up
                piece = Piece(some, targets[at], table, None, wanted, None, needed, apart)
                value, given = _gradient_of_loss(loss, piece.statistics, at, needed)
                total += value
                if grad is not None and given is not None:
                    grad[places[at]] = piece.gradient(given).to(grad.dtype)
        ctx.gradient = grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given):
        """Return the gradient of the logits."""
        if ctx.gradient is None:
            raise RuntimeError(
                "the gradient of loss_of_logits was made in its forward pass and is gone after one backward pass: "
                "compute the loss again"
            )
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(given), *(None,) * 8


def _gradient_of_loss(loss: Any, found: TokenStatistics, at: slice, needed: bool):
    """Return the loss of some tokens, and its gradients for their statistics, None if there are none."""
    with torch.set_grad_enabled(needed):
        names = [item.name for item in dataclasses.fields(Given) if getattr(found, item.name) is not None]
        leaves = {name: getattr(found, name).detach().requires_grad_(needed) for name in names}
        value = loss(TokenStatistics(**leaves, best=found.best), at)
        if not isinstance(value, torch.Tensor) or value.dim():
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"the loss must return the sum over its tokens, a scalar tensor, got {shape}")
        if not value.requires_grad:
            return value, None
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    given = dict(zip(leaves, gradients, strict=True))
    return value.detach(), Given(**given)
