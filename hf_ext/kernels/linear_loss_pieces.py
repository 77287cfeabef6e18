"""The logits of some tokens, or of some of the vocabulary, in plain torch: statistics of them and their gradient.

Everything happens in one matrix, in place, where that is possible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_ext.kernels.linear_statistics import TokenStatistics, statistics_dtype

#: Logits that are there at a time: enough rows for a quick product, few enough to stay near the processor; on other
#: devices, few beside what else they hold.
LOGITS = {"cpu": 2**23}
LOGITS_ELSEWHERE = 2**25
#: The same for logits that are there already, of which no product is made.
LOGITS_THERE = {"cpu": 2**20}
#: A product of fewer rows is slow, whatever the vocabulary.
LEAST = 64

#: Whether entropy, expectation and the likeliest token are wanted.
Wanted = tuple[bool, bool, bool]


def rows_at_a_time(vocabulary: int, device: str = "cpu", *, there: bool = False) -> int:
    """Return how many tokens have their logits at a time on a type of device.

    Args:
        vocabulary: of the model.
        device: its type.
        there: whether the logits are there already.

    Example:
        >>> rows_at_a_time(32_000), rows_at_a_time(256_000), rows_at_a_time(32_000, "cuda")
        (262, 64, 1048)
    """
    return max(LEAST, (LOGITS_THERE if there else LOGITS).get(device, LOGITS_ELSEWHERE) // vocabulary)


@dataclass(frozen=True)
class Given:
    """Gradients of a loss for the statistics of `TokenStatistics`, None for 0."""

    nll: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    expectation: torch.Tensor | None = None
    best_nll: torch.Tensor | None = None
    apart: torch.Tensor | None = None
    lse: torch.Tensor | None = None


@dataclass(frozen=True)
class Head:
    """How logits are made, beside the tensors.

    Args:
        scale: factor of the products.
        softcap: bound of the logits.
        chunk: tokens at a time.
    """

    scale: float
    softcap: float | None
    chunk: int

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, room: torch.Tensor
    ) -> torch.Tensor:
        """Return `(tokens, vocabulary)` logits in the dtype of statistics, in `room` if that has their dtype."""
        out = room[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        logits = out.to(statistics_dtype(out.dtype))
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def room(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return memory for the logits of a piece."""
        return hidden.new_empty(max(min(self.chunk, len(hidden)), 1) * len(weight))


class Piece:
    """Statistics of the logits of some tokens, and what the gradient of these logits needs.

    The logits become logarithms of probabilities, and these probabilities, all in one place where that is possible.
    """

    def __init__(
        self, logits: torch.Tensor, targets: torch.Tensor, table: torch.Tensor | None, queries: torch.Tensor | None,
        wanted: Wanted, for_gradient: bool, apart: int | None = None,
    ) -> None:  # fmt: skip
        entropy, expectation, best = wanted
        self.targets = targets[:, None]
        self.similarity: torch.Tensor | None = None
        found: dict[str, torch.Tensor] = {}
        self.apart = apart
        if apart is not None:
            found["apart"] = logits[:, apart].clone()
            logits[:, apart] = -torch.inf
            top, at = logits.max(-1)
        at_target = logits.gather(-1, self.targets)
        log_q = torch.log_softmax(logits, -1, out=logits)
        found["nll"] = -log_q.gather(-1, self.targets)[:, 0]
        self.lse = found["nll"] + at_target[:, 0]
        if apart is not None:  # which may be the target, and has no probability among the others
            found["lse"] = self.lse = top - log_q.gather(-1, at[:, None])[:, 0]
        if best:
            found["best"] = log_q.argmax(-1)
            found["best_nll"] = -log_q.gather(-1, found["best"][:, None])[:, 0]
        if not (entropy or expectation or for_gradient):
            self.statistics = TokenStatistics(**found)
            return
        self.q = log_q.exp() if entropy else log_q.exp_()
        self.log_q = log_q
        if entropy:
            log_q.clamp_(min=torch.finfo(log_q.dtype).min)  # 0 log 0 is 0
            found["entropy"] = -row_products(self.q, log_q)
        if table is not None:
            # The gradient needs all similarities, and the product for them gives the expectation, too.
            near = similarities(table[targets] if queries is None else queries, table, self.q.dtype)
            found["expectation"] = row_products(self.q, near)
            self.similarity = near if for_gradient else None
        self.statistics = TokenStatistics(**found)

    def gradient(self, given: Given) -> torch.Tensor:
        """Return the gradient of the logits, in place of the probabilities."""
        return gradient_of_logits(
            self.q, self.log_q, self.similarity, self.targets, self.statistics, given, None, self.apart
        )


def gradient_of_logits(
    q: torch.Tensor, log_q: torch.Tensor, similarity: torch.Tensor | None, targets: torch.Tensor,
    found: TokenStatistics, given: Given, inside: torch.Tensor | None, apart: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of logits through all statistics, in place of `q`; the other matrices are used up, too.

    With `q` the probabilities, `y` the target, `b` the likeliest token, `s` the similarities, and `n`, `h`, `e`, `m`
    what is given for nll, entropy, expectation and best_nll:
    `q (n + m - h (log q + entropy) + e (s - expectation)) - n [v = y] - m [v = b]`.

    Args:
        q: (tokens, part of the vocabulary).
        log_q: the same shape, for the entropy; without that, it may be `q`.
        similarity: the same shape, for the expectation.
        targets: (tokens, 1), counted from the part's first token.
        found: the statistics; `best` counted like the targets, nll not looked at.
        given: gradients of the statistics.
        inside: (tokens, 2) which targets and likeliest tokens are in the part; None for all.
        apart: a token that the distribution leaves out.
    """
    factor = None
    if given.entropy is not None and found.entropy is not None:
        # A token of probability 0 has a logarithm that is all but infinite.
        low = torch.finfo(q.dtype).min / 4
        factor = log_q.clamp_(min=low).add_(found.entropy[:, None]).mul_(q)
        factor.mul_(-given.entropy[:, None])
    if given.expectation is not None and similarity is not None and found.expectation is not None:
        near = similarity.sub_(found.expectation[:, None]).mul_(q).mul_(given.expectation[:, None])
        factor = near if factor is None else factor.add_(near)
    rows = None
    for values in (given.nll, given.best_nll, given.lse):
        if values is not None:
            rows = values if rows is None else rows + values
    if rows is not None:
        q.mul_(rows[:, None])
        if factor is not None:
            q.add_(factor)
    elif factor is not None:
        q = factor
    else:
        q.zero_()
    for number, (places, values) in enumerate(((targets, given.nll), (found.best, given.best_nll))):
        if values is None or places is None:
            continue
        if inside is not None:
            values = values.where(inside[:, number], 0)
            places = places.reshape(-1).clamp(0, q.shape[1] - 1)
        q.scatter_add_(1, places.reshape(-1, 1), -values[:, None].to(q.dtype))
    if apart is not None:
        q[:, apart] = 0 if given.apart is None else given.apart
    return q


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the inner products of the rows of two matrices, without a matrix of products."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def slope_of(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return the derivative of the soft cap where it gave these logits."""
    return logits.div(softcap).square_().neg_().add_(1)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add `a @ b` in place, in the dtype of the total."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(a @ b)


def similarities(queries: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the products of all queries with all rows of a table."""
    return (queries.to(table.dtype) @ table.t()).to(dtype)
