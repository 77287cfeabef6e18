"""Acceptance rules: which of the drafted tokens is taken at one node of a draft tree, if any.

A rule is a generator function `rule(p, q, drafts)`. `p` is the target's distribution `(vocab,)`, `q`
the one that the drafts were drawn from, `drafts` the tokens in the order in which they were drawn.
It yields for each draft in turn the probability with which that draft is accepted, all before it
having been rejected, and returns the distribution from which the token comes if all are rejected.
Whoever drives it tosses the coins, and stops at the first draft that it accepts: nothing that
matters only after a rejection is computed before. Without drafts the rule returns `p` itself.

Each rule is *exact*: over drafts, coins and the last draw the token has the law `p`, whatever `q` is.

In all of them:
- A token with `p(x) = 0` is never accepted and has no probability afterwards.
- A draft with `q(x) = 0` cannot have been drawn; it is accepted with probability 0.
- If nothing remains after a rejection (`p = q` up to rounding), the rejection had no probability
  either. What is returned then is the `p` of that round, a valid distribution that rounding alone reaches.
- They compute in float32 or wider, on the device of `p`. Where `p` and `q` are float32, the law is `p`
  up to the rounding of float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator

import torch

from hf_ext.generation.speculative.rho import any_of
from hf_ext.generation.speculative.rho import solve_rho as solve_rho

#: What a rule gives: probabilities of acceptance, and at the end the residual distribution.
Decisions = Generator[float, None, torch.Tensor]
#: A rule takes the target's distribution, the drafts' distribution and the drafts.
Rule = Callable[[torch.Tensor, "torch.Tensor | None", list[int]], Decisions]


def single_draft(p: torch.Tensor, q: torch.Tensor | None, drafts: list[int]) -> Decisions:
    """Accept one draft with `min(1, p/q)`, else draw from `norm(max(0, p - q))`.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding
    (arXiv:2211.17192). No rule accepts one draft more often.

    Args:
        p: `(vocab,)` target distribution.
        q: `(vocab,)` distribution that the draft was drawn from.
        drafts: one token, or none.

    Returns:
        A generator: yields the probability of acceptance, returns the residual.

    Raises:
        ValueError: there are several drafts, or `q` is missing or of another shape.

    Example:
        >>> rule = single_draft(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]), [0])
        >>> round(next(rule), 4)
        0.6667
        >>> next(rule)
        Traceback (most recent call last):
        StopIteration: tensor([0., 1.])
    """
    if len(drafts) > 1:
        raise ValueError(
            f"single_draft takes one draft at a node, got {len(drafts)}; use k_seq or with_replacement for "
            "independent drafts, without_replacement for distinct ones"
        )
    return (yield from with_replacement(p, q, drafts))


def with_replacement(p: torch.Tensor, q: torch.Tensor | None, drafts: list[int]) -> Decisions:
    """Try independent drafts one after the other, each against what the one before has left.

    Round `i` accepts with `min(1, p_i/q)`; a rejection gives `p_{i+1} = norm(max(0, p_i - q))`.
    Source: SpecInfer (arXiv:2305.09781), multi-step speculative sampling.

    Args:
        p: `(vocab,)` target distribution.
        q: `(vocab,)` distribution of every draft.
        drafts: tokens drawn independently, repeated ones included, in the order of drawing.

    Returns:
        A generator: yields the probability of acceptance of each draft, returns the residual.

    Raises:
        ValueError: `q` is missing or of another shape.

    Example:
        >>> rule = with_replacement(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]), [0, 1])
        >>> [round(chance, 4) for chance in rule]
        [0.6667, 1.0]
    """
    return (yield from _recursive_rejection(p, q, drafts, remove=False))


def without_replacement(p: torch.Tensor, q: torch.Tensor | None, drafts: list[int]) -> Decisions:
    """Try distinct drafts one after the other, each against what the one before has left.

    As `with_replacement`, but a rejected token also leaves `q`, which is normalised again: draft `i`
    came from `q` without the drafts before it. The number of drafts may depend on the drafts so far
    (a beam that keeps few children of a node), as long as the next one is still drawn like that.
    Source: Recursive Speculative Decoding (arXiv:2402.14160), recursive rejection sampling.

    Args:
        p: `(vocab,)` target distribution.
        q: `(vocab,)` distribution of the first draft.
        drafts: distinct tokens, drawn without replacement, in the order of drawing.

    Returns:
        A generator: yields the probability of acceptance of each draft, returns the residual.

    Raises:
        ValueError: drafts are repeated, or `q` is missing or of another shape.

    Example:
        >>> rule = without_replacement(torch.tensor([0.2, 0.4, 0.4]), torch.tensor([0.6, 0.2, 0.2]), [0, 2])
        >>> [round(chance, 4) for chance in rule]
        [0.3333, 1.0]
    """
    if len(set(drafts)) < len(drafts):
        raise ValueError(
            f"drafts drawn without replacement are distinct, got {drafts}; independent drafts go with k_seq or "
            "with_replacement"
        )
    return (yield from _recursive_rejection(p, q, drafts, remove=True))


def k_seq(p: torch.Tensor, q: torch.Tensor | None, drafts: list[int]) -> Decisions:
    """Accept the first of k independent drafts that passes `min(1, p / (rho q))`.

    With `beta = sum min(q, p/rho)` one of them passes with `a = 1 - (1 - beta)^k`, and the residual
    is `p - min(q, p/rho) a/beta`, normalised; `rho` is the least for which it is nowhere negative
    (`solve_rho`). All k drafts must be given at once, because `rho` depends on their number.
    Source: SpecTr (arXiv:2310.15141), K-SEQ.

    Args:
        p: `(vocab,)` target distribution.
        q: `(vocab,)` distribution of every draft.
        drafts: tokens drawn independently, repeated ones included.

    Returns:
        A generator: yields the probability of acceptance of each draft, returns the residual.

    Raises:
        ValueError: `q` is missing or of another shape.

    Example:
        >>> rule = k_seq(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]), [0, 1])
        >>> [round(chance, 4) for chance in rule]
        [0.4795, 1.0]
    """
    if not drafts:
        return p
    q = _checked(p, q)
    rho = solve_rho(p, q, len(drafts))
    for token in drafts:
        yield _chance(float(p[token]), rho * float(q[token]))
    wide = _wide(p)
    passed = torch.minimum(wide / rho, q)
    beta = float(passed.sum())
    if beta <= 0:
        return p  # nothing in common: all drafts are rejected, and p is still whole
    accepted = any_of(beta, len(drafts))
    return _normalised(torch.sub(wide, passed, alpha=accepted / beta).clamp_(min=0), p)


def deterministic(p: torch.Tensor, q: torch.Tensor | None, drafts: list[int]) -> Decisions:
    """Try drafts that were chosen, not drawn: accept with the probability that the target gives them.

    A rejected token leaves `p`, which is normalised again. The rule is exact for drafts chosen in any
    way that does not look at the coins, so it needs no `q`; where drafts were drawn, rules that know
    `q` accept more. Source: the `q = 1` case of arXiv:2211.17192, for several drafts.

    Args:
        p: `(vocab,)` target distribution.
        q: not used; None.
        drafts: tokens, best first. A repeated one is not accepted again.

    Returns:
        A generator: yields the probability of acceptance of each draft, returns the residual.

    Example:
        >>> rule = deterministic(torch.tensor([0.5, 0.375, 0.125]), None, [0, 1])
        >>> list(rule)
        [0.5, 0.75]
    """
    left, rejected = 1.0, set()
    for token in drafts:
        chance = 0.0 if token in rejected else float(p[token])
        # Rounding may leave less than the tokens that remain have; any of them is certain then.
        yield chance / left if chance < left else float(chance > 0)
        rejected.add(token)
        left -= chance
    if not drafts:
        return p
    rest = _wide(p).clone()
    for token in rejected:
        rest[token] = 0
    return _normalised(rest, p)


def acceptance_rate(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the probability that one draft is accepted: `sum min(p, q)`, averaged over rows.

    Source: arXiv:2211.17192, where the mean of it over contexts is called alpha.

    Args:
        p: `(..., vocab)` target distributions.
        q: `(..., vocab)` draft distributions.

    Example:
        >>> acceptance_rate(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]))
        0.75
    """
    return float(torch.minimum(_wide(p), _checked(p, q)).sum(-1).mean())


