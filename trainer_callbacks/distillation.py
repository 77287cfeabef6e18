"""A weighted sum of the two parts of a distillation's divergence, in one pass over the logits of both models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_ext.kernels.linear_logits import Logits, sum_of_pieces

#: Logits of that many numbers are worked on at a time, within a piece of the products.
PIECE = 2**21


class Distilled(NamedTuple):
    """What `distillation` finds.

    Args:
        total: the sum, differentiable.
        target: (tokens,) the divergence over target and not target; like the following, not differentiable.
        rest: (tokens,) the divergence among the other tokens.
        uncertainty: (tokens,) the teacher's probability that the token is not the target.
    """

    total: Tensor
    target: Tensor
    rest: Tensor
    uncertainty: Tensor


@torch.no_grad()
def odds_of(logits: Logits, targets: Tensor) -> Tensor:
    """Return the log of target against all others, `(tokens,)`; its sigmoid is the target's probability.

    Args:
        logits: of a head, or there (`hf_ext.kernels.linear_logits`).
        targets: `(tokens,)` int64.

    Example:
        >>> from hf_ext.kernels.linear_logits import GivenLogits
        >>> odds_of(GivenLogits(torch.ones(1, 3), torch.tensor([0])), torch.tensor([0])).exp()
        tensor([0.5000])
    """
    found, read = torch.empty(len(logits), dtype=logits.dtype, device=logits.device), logits.reader()
    with torch.autocast(logits.device.type, enabled=False):
        for at in logits.places():
            piece = read(at)
            for some in _parts(piece):
                found[at][some] = _apart(piece[some], targets[at][some])
    return found


def distillation(
    student: Logits,
    teacher: Logits,
    targets: Tensor,
    on_target: Tensor | float,
    on_rest: Tensor | None,
    on_data: float = 0.0,
) -> Distilled:
    """Sum the parts of a student's divergence from its teacher, each token's with weights of its own.

    What `hf_ext.trainer_callbacks.atkd.divided_divergence` gives, weighed and summed. The gradient is made at once, a
    piece of the logits at a time; of a head, the logits are never all there. With `p` and `q` the distributions of
    teacher and student over the tokens beside the target, `c` and `s` the probabilities of the target, and `t`, `r`
    and `d` the weights of target, rest and data, the gradient of the student's logit is `g = t (s - c) - d (1 - s)` at
    the target and `q_v (r - g) - r p_v` elsewhere.

    Args:
        student: logits (`hf_ext.kernels.linear_logits`), `(tokens, vocabulary)`; the gradient is theirs.
        teacher: likewise.
        targets: `(tokens,)` int64.
        on_target: `(tokens,)` or one for all, of the divergence over target and not target.
        on_rest: `(tokens,)`, of the divergence among the other tokens; None for `on_target` times the teacher's
            uncertainty, which makes of both parts the whole divergence.
        on_data: of the target's negative log-likelihood.

    Example:
        >>> from hf_ext.kernels.linear_logits import GivenLogits
        >>> logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        >>> given, targets = GivenLogits(logits, torch.arange(3)), torch.tensor([0, 4, 7])
        >>> found = distillation(given, given, targets, torch.ones(3), torch.ones(3))
        >>> round(float(found.total), 6), found.target.shape
        (0.0, torch.Size([3]))
    """
    count, dtype, device = len(student), student.dtype, student.device
    parts = torch.empty(3, count, dtype=dtype, device=device)
    on_target = torch.as_tensor(on_target, dtype=dtype, device=device).expand(count)
    read = teacher.reader(student.rows)

    def work(learnt: Tensor, at: slice, needed: bool) -> tuple[Tensor, Tensor | None]:
        taught, total = read(at), learnt.new_zeros(())
        for some in _parts(learnt):
            where = slice(at.start + some.start, at.start + min(some.stop, len(learnt)))
            of_rest = None if on_rest is None else on_rest[where].to(dtype)
            total += _piece(
                learnt[some], taught[some].to(dtype), targets[where], on_target[where], of_rest, on_data,
                parts[:, where], needed,
            )  # fmt: skip
        return total, learnt if needed else None

    total = sum_of_pieces(student, work, "distillation")
    return Distilled(total, *parts)


def _piece(
    learnt: Tensor, taught: Tensor, targets: Tensor, on_target: Tensor, on_rest: Tensor | None, on_data: float,
    parts: Tensor, needed: bool,
) -> Tensor:  # fmt: skip
    """Return the sum of some tokens, write their parts, and in place of the student's logits the gradient."""
    mine, odds = _apart(learnt, targets), _apart(taught, targets)
    weight = taught.exp()
    # A token that teacher and student both exclude has no part in either.
    rest = taught.sub_(learnt).masked_fill_(weight == 0, 0).mul_(weight).sum(-1)
    chance, uncertainty = odds.sigmoid(), (-odds).sigmoid()
    target = chance * (logsigmoid(odds) - logsigmoid(mine)) + uncertainty * (logsigmoid(-odds) - logsigmoid(-mine))
    on_rest = on_target * uncertainty if on_rest is None else on_rest
    torch.stack([target, rest, uncertainty], out=parts)
    if needed:
        slope = on_target * (mine.sigmoid() - chance) - on_data * (-mine).sigmoid()  # of the student's odds
        learnt.exp_().mul_((on_rest - slope)[:, None]).sub_(weight.mul_(on_rest[:, None]))
        learnt.scatter_(1, targets[:, None], slope[:, None])
    return (on_target * target + on_rest * rest - on_data * logsigmoid(mine)).sum()


def _parts(logits: Tensor) -> list[slice]:
    rows = max(PIECE // max(logits.shape[-1], 1), 1)
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _apart(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the target's odds, and leave in place of the logits the log of the distribution over the other tokens."""
    place = targets[:, None]
    at_target = logits.gather(1, place)[:, 0]
    logits.scatter_(1, place, -torch.inf)
    others = logits.logsumexp(-1)
    logits.sub_(others[:, None])
    return at_target - others
