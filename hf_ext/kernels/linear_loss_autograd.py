"""Gradients of statistics, and of sums that are made a piece of the logits at a time, by functions of autograd.

`Statistics` knows what is given for each statistic only when all of them have been used, and computes the logits
again. `SumOfPieces` is told what becomes of them, and makes the gradients while it has the logits: one product less.
"""

# Functions of autograd have no types.
# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_ext.kernels import configs, language, linear_loss_kernels, linear_loss_torch
from hf_ext.kernels.linear_loss_pieces import Given, Head, Wanted
from hf_ext.kernels.linear_statistics import TokenStatistics


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


class SumOfPieces(torch.autograd.Function):
    """A sum over tokens, with gradients that are made while the logits of a piece are there, and given away once."""

    @staticmethod
    def forward(ctx: Any, source, work, name: str, enabled: bool, *tensors):
        """Return the sum; `enabled` says whether gradients are, which cannot be seen from here.

        The tensors are those of the source, which autograd has to see.
        """
        needed = [enabled and need for need in ctx.needs_input_grad[4:]]
        gradients, read = source.gradients(needed), source.reader()
        total = torch.zeros((), dtype=source.dtype, device=source.device)
        with torch.autocast(source.device.type, enabled=False):
            for at in source.places():
                logits = read(at)
                slope = source.slope(logits) if any(needed) else None
                value, gradient = work(logits, at, any(needed))
                total += value
                if gradient is not None:
                    gradients.add(at, gradient if slope is None else gradient.mul_(slope))
        ctx.gradients, ctx.name = gradients.taken(), name
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given):
        """Return the gradients of the tensors."""
        if ctx.gradients is None:
            raise RuntimeError(
                f"the gradients of {ctx.name} were made in its forward pass and are gone after one backward pass: "
                "compute the loss again, or use linear_statistics, which keeps what it needs under retain_graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None,) * 4, *(None if g is None else g.mul_(given) for g in gradients)


def gradient_of_loss(loss: Any, found: TokenStatistics, at: slice, needed: bool):
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
