"""Statistics of the logits and gradients through them, a piece of the logits at a time, in plain torch on any device.

Forward, a piece is some tokens with the whole vocabulary: torch's softmax then works within the processor's cache.
Backward, when the logarithms of the sums are known, a piece is some of the vocabulary with all tokens: each row of the
gradient of the weight is made by one product, in its own dtype, and nothing is added up in memory.
All pieces share one buffer, since fresh memory of that size is mapped anew by the system each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_ext.kernels.linear_loss_pieces import (
    LEAST,
    Given,
    Head,
    Piece,
    Wanted,
    add_product,
    gradient_of_logits,
    similarities,
    slope_of,
)
from hf_ext.kernels.linear_statistics import TokenStatistics, statistics_dtype


def statistics(
    head: Head, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    table: torch.Tensor | None, queries: torch.Tensor | None, wanted: Wanted,
) -> tuple[torch.Tensor, TokenStatistics]:  # fmt: skip
    """Return the logarithms of the sums of the exponentials of the logits, and what is wanted of them.

    Args:
        head: how logits are made.
        hidden: as in `linear_statistics`.
        weight: see there.
        bias: see there.
        targets: see there.
        table: see there.
        queries: see there.
        wanted: which statistics, beside the negative log-likelihood.
    """
    dtype = statistics_dtype(hidden.dtype)
    count = len(hidden)
    entropy, expectation, best = wanted

    def column(dtype: torch.dtype = dtype) -> torch.Tensor:
        return hidden.new_empty(count, dtype=dtype)

    lse = column()
    found = TokenStatistics(
        column(), column() if entropy else None, column() if expectation else None,
        column(torch.int64) if best else None, column() if best else None,
    )  # fmt: skip
    room = head.room(hidden, weight)
    for start in range(0, count, head.chunk):
        at = slice(start, min(start + head.chunk, count))
        logits = head.logits(hidden[at], weight, bias, room)
        asked = None if queries is None else queries[at]
        piece = Piece(logits, targets[at], table, asked, wanted, False)
        lse[at] = piece.lse
        for name, into in vars(found).items():
            if into is not None:
                into[at] = getattr(piece.statistics, name)
    return lse, found


def gradients(
    head: Head, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    table: torch.Tensor | None, queries: torch.Tensor | None, lse: torch.Tensor, found: TokenStatistics,
    given: Given, needed: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Return the gradients of hidden, weight and bias, from those of the statistics.

    Args:
        head: how logits are made.
        hidden: as in `linear_statistics`.
        weight: see there.
        bias: see there.
        targets: see there.
        table: see there.
        queries: see there; the targets' rows if there is a table.
        lse: from `statistics`.
        found: from `statistics`; its nll is not looked at.
        given: gradients of the statistics.
        needed: whether hidden, weight and bias need a gradient.
    """
    room = hidden.new_empty(len(hidden) * part_size(head, len(hidden), len(weight)))

    def of_part(at: slice) -> torch.Tensor:
        part = weight[at]
        logits = head.logits(hidden, part, None if bias is None else bias[at], room)
        slope = None if head.softcap is None else slope_of(logits, head.softcap)
        log_q = logits.sub_(lse[:, None])
        q = log_q.exp_() if given.entropy is None else log_q.exp()
        similarity = None
        if table is not None and queries is not None:
            similarity = similarities(queries, table[at], lse.dtype)
        places = (targets if found.best is None else torch.stack([targets, found.best], 1)).view(len(hidden), -1)
        places = places - at.start
        inside = (places >= 0) & (places < len(part))
        best = None if found.best is None else places[:, 1]
        local = TokenStatistics(found.nll, found.entropy, found.expectation, best, None)
        grad = gradient_of_logits(q, log_q, similarity, places[:, :1], local, given, inside)
        if slope is not None:
            grad.mul_(slope)
        return grad if head.scale == 1 else grad.mul_(head.scale)

    return by_parts(head, hidden, weight, bias, lse.dtype, needed, of_part)


def part_size(head: Head, tokens: int, vocabulary: int) -> int:
    """Return how much of the vocabulary is as many logits as a piece has forward."""
    return min(max(head.chunk * vocabulary // max(tokens, 1), LEAST), vocabulary)


def by_parts(
    head: Head, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
    needed: Any, of_part: Callable[[slice], torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Return the gradients of hidden, weight and bias, from those of the products with parts of the vocabulary.

    Args:
        head: says how large a part is.
        hidden: as in `linear_statistics`.
        weight: see there.
        bias: see there.
        dtype: of the statistics, in which the gradient of hidden is added up.
        needed: whether hidden, weight and bias need a gradient.
        of_part: from a part of the vocabulary to the gradient of its (tokens, part) products.
    """
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needed[0] else None
    # Every row is written, unless there are no tokens.
    grad_weight = None if not needed[1] else torch.empty_like(weight) if len(hidden) else torch.zeros_like(weight)
    grad_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
    vocabulary = len(weight)
    size = part_size(head, len(hidden), vocabulary)
    for start in range(0, vocabulary if len(hidden) else 0, size):
        at = slice(start, min(start + size, vocabulary))
        grad = of_part(at)
        if grad_bias is not None:
            grad_bias[at] = grad.sum(0, dtype=dtype)
        grad = grad.to(hidden.dtype)
        if grad_hidden is not None:
            add_product(grad_hidden, grad, weight[at])
        if grad_weight is not None:
            torch.mm(grad.t(), hidden, out=grad_weight[at])
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
