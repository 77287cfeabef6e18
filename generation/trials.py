"""Several trials of the next phrase of a row, of which the one of lowest perplexity is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

Answer = TypeVar("Answer", bound=Hashable)


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of `(..., vocabulary)` scores; -inf means impossible.

    Example:
        >>> entropy(torch.zeros(4)), entropy(torch.tensor([0.0, -torch.inf]))
        (tensor(1.3863), tensor(0.))
    """
    return torch.special.entr(scores.softmax(-1)).sum(-1)


def trials_for(nats: float, low: float, high: float, fewest: int, most: int) -> int:
    """Number of trials at a given entropy: `fewest` up to `low`, `most` from `high` on, rounded down between.

    Args:
        nats: entropy of the next token.
        low: entropy up to which the model counts as sure.
        high: entropy from which it counts as clueless.
        fewest: trials where it is sure.
        most: trials where it is clueless.

    Example:
        >>> [trials_for(nats, 0.01, 1.5, 1, 10) for nats in (0.0, 0.5, 1.0, 1.5, 3.0)]
        [1, 3, 6, 10, 10]
    """
    return fewest + int((most - fewest) * min(max((nats - low) / (high - low), 0.0), 1.0))


def majority(answers: Iterable[Answer]) -> Answer:
    """Return the answer given most often, the earliest of equals: the vote of self-consistency.

    Example:
        >>> majority(["41", "42", "42"])
        '42'
    """
    return Counter(answers).most_common(1)[0][0]


@dataclass
class EndedTrial:
    """A trial that has ended.

    Args:
        mean_nll: mean negative log-probability of its tokens, the logarithm of its perplexity.
        number: its number among the trials of the segment.
        tokens: `(n,)` int64.
        finished: whether the row is done with it.
        lane: the lane whose cache holds its tokens but for the last.
        scores: `(n, vocabulary)` processed scores, if kept.
        logits: likewise raw logits.
        idle: masked columns its lane has had since.
    """

    mean_nll: float
    number: int
    tokens: torch.Tensor
    finished: bool
    lane: int
    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    idle: int = 0


class Segment:
    """The trials of one row: those under way, all of the same length, and the best that has ended.

    Args:
        row: the row of the batch.
        lane: the lane that continues it.
        device: of the tokens.

    Attributes:
        planned: trials begun, 0 until `split`.
        drawn: tokens drawn so far in all trials.
        lanes: for every trial under way the lane that holds its tokens (after `split` first the same for all).
        numbers: for every trial under way its number.
        tokens: `(trials, n)` int64.
        nll: `(trials,)` float64, negative log-probability so far.
        best: the ended trial of lowest perplexity; of equals the one of lowest number.
        scores: `(trials, n, vocabulary)` processed scores, if kept.
        logits: likewise raw logits.

    Example:
        >>> segment = Segment(row=0, lane=0, device=torch.device("cpu"))
        >>> segment.split(2)
        >>> segment.append(torch.tensor([3, 4]), torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()[:, [0, 0, 0, 0, 1]])
        >>> segment.end(torch.tensor([True, True]), finished=torch.tensor([False, False]))
        >>> segment.best.tokens, segment.best.number, segment.lanes
        (tensor([3]), 0, [])
    """

    def __init__(self, row: int, lane: int, device: torch.device) -> None:
        self.row, self.planned, self.drawn, self.lanes, self.numbers = row, 0, 0, [lane], [0]
        self.tokens = torch.empty(1, 0, dtype=torch.long, device=device)
        self.nll = torch.zeros(1, dtype=torch.float64, device=device)
        self.best: EndedTrial | None = None
        self.scores: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def split(self, trials: int) -> None:
        """Begin `trials` trials where there is one lane without tokens."""
        self.planned, self.lanes, self.numbers = trials, self.lanes * trials, list(range(trials))
        self.tokens, self.nll = self.tokens.expand(trials, -1), self.nll.expand(trials)

    def append(
        self,
        tokens: torch.Tensor,
        scores: torch.Tensor,
        logits: torch.Tensor | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        """Add a token to every trial under way.

        Args:
            tokens: `(trials,)` int64.
            scores: `(trials, vocabulary)` processed scores they were drawn from.
            logits: likewise raw logits.
            keep_scores: whether to remember the scores.
            keep_logits: whether to remember the logits.
        """
        self.drawn += len(tokens)
        chosen = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        self.nll = self.nll - chosen.double()
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        if keep_scores:
            self.scores = scores[:, None] if self.scores is None else torch.cat([self.scores, scores[:, None]], 1)
        if keep_logits and logits is not None:
            self.logits = logits[:, None] if self.logits is None else torch.cat([self.logits, logits[:, None]], 1)

    def end(self, ended: torch.Tensor, finished: torch.Tensor) -> None:
        """Take trials that have ended out, and remember the best of them and of those before.

        Args:
            ended: `(trials,)` bool.
            finished: `(trials,)` bool, whether the row would be done with the trial.
        """
        means = (self.nll / self.tokens.shape[1]).tolist()
        done = finished.tolist()
        for i in ended.nonzero()[:, 0].tolist():
            if self.best is None or (means[i], self.numbers[i]) < (self.best.mean_nll, self.best.number):
                self.best = EndedTrial(
                    means[i], self.numbers[i], self.tokens[i], done[i], self.lanes[i],
                    None if self.scores is None else self.scores[i],
                    None if self.logits is None else self.logits[i],
                )  # fmt: skip
        index = (~ended).nonzero()[:, 0]
        self.lanes = [self.lanes[i] for i in index.tolist()]
        self.numbers = [self.numbers[i] for i in index.tolist()]
        self.tokens, self.nll = self.tokens[index], self.nll[index]
        self.scores = None if self.scores is None else self.scores[index]
        self.logits = None if self.logits is None else self.logits[index]
