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
from hf_ext.kernels.linear_loss_pieces import Head, rows_at_a_time
from hf_ext.kernels.linear_statistics import TokenStatistics, check_table, check_targets, statistics_of_logits

__all__ = ["TokenStatistics", "linear_loss", "linear_statistics", "loss_of_logits", "statistics_of_logits"]


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
    head, hidden, weight, bias = _head(hidden, weight, targets, bias, scale, softcap, table, queries, chunk)
    wanted = (entropy, table is not None, best)
    nll, found_entropy, expectation, top, top_nll = linear_loss_autograd.Statistics.apply(
        hidden, weight, bias, targets, table, queries, head, wanted
    )  # type: ignore[no-untyped-call]
    return TokenStatistics(nll, found_entropy, expectation, top, top_nll)


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
    head, hidden, weight, bias = _head(hidden, weight, targets, bias, scale, softcap, table, queries, chunk)
    wanted = (entropy, table is not None, best)
    _check_apart(apart, len(weight))
    found: torch.Tensor = linear_loss_autograd.Loss.apply(
        hidden, weight, bias, targets, table, queries, head, wanted, apart, loss, torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return found


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
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be (positions, vocabulary), got {logits.dtype} of {tuple(logits.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, or None, got {chunk}")
    vocabulary = logits.shape[1]
    check_targets(len(places), vocabulary, targets)
    check_table(len(places), vocabulary, table, None)
    _check_apart(apart, vocabulary)
    rows = rows_at_a_time(vocabulary, logits.device.type, there=True) if chunk is None else chunk
    wanted = (entropy, table is not None, best)
    table = None if table is None else table.detach()
    found: torch.Tensor = linear_loss_autograd.LossOfLogits.apply(
        logits, places, targets, table, wanted, apart, rows, loss, torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return found


def _check_apart(apart: int | None, vocabulary: int) -> None:
    if apart is not None and not 0 <= apart < vocabulary:
        raise ValueError(f"apart must be a token from 0 to {vocabulary - 1}, got {apart}")


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, scale: float,
    softcap: float | None, table: torch.Tensor | None, queries: torch.Tensor | None, chunk: int | None,
) -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Check the inputs, and return how the head computes, with its inputs as autocast has them."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (tokens, width) and weight (vocabulary, width), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for none, got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, or None, got {chunk}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if any(t.dtype != hidden.dtype for t in (weight, bias) if t is not None) or not hidden.is_floating_point():
        dtypes = [str(t.dtype) for t in (hidden, weight, bias) if t is not None]
        raise ValueError(f"hidden, weight and bias must have one floating dtype, got {', '.join(dtypes)}")
    check_targets(len(hidden), len(weight), targets)
    check_table(len(hidden), len(weight), table, queries)
    rows = rows_at_a_time(len(weight), hidden.device.type) if chunk is None else chunk
    return Head(float(scale), softcap, rows), hidden, weight, bias
