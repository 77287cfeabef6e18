"""Statistics of next-token distributions straight from hidden states and head, without the logits of all tokens.

With a vocabulary of 32,000, the logits of a batch and their gradients take more memory than everything else in the
loss. `linear_statistics` makes them a piece at a time, forward and again backward. `linear_loss` takes the loss as a
function of the statistics, and so knows the gradient of the logits of a piece while it still has them: nothing is
computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_ext.kernels import linear_loss_autograd
from hf_ext.kernels.linear_logits import GivenLogits, HeadLogits, Logits, sum_of_pieces
from hf_ext.kernels.linear_loss_pieces import Piece
from hf_ext.kernels.linear_statistics import TokenStatistics, check_table, check_targets, statistics_of_logits

__all__ = [
    "GivenLogits",
    "HeadLogits",
    "Logits",
    "TokenStatistics",
    "linear_loss",
    "linear_statistics",
    "loss_of_logits",
    "loss_of_pieces",
    "statistics_of_logits",
]


def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    table: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    entropy: bool = False,
    best: bool = False,
    chunk: int | None = None,
) -> TokenStatistics:
    """Return the statistics of the logits `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Gradients go to `hidden`, `weight` and `bias` through every statistic but `best`; the logits are computed again for
    them. Under autocast, hidden, weight and bias are cast as in a linear layer. The same twice is the same bit for bit.

    Args:
        hidden: (tokens, width).
        weight: (vocabulary, width), of the same dtype.
        targets: (tokens,) int64 in the vocabulary: leave out ignored positions before.
        bias: (vocabulary,).
        scale: factor of the logits.
        softcap: bound of the logits.
        table: (vocabulary, table width), for `expectation`. It gets no gradient, nor do the queries.
        queries: (tokens, table width); the targets' rows of the table by default.
        entropy: whether to compute it.
        best: whether to compute `best` and `best_nll`.
        chunk: tokens whose logits are there at a time; by default what is quick for the vocabulary.

    Returns:
        Statistics in float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not go together.

    Example:
        >>> hidden, weight = torch.eye(2).requires_grad_(), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> found = linear_statistics(hidden, weight, torch.tensor([0, 1]), entropy=True)
        >>> found.nll.detach().exp()
        tensor([2.0000, 1.0498])
        >>> found.entropy.sum().backward()
        >>> hidden.grad[0].abs().max().item()  # the entropy of equal logits is at its greatest
        0.0
    """
    source = HeadLogits(hidden, weight, bias, scale, softcap, chunk)
    return source.statistics(targets, table=table, queries=queries, entropy=entropy, best=best)


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[[TokenStatistics, slice], torch.Tensor],
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    table: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    entropy: bool = False,
    best: bool = False,
    apart: int | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the sum of a loss of statistics, with its gradients made in the forward pass.

    The result is that of `loss(linear_statistics(...), slice(0, tokens))` for a loss that is a sum over tokens, without
    computing the logits again for the gradient. Where no gradient is needed none is made.

    Args:
        hidden: as in `linear_statistics`, and so are the arguments not named here.
        weight: see there.
        targets: see there.
        loss: from the statistics of some tokens and which ones they are, `targets[at]`, to the sum of their losses. It
            is called once for each piece of the tokens. A tensor that it reads beside its arguments gets no gradient.
        bias: see there.
        scale: see there.
        softcap: see there.
        table: see there.
        queries: see there.
        entropy: see there.
        best: see there.
        apart: a token that the distributions leave out, and whose logit is a statistic of its own.
        chunk: see there.

    Returns:
        Scalar, in float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or a loss that is not a scalar.

    Example:
        >>> hidden, weight = torch.eye(2).requires_grad_(), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> focal = lambda found, at: ((1 - (-found.nll).exp()) ** 2 * found.nll).sum()
        >>> total = linear_loss(hidden, weight, torch.tensor([0, 1]), focal)
        >>> total.backward()
        >>> (round(total.item(), 4), hidden.grad.shape)
        (0.1734, torch.Size([2, 2]))
    """
    return loss_of_pieces(
        HeadLogits(hidden, weight, bias, scale, softcap, chunk), targets, loss, table=table, queries=queries,
        entropy=entropy, best=best, apart=apart, name="linear_loss",
    )  # fmt: skip


def loss_of_logits(
    logits: torch.Tensor,
    places: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[[TokenStatistics, slice], torch.Tensor],
    *,
    table: torch.Tensor | None = None,
    entropy: bool = False,
    best: bool = False,
    apart: int | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the sum of a loss of statistics of logits that are there, with their gradient made in one pass over them.

    The result is that of `loss(statistics_of_logits(logits[places], targets, ...), slice(0, tokens))`. Beside the
    gradient, which has the size of the logits, no more than a piece of that size is made.

    Args:
        logits: (positions, vocabulary).
        places: (tokens,) int64, the positions that have a target; each once.
        targets: (tokens,) int64 in the vocabulary.
        loss: see `linear_loss`.
        table: see `linear_statistics`.
        entropy: see there.
        best: see there.
        apart: see `linear_loss`.
        chunk: tokens at a time; by default what is quick for the vocabulary.

    Returns:
        Scalar, in float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or a loss that is not a scalar.

    Example:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> loss_of_logits(logits, torch.tensor([0, 2]), torch.tensor([1, 3]), lambda s, at: s.nll.sum()).backward()
        >>> logits.grad
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500],
                [ 0.0000,  0.0000,  0.0000,  0.0000],
                [ 0.2500,  0.2500,  0.2500, -0.7500]])
    """
    return loss_of_pieces(
        GivenLogits(logits, places, chunk), targets, loss, table=table, entropy=entropy, best=best, apart=apart,
        name="loss_of_logits",
    )  # fmt: skip


def loss_of_pieces(
    source: Logits,
    targets: torch.Tensor,
    loss: Callable[[TokenStatistics, slice], torch.Tensor],
    *,
    table: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    entropy: bool = False,
    best: bool = False,
    apart: int | None = None,
    name: str = "loss_of_pieces",
) -> torch.Tensor:
    """Return what `linear_loss` and `loss_of_logits` do, of logits of either kind.

    Args:
        source: of the logits.
        targets: (tokens,) int64 in the vocabulary.
        loss: see `linear_loss`.
        table: see `linear_statistics`.
        queries: see there.
        entropy: see there.
        best: see there.
        apart: see `linear_loss`.
        name: of what computes the loss, for errors.

    Returns:
        Scalar, in float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or a loss that is not a scalar.
    """
    check_targets(len(source), source.vocabulary, targets)
    check_table(len(source), source.vocabulary, table, queries)
    if apart is not None and not 0 <= apart < source.vocabulary:
        raise ValueError(f"apart must be a token from 0 to {source.vocabulary - 1}, got {apart}")
    wanted = (entropy, table is not None, best)
    table, queries = (None if given is None else given.detach() for given in (table, queries))

    def work(logits: torch.Tensor, at: slice, needed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        asked = None if queries is None else queries[at]
        piece = Piece(logits, targets[at], table, asked, wanted, needed, apart)
        value, given = linear_loss_autograd.gradient_of_loss(loss, piece.statistics, at, needed)
        return value, None if given is None else piece.gradient(given)

    return sum_of_pieces(source, work, name)
