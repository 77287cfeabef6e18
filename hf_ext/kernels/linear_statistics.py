"""What a loss may want to know of a distribution over the vocabulary: a few numbers for each token.

`statistics_of_logits` is the definition, on logits that are there; `hf_ext.kernels.linear_loss` computes the same from
the hidden states and the head without ever holding the logits of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the distributions `q = softmax(logits)` of some tokens; what was not asked for is None.

    Args:
        nll: (tokens,) `-log q(target)`.
        entropy: (tokens,) `-sum_v q(v) log q(v)`, in nats.
        expectation: (tokens,) `sum_v q(v) <table[v], query>`, the mean similarity of a token drawn from `q` to the
            target.
        best: (tokens,) int64, the likeliest token; the first of several.
        best_nll: (tokens,) `-log max q`.
        apart: (tokens,) the logit of a token that `q` leaves out; all the rest is of the others. Its own nll is
            infinite.
        lse: (tokens,) the logarithm of the sum of the exponentials of the others' logits.
    """

    nll: torch.Tensor
    entropy: torch.Tensor | None = None
    expectation: torch.Tensor | None = None
    best: torch.Tensor | None = None
    best_nll: torch.Tensor | None = None
    apart: torch.Tensor | None = None
    lse: torch.Tensor | None = None


def statistics_of_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    table: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    entropy: bool = False,
    best: bool = False,
) -> TokenStatistics:
    """Return the statistics of logits, in plain torch, with gradients for the logits.

    Args:
        logits: (tokens, vocabulary). Half precision is computed in float32. A logit of minus infinity is a token of
            probability 0.
        targets: (tokens,) int64 in the vocabulary.
        table: (vocabulary, width), for `expectation`. It gets no gradient, nor do the queries.
        queries: (tokens, width); the targets' rows of the table by default.
        entropy: whether to compute it.
        best: whether to compute `best` and `best_nll`.

    Returns:
        Statistics in float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes or dtypes that do not go together.

    Example:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> found = statistics_of_logits(logits, torch.tensor([1]), table=torch.eye(3), entropy=True, best=True)
        >>> (found.nll.item() / torch.tensor(2.0).log().item(), found.expectation.item(), found.best.item())
        (2.0, 0.25, 0)
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be (tokens, vocabulary), got shape {tuple(logits.shape)}")
    tokens, vocabulary = logits.shape
    check_targets(tokens, vocabulary, targets)
    check_table(tokens, vocabulary, table, queries)
    dtype = statistics_dtype(logits.dtype)
    log_q = logits.to(dtype).log_softmax(-1)
    nll = -log_q.gather(-1, targets[:, None])[:, 0]
    found_entropy = expectation = top = top_nll = None
    if entropy or table is not None:
        q = log_q.exp()
    if entropy:
        # 0 log 0 is 0, in the gradient as well.
        found_entropy = -(q * log_q.masked_fill(log_q.isneginf(), 0)).sum(-1)
    if table is not None:
        wanted = table[targets] if queries is None else queries
        expectation = ((q @ table.detach().to(dtype)) * wanted.detach().to(dtype)).sum(-1)
    if best:
        top = log_q.detach().argmax(-1)
        top_nll = -log_q.gather(-1, top[:, None])[:, 0]
    return TokenStatistics(nll, found_entropy, expectation, top, top_nll)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that statistics of inputs of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_targets(tokens: int, vocabulary: int, targets: torch.Tensor) -> None:
    """Raise unless there is a target for each token.

    Raises:
        ValueError: another shape or dtype, or, where looking does not wait for a GPU, a target out of the vocabulary.
    """
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape ({tokens},), got {targets.dtype} of {tuple(targets.shape)}")
    if targets.device.type == "cpu" and tokens:
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets must be tokens from 0 to {vocabulary - 1}, got {low} to {high}: leave out ignored positions "
                "(-100) before"
            )


def check_table(tokens: int, vocabulary: int, table: torch.Tensor | None, queries: torch.Tensor | None) -> None:
    """Raise unless a table has a row for each token of the vocabulary, and queries are rows of the same width.

    Raises:
        ValueError: they do not.
    """
    if table is None:
        if queries is not None:
            raise ValueError("queries are for the expectation over a table: pass the table, too")
        return
    if table.dim() != 2 or len(table) != vocabulary or not table.is_floating_point():
        raise ValueError(
            f"table must have a row of numbers for each of the {vocabulary} tokens of the vocabulary, got "
            f"{table.dtype} of {tuple(table.shape)}"
        )
    if queries is not None and queries.shape != (tokens, table.shape[1]):
        raise ValueError(f"queries must be ({tokens}, {table.shape[1]}), got {tuple(queries.shape)}")