def expected_tokens(alpha: float, gamma: int) -> float:
    """Return the mean number of tokens of one target call: `(1 - alpha^(gamma+1)) / (1 - alpha)`.

    Source: arXiv:2211.17192, equation 1, for a chain of `gamma` drafts of which each is accepted with
    probability `alpha`, independently. It is summed as `1 + alpha + ... + alpha^gamma`, which holds at 1, too.

    Args:
        alpha: probability of acceptance of one draft.
        gamma: drafts in the chain.

    Raises:
        ValueError: `alpha` is outside [0, 1] or `gamma` is negative.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1, 4)
        (1.75, 5.0)
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"expected alpha between 0 and 1 and gamma of at least 0, got alpha={alpha}, gamma={gamma}")
    return math.fsum(alpha**i for i in range(gamma + 1))


def multi_draft_acceptance(rule: Rule, p: torch.Tensor, q: torch.Tensor, k: int, replacement: bool) -> float:
    """Return the probability that a rule accepts one of k drafts, by going through all that can be drawn.

    Its cost grows as `vocab ** k`.

    Args:
        rule: an acceptance rule.
        p: `(vocab,)` target distribution.
        q: `(vocab,)` distribution of the drafts.
        k: number of drafts.
        replacement: whether drafts are independent; otherwise they are distinct, and fewer than `k`
            where fewer have a probability.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.75, 0.25]).double()
        >>> round(multi_draft_acceptance(k_seq, p, q, k=2, replacement=True), 4)
        0.8476
        >>> round(multi_draft_acceptance(without_replacement, p, q, k=2, replacement=False), 4)
        1.0
    """
    return math.fsum(
        weight * (1 - math.prod(1 - chance for chance in rule(p, q, drafts)))
        for drafts, weight in _draws(q.tolist(), k, replacement)
    )


def _draws(q: list[float], k: int, replacement: bool) -> Iterator[tuple[list[int], float]]:
    """Go through all sequences of k drafts with their probabilities."""
    if replacement:
        for drafts in itertools.product([x for x, mass in enumerate(q) if mass > 0], repeat=k):
            yield list(drafts), math.prod(q[x] for x in drafts)
        return
    for drafts in itertools.permutations([x for x, mass in enumerate(q) if mass > 0], min(k, sum(m > 0 for m in q))):
        left = [math.fsum(mass for x, mass in enumerate(q) if x not in drafts[:i]) for i in range(len(drafts))]
        yield list(drafts), math.prod(q[x] / mass for x, mass in zip(drafts, left, strict=True))


def _recursive_rejection(p: torch.Tensor, q: torch.Tensor | None, drafts: list[int], remove: bool) -> Decisions:
    """Reject with `p <- norm(max(0, p - q))`, and where `remove` is set take the token out of `q`."""
    if not drafts:
        return p
    q = _checked(p, q)
    for number, token in enumerate(drafts, start=1):
        yield _chance(float(p[token]), float(q[token]))
        p = _normalised((_wide(p) - q).clamp_(min=0), p)
        if remove and number < len(drafts):
            q = q.clone()
            q[token] = 0
            q = _normalised(q, q)  # summed anew: 1 - q(token) would be all rounding where q(token) is near 1
    return p


def _checked(p: torch.Tensor, q: torch.Tensor | None) -> torch.Tensor:
    if q is None:
        raise ValueError("this rule needs q, from which the drafts were drawn; without one, use deterministic")
    if p.shape != q.shape:
        raise ValueError(
            f"target and draft distributions have the shapes {tuple(p.shape)} and {tuple(q.shape)}; bring both to one "
            "vocabulary, with probability 0 for tokens that a model does not have"
        )
    return _wide(q)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32, everything else stays as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _chance(p: float, q: float) -> float:
    """Return `min(1, p/q)`, and 0 where either is 0."""
    if not (p > 0 and q > 0):
        return 0.0
    return 1.0 if p >= q else p / q


def _normalised(rest: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Bring `rest` to the sum 1, or return `otherwise` where nothing is left."""
    total = float(rest.sum())
    # Below the smallest normal number a reciprocal overflows.
    return rest / total if total > torch.finfo(rest.dtype).tiny else otherwise
