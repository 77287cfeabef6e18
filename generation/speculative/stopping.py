"""When a chain is long enough: at a token the draft model doubts, or where one more costs more than it brings."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from hf_ext.generation.speculative.context import Outcome

#: What one more position costs in a call of the target, as a share of a call over a single one. Where the weights
#: have to be read for every call it is next to nothing; on the CPUs measured here it is 0.02 to 0.05.
POSITION_COST = 0.03
#: What is known before the first outcome counts as much as this many rejections, and as many calls.
PRIOR = 1.0
#: Tokens that a call gives before any has been counted.
TOKENS_A_CALL = 2.0
#: Chance that a drafted token is accepted, before any has been seen.
ESTIMATE = 0.7


class Stopping(abc.ABC):
    """Says of a chain that is being drafted whether it goes on.

    It is asked before a token is drawn and sees nothing of that token. So the law that a token was drawn from
    stays the draft model's, whatever it decides.
    """

    def reads_on(self) -> bool:
        """Tell whether the draft model shall read the tokens drawn last, to draft below them."""
        return True

    @abc.abstractmethod
    def goes_on(self, place: int, peaks: Sequence[float]) -> list[bool]:
        """Tell for every lane whether it gets a token at `place`; all of them get the first one.

        Args:
            place: tokens drafted so far.
            peaks: for every lane the probability of the draft model's likeliest next token.
        """


class ByConfidence(Stopping):
    """Goes on while the draft model is sure of its next token.

    Args:
        threshold: what its likeliest token's probability must reach, from 0 to 1.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def goes_on(self, place: int, peaks: Sequence[float]) -> list[bool]:
        """Compare with the threshold."""
        return [place == 0 or peak >= self.threshold for peak in peaks]


class ByWorth(Stopping):
    """Goes on while one more token is likely to bring more than it costs.

    A token is of use if it and all above it are accepted. Its chance is taken to be the product of
    `1 - w (1 - peak)` along the chain, where `w` is the share of rejections seen over those that the draft model
    expected of itself: draft models are often too modest about a target that was trained on the same text. A place
    more costs a call of the draft model, if it has not been made yet, and a position in the target's; calls have so
    far given so many tokens for so much. The chain stops where the chances, summed over the lanes, are less than the
    tokens which that cost has given elsewhere. That the best length is a threshold on the chance of a rejection is
    theorem 3.1 of SpecDec++ (arXiv:2405.19715), which trains a head for the chance and searches the threshold.

    Costs are relative to a call of the target over one position, and nothing here looks at a clock: the same seed
    gives the same text.

    Args:
        draft_cost: a call of the draft model.
    """

    def __init__(self, draft_cost: float) -> None:
        self.draft_cost = draft_cost
        self.rejected = self.expected = PRIOR
        self.cost, self.tokens = PRIOR, PRIOR * TOKENS_A_CALL
        self.estimated, self.estimates = PRIOR * ESTIMATE, PRIOR
        self.begin(0)

    def begin(self, lanes: int) -> None:
        """Start chains under the roots of so many lanes."""
        self._passes = 0
        self._chances = [1.0] * lanes
        self._peaks: list[list[float]] = [[] for _ in range(lanes)]

    def _tokens_for(self, cost: float) -> float:
        """Return how many tokens a cost has given so far."""
        return cost * self.tokens / self.cost

    def reads_on(self) -> bool:
        """Compare what a token below is likely to bring with the price of a call and a position for every lane."""
        likely = sum(self._chances) * self.estimated / self.estimates
        return likely >= self._tokens_for(self.draft_cost + POSITION_COST * len(self._chances))

    def goes_on(self, place: int, peaks: Sequence[float]) -> list[bool]:
        """Compare the chances with the price of the positions. Lanes are padded to the longest: they stop together."""
        self._passes += 1
        doubt = self.rejected / self.expected
        estimates = [max(0.0, 1.0 - doubt * (1.0 - peak)) for peak in peaks]
        self.estimated += sum(estimates)
        self.estimates += len(estimates)
        chances = [above * estimate for above, estimate in zip(self._chances, estimates, strict=True)]
        if place and sum(chances) < self._tokens_for(POSITION_COST * len(chances)):
            return [False] * len(peaks)
        self._chances = chances
        for noted, peak in zip(self._peaks, peaks, strict=True):
            noted.append(peak)
        return [True] * len(peaks)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Count rejections among the tokens whose parents were accepted, tokens found, and what they cost.

        Args:
            outcomes: what became of the chains, for every lane.
        """
        for peaks, outcome in zip(self._peaks, outcomes, strict=True):
            accepted = len(outcome.nodes)
            self.expected += sum(1.0 - peak for peak in peaks[: accepted + 1])
            self.rejected += accepted < len(peaks)
            self.tokens += accepted + 1
        positions = len(outcomes) * (1 + max(map(len, self._peaks), default=0))
        self.cost += 1.0 + POSITION_COST * (positions - 1) + self.draft_cost * self._passes
