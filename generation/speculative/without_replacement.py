"""Drawing distinct drafts: Gumbel-top-k at one node, stochastic beam search over a tree.

Adding independent Gumbel noise to log-probabilities and keeping the k largest sums draws k tokens
one after the other without replacement (arXiv:1903.06059). For sequences the same holds without
going through all of them: a node's value is the largest of the sequences under it, so the values
of children are drawn given that their largest is the value of their parent.

The noise is drawn in float64: in float32 it comes in steps of 6e-8, which tells unlikely tokens apart badly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class BeamStep(NamedTuple):
    """The nodes of one level of a stochastic beam search, best first.

    Attributes:
        parents: `(..., k)` int64, index into the level above; -1 where there is no node.
        tokens: `(..., k)` int64; -1 where there is no node.
        log_probs: `(..., k)` log-probability of the sequence down to the node.
        perturbed: `(..., k)` float64, its log-probability with noise, falling; `-inf` where there is no node.
    """

    parents: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    perturbed: torch.Tensor


def gumbel_top_k(scores: torch.Tensor, k: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw k distinct tokens a row, as if one after the other from what is left.

    Source: Kool et al., Stochastic Beams and Where to Find Them (arXiv:1903.06059).

    Args:
        scores: `(..., vocab)` logits or log-probabilities; `-inf` for a token that must not be drawn.
        k: number of tokens.
        generator: source of random numbers, on the device of `scores`.

    Returns:
        `(..., k)` int64 in the order of drawing. Where a row has fewer than `k` tokens above `-inf`,
        it ends in -1: a token without probability is never drawn.

    Raises:
        ValueError: `k` is below 1.

    Example:
        >>> scores = torch.tensor([[0.0, -torch.inf, 100.0]])
        >>> gumbel_top_k(scores, 3, torch.Generator().manual_seed(0))
        tensor([[ 2,  0, -1]])
    """
    _check(k)
    values, tokens = _with_gumbel(scores, generator).topk(min(k, scores.shape[-1]))
    return _pad(tokens.masked_fill(values.isneginf(), -1), k, -1)


def stochastic_beam_step(
    log_probs: torch.Tensor,
    cumulative: torch.Tensor,
    perturbed: torch.Tensor,
    k: int,
    generator: torch.Generator | None = None,
) -> BeamStep:
    """Draw the next level of a beam of distinct sequences.

    With `G` the noisy log-probability of a child, `Z` the largest among its siblings and `T` the
    value of their parent, the child's value given that the largest is `T` is
    `-log(exp(-T) - exp(-Z) + exp(-G))`, computed as `T - max(0, v) - log(1 + exp(-|v|))` with
    `v = T - G + log(1 - exp(G - Z))`. The k largest over all parents make the level. The children of
    one parent, in falling order, are draws without replacement from its conditional distribution, so
    `without_replacement` judges them exactly, however many of them are kept.
    Source: arXiv:1903.06059, stochastic beam search.

    Args:
        log_probs: `(..., parents, vocab)` log-probabilities of the next token under each parent.
        cumulative: `(..., parents)` log-probabilities of the parents' sequences, 0 for a root.
        perturbed: `(..., parents)` their noisy values, 0 for a root; `-inf` for a parent that is not there.
        k: number of nodes to keep.
        generator: source of random numbers, on the device of `log_probs`.

    Returns:
        The new level. Where fewer than `k` children have a probability, it ends in nodes that are not
        there (value `-inf`), which the next step takes as they are.

    Raises:
        ValueError: `k` is below 1.

    Example:
        >>> root = torch.zeros(1)
        >>> table = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).log()
        >>> generator = torch.Generator().manual_seed(0)
        >>> first = stochastic_beam_step(table[:1], root, root, 2, generator)
        >>> second = stochastic_beam_step(table[first.tokens], first.log_probs, first.perturbed, 8, generator)
        >>> int((second.perturbed > -torch.inf).sum()) in (2, 4)
        True
    """
    _check(k)
    vocab = log_probs.shape[-1]
    sequences = cumulative[..., None] + log_probs
    # Only a parent's k best can be among the k best of all, and what follows does not change their order.
    values, tokens = _with_gumbel(sequences, generator).topk(min(k, vocab))
    values = _with_maximum(values, perturbed[..., None])
    siblings = values.shape[-1]
    kept, index = values.flatten(-2).topk(min(k, values.shape[-2] * siblings))
    absent = kept.isneginf()
    step = BeamStep(
        parents=(index // siblings).masked_fill(absent, -1),
        tokens=tokens.flatten(-2).gather(-1, index).masked_fill(absent, -1),
        log_probs=sequences.gather(-1, tokens).flatten(-2).gather(-1, index).masked_fill(absent, -torch.inf),
        perturbed=kept,
    )
    return BeamStep(*(_pad(x, k, -torch.inf if x.is_floating_point() else -1) for x in step))


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"the number of tokens to draw must be at least 1, got {k}")


def _with_gumbel(scores: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Add independent standard Gumbel noise, in float64."""
    noise = torch.empty_like(scores, dtype=torch.float64).uniform_(generator=generator)
    noise.clamp_(min=2.0**-54)  # 0 would make a token impossible
    return noise.log_().neg_().log_().neg_().add_(scores)


def _with_maximum(values: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Turn `(..., n)` Gumbel values, falling, into such ones given that their largest is `(..., 1)` `maximum`."""
    below = values - values[..., :1]
    log_gap = torch.where(below > -math.log(2), (-below.expm1()).log(), (-below.exp()).log1p())
    v = maximum - values + log_gap
    shifted = maximum - v.clamp(min=0) - (-v.abs()).exp().log1p()
    # The formula is undefined where a parent or a child is not there: infinite less infinite.
    return shifted.masked_fill(values.isneginf() | maximum.isneginf(), -torch.inf)


def _pad(x: torch.Tensor, k: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, k - x.shape[-1]), value=value)
