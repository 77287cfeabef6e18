"""Who drops whom: small queries and keys of every token in every layer (arXiv:2305.15805, equations 3 to 6).

    interaction   I_ij = q'_i . k'_j / sqrt(r) + beta
    kept by i     p_ij = sparse sigmoid of I_ij for j < i, and 1 for j = i
    survival      P_ij = p_{j+1,j} ... p_{i-1,j} p_ij        what is dropped once stays dropped

A token `j` whose survival is 0 at `i` is seen by neither `i` nor anything after it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_ext.cache.trained.entmax import sparse_sigmoid

#: Stands for a probability of 0 where its logarithm is taken.
TINY = 1e-30


class Interaction(nn.Module):
    """The trained part of one layer.

    Args:
        width: of the hidden states.
        rank: of the interaction.
        beta: what every interaction begins near; the larger, the less is dropped at first.
    """

    def __init__(self, width: int, rank: int, beta: float) -> None:
        super().__init__()
        # In float32 also where the model is not: small steps would be lost to rounding.
        self.query = nn.Parameter(torch.randn(rank, width) / math.sqrt(width))
        self.key = nn.Parameter(torch.randn(rank, width) / math.sqrt(width))
        self.beta = nn.Parameter(torch.tensor(float(beta)))

    @property
    def rank(self) -> int:
        """Width of the small queries and keys."""
        return len(self.query)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return small queries and keys `(rows, tokens, rank)` of hidden states `(rows, tokens, width)`."""
        with torch.autocast(hidden.device.type, enabled=False):
            exact = hidden.float()
            # Rounded, as a cache keeps them rounded.
            query = nn.functional.linear(exact, self.query.float()).to(hidden.dtype)
            return query, nn.functional.linear(exact, self.key.float()).to(hidden.dtype)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the interactions `(rows, queries, keys)` float32."""
        with torch.autocast(query.device.type, enabled=False):
            scores = query.float() @ key.float().transpose(1, 2)
            return scores / math.sqrt(self.rank) + self.beta.float()


def log_survival(logits: Tensor, alpha: float, real: Tensor | None = None) -> Tensor:
    """Return the logarithm of the survival of every token at every other one.

    Args:
        logits: `(rows, n, n)`, the interactions of all tokens of a text.
        alpha: of the sparse sigmoid.
        real: `(rows, n)` bool, False for padding, which drops nothing.

    Returns:
        `(rows, n, n)`, at least the logarithm of `TINY`; 0 where a token comes later than the one that looks.

    Example:
        >>> log_survival(torch.zeros(1, 3, 3), 2.0).exp()[0]
        tensor([[1.0000, 1.0000, 1.0000],
                [0.5000, 1.0000, 1.0000],
                [0.2500, 0.5000, 1.0000]])
    """
    logs = sparse_sigmoid(logits, alpha).clamp(min=TINY).log()
    return logs.where(_past(logits, real), 0).cumsum(1).clamp(min=math.log(TINY))


def survives(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Return what `log_survival` becomes for an infinite alpha, `(rows, n, n)` bool."""
    return ((logits <= 0) & _past(logits, real)).cumsum(1) == 0


def _past(logits: Tensor, real: Tensor | None) -> Tensor:
    past = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).tril(-1)
    return past if real is None else past & real[:, :, None]


def kept_share(survival: Tensor, visible: Tensor) -> Tensor:
    """Return how much of what came before its tokens a row keeps, on average, `(rows,)`; 1 where nothing came before.

    Args:
        survival: `(rows, n, n)`, from 0 to 1.
        visible: `(rows or 1, n, n)` bool, what the model's own mask lets tokens see; padding does not see itself.
    """
    pairs = _past(survival, visible.diagonal(dim1=1, dim2=2)) & visible
    count = pairs.expand(survival.shape).sum((1, 2))
    return torch.where(count > 0, survival.where(pairs, 0).sum((1, 2)) / count.clamp(min=1), 1.0)
