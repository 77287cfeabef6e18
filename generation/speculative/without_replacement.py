"""Drawing distinct drafts: Gumbel-top-k at one node, stochastic beam search over a tree.

Adding independent Gumbel noise to log-probabilities and keeping the k largest sums draws k tokens
one after the other without replacement (arXiv:1903.06059). For sequences the same holds without
going through all of them: a node's value is the largest of the sequences under it, so the values
of children are drawn given that their largest is the value of their parent.

With a value `G` of log-probability `log p`, `exp(-G)` is an exponential time of rate `p`: the k
largest values are the k first arrivals of a race. Beams are drawn as races, in which noise costs half.

The noise is drawn in float64: in float32 it comes in steps of 6e-8, which tells unlikely tokens apart badly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class BeamStep(NamedTuple):
    """The nodes of one level of a stochastic beam search, best first.

    Attributes:
        parents: `(..., k)` int64, index into the level above; -1 where there is no node.
        tokens: `(..., k)` int64; -1 where there is no node.
        log_probs: `(..., k)` float64, log-probability of the sequence down to the node.
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
    law: torch.Tensor,
    cumulative: torch.Tensor,
    perturbed: torch.Tensor,
    k: int,
    generator: torch.Generator | None = None,
) -> BeamStep:
    """Draw the next level of a beam of distinct sequences.

    A child whose noisy log-probability is `G` arrives at the time `exp(-G)`. Given that the largest
    value among siblings is their parent's, all of them are shifted in time: the first arrives with
    the parent, and the others as much later as they came after the first. (This is what
    `-log(exp(-T) - exp(-Z) + exp(-G))` in the paper says, where `T` is the parent's value and `Z` the
    largest among the siblings.) The k first of all parents make the level. The children of
    one parent, in falling order, are draws without replacement from its conditional distribution, so
    `without_replacement` judges them exactly, however many of them are kept.
    Source: arXiv:1903.06059, stochastic beam search.

    Args:
        law: `(..., parents, vocab)` law of the next token under each parent.
        cumulative: `(..., parents)` log-probabilities of the parents' sequences, 0 for a root.
        perturbed: `(..., parents)` their noisy values, 0 for a root; `-inf` for a parent that is not there.
        k: number of nodes to keep.
        generator: source of random numbers, on the device of `law`.

    Returns:
        The new level. Where fewer than `k` children have a probability, it ends in nodes that are not
        there (value `-inf`), which the next step takes as they are.

    Raises:
        ValueError: `k` is below 1.

    Example:
        >>> root = torch.zeros(1)
        >>> table = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> generator = torch.Generator().manual_seed(0)
        >>> first = stochastic_beam_step(table[:1], root, root, 2, generator)
        >>> second = stochastic_beam_step(table[first.tokens], first.log_probs, first.perturbed, 8, generator)
        >>> int((second.perturbed > -torch.inf).sum()) in (2, 4)
        True
    """
    _check(k)
    clocks = _exponential(law, generator).div_(law)
    # Only a parent's k first can be among the k first of all: on its own clock, which runs from 0 and at rate 1.
    local, tokens = clocks.topk(min(k, law.shape[-1]), largest=False)
    siblings = local.shape[-1]
    cumulative, values = cumulative.double(), perturbed.double()
    there = values.isfinite() & local[..., 0].isfinite()
    # Rates and times are taken relative to the likeliest parent, so that none is out of range.
    scale = cumulative.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    scale = scale.masked_fill(scale.isneginf(), 0.0)
    delays = (local - local[..., :1]) / (cumulative - scale).exp()[..., None]
    times = (scale - values).exp()[..., None] + delays
    # What is not there never arrives, although its delay may be infinite less infinite.
    times = times.masked_fill(~(there[..., None] & local.isfinite()), torch.inf).flatten(-2)
    kept, index = times.topk(min(k, times.shape[-1]), largest=False)
    parents, absent = index // siblings, kept.isinf()
    tokens = tokens.flatten(-2).gather(-1, index)
    # What arrives with its parent has the parent's value to the last bit.
    noisy = torch.where(index % siblings == 0, values.gather(-1, parents), scale - kept.log())
    chances = law.flatten(-2).gather(-1, parents * law.shape[-1] + tokens)
    log_probs = cumulative.gather(-1, parents) + chances.double().log()
    return BeamStep(
        parents=_pad(parents.masked_fill(absent, -1), k, -1),
        tokens=_pad(tokens.masked_fill(absent, -1), k, -1),
        log_probs=_pad(log_probs.masked_fill(absent, -torch.inf), k, -torch.inf),
        perturbed=_pad(noisy.masked_fill(absent, -torch.inf), k, -torch.inf),
    )


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"the number of tokens to draw must be at least 1, got {k}")


def _exponential(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw independent exponential times of rate 1, in float64."""
    noise = torch.empty_like(like, dtype=torch.float64).uniform_(generator=generator)
    return noise.clamp_(min=2.0**-54).log_().neg_()  # 0 would make a token impossible


def _with_gumbel(scores: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Add independent standard Gumbel noise, in float64."""
    return _exponential(scores, generator).log_().neg_().add_(scores)


def _pad(x: torch.Tensor, k: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, k - x.shape[-1]), value=value)
