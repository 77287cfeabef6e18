"""BanditSpec: which drafter and which draft length pays best is learned while the text is written."""

from __future__ import annotations

import abc
import dataclasses
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

from hf_ext.generation.aded import ADED
from hf_ext.generation.prompt_lookup import PromptLookup
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.draft_model import ModelDrafter, as_model
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.text_drafter import TextDrafter
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative_decoding import SpeculativeDecoding
from hf_ext.generation.token_recycling import TokenRecycling

REWARDS = ("tokens", "cost", "seconds")


class Bandit(abc.ABC):
    """Chooses one of several arms at a time, and learns what it was worth.

    Rewards are numbers from 0 on, of any scale; the largest so far stands for 1.

    Args:
        arms: number of arms.

    Attributes:
        pulls: how often each arm was chosen.
        totals: sum of the rewards of each.
        scale: the largest reward so far.
    """

    def __init__(self, arms: int) -> None:
        self.pulls = [0] * arms
        self.totals = [0.0] * arms
        self.scale = 0.0

    @abc.abstractmethod
    def choose(self) -> int:
        """Return the arm to take next."""

    def learn(self, arm: int, reward: float) -> None:
        """Take note of an arm's reward."""
        self.pulls[arm] += 1
        self.totals[arm] += reward
        self.scale = max(self.scale, reward)

    def means(self) -> list[float]:
        """Return the mean reward of each arm, 0 for one that was never chosen."""
        return [total / pulls if pulls else 0.0 for total, pulls in zip(self.totals, self.pulls, strict=True)]


class UCB(Bandit):
    """Takes the arm whose reward could be the largest: mean plus a bonus that falls as that arm is tried.

    The bonus of arm `i` after `t` rounds is `exploration * scale * sqrt(log(t) / n_i)`, with `n_i` the
    pulls of this arm. (The released code of the paper divides by the pulls of all arms together, one
    number for all, so that it never tries again what was unlucky in the beginning.)

    Args:
        arms: number of arms.
        exploration: weight of the bonus.

    Example:
        >>> bandit = UCB(2)
        >>> for _ in range(100):
        ...     arm = bandit.choose()
        ...     bandit.learn(arm, (0.25, 0.75)[arm])
        >>> bandit.pulls[1] > 80
        True
    """

    def __init__(self, arms: int, exploration: float = 0.5) -> None:
        super().__init__(arms)
        self.exploration = exploration

    def choose(self) -> int:
        """Return each arm once, and then the one of the largest bound."""
        if 0 in self.pulls:
            return self.pulls.index(0)
        log = math.log(sum(self.pulls))
        bounds = [
            mean + self.exploration * self.scale * math.sqrt(log / pulls)
            for mean, pulls in zip(self.means(), self.pulls, strict=True)
        ]
        return bounds.index(max(bounds))


class EXP3(Bandit):
    """Draws an arm with a probability that grows exponentially with its estimated reward.

    What an arm failed to bring is divided by the probability it was drawn with, so that arms that are
    seldom drawn count in full; no assumption is made on how rewards come about. After `t` rounds
    the rate is `sqrt(log(K) / (t K))` for `K` arms.

    Args:
        arms: number of arms.
        seed: of the draws, which are independent of those of tokens.

    Example:
        >>> bandit = EXP3(2)
        >>> for _ in range(400):
        ...     arm = bandit.choose()
        ...     bandit.learn(arm, (0.25, 0.75)[arm])
        >>> bandit.pulls[1] > 300
        True
    """

    def __init__(self, arms: int, seed: int = 0) -> None:
        super().__init__(arms)
        self._losses = [0.0] * arms
        self._rng = random.Random(seed)

    def chances(self) -> list[float]:
        """Return the probability of each arm."""
        arms, rounds = len(self.pulls), sum(self.pulls) + 1
        rate = math.sqrt(math.log(arms) / (rounds * arms))
        least = min(self._losses)
        weights = [math.exp(-rate * (loss - least)) for loss in self._losses]
        return [weight / sum(weights) for weight in weights]

    def choose(self) -> int:
        """Draw an arm."""
        return self._rng.choices(range(len(self.pulls)), self.chances())[0]

    def learn(self, arm: int, reward: float) -> None:
        """Estimate the loss of the arm that was drawn."""
        chance = self.chances()[arm]
        super().learn(arm, reward)
        self._losses[arm] += (1 - (reward / self.scale if reward else 0.0)) / chance


class BanditDrafter(Drafter):
    """Lets one of several drafters draft in each step, and keeps all of them in step with the rows.

    Args:
        arms: strategies whose drafters and rules are used.
        run: the decoding call.
        bandit: what chooses.
        reward: one of `REWARDS`.
    """

    def __init__(self, arms: tuple[Speculative, ...], run: DecodingRun, bandit: Bandit, reward: str) -> None:
        self.bandit, self.reward = bandit, reward
        self.drafters = [arm.drafter(run) for arm in arms]
        self.rules = [type(arm).rule for arm in arms]
        for arm, drafter in zip(arms, self.drafters, strict=True):
            for method in ("reading", "verifying", "first"):
                if getattr(type(drafter), method) is not getattr(Drafter, method):
                    raise ValueError(
                        f"{type(arm).__name__} takes part in the target's own forward passes and cannot be one of "
                        "several arms; use strategies that only draft"
                    )
        self.report = run.report.details
        self.report["arms"] = [_label(arm) for arm in arms]
        self.report["pulls"] = bandit.pulls
        #: What a draft call costs, as a share of a target call.
        self.prices = [0.0] * len(arms)
        for number, drafter in enumerate(self.drafters):
            if isinstance(drafter, (ModelDrafter, TextDrafter)):
                drafter.draft_model = as_model(drafter.draft_model, run.model)  # one for all arms that name it
                self.prices[number] = drafter.draft_model.num_parameters() / run.model.num_parameters()

    def start(self, context: DraftContext) -> None:
        """Start all drafters; those that only follow the rows with the same draft model share what it has read."""
        first: dict[int, ModelDrafter] = {}
        for drafter in self.drafters:
            drafter.start(context)
            if isinstance(drafter, ModelDrafter) and type(drafter).observe is ModelDrafter.observe:
                drafter.draft = first.setdefault(id(drafter.draft_model), drafter).draft

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Forward passes of all draft models."""
        return sum(drafter.calls for drafter in self._distinct())

    @property
    def positions(self) -> int:  # type: ignore[override]
        """Token positions they evaluated."""
        return sum(drafter.positions for drafter in self._distinct())

    def _distinct(self) -> list[Drafter]:
        return list({self._state(drafter): drafter for drafter in self.drafters}.values())

    def propose(self, context: DraftContext) -> DraftTree:
        """Choose an arm and let it draft, for all rows."""
        self.arm = self.bandit.choose()
        self.started, self.before = time.perf_counter(), self.calls
        tree = self.drafters[self.arm].propose(context)
        return dataclasses.replace(tree, rule=tree.rule or self.rules[self.arm])

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Reward the arm and tell all drafters what the text is."""
        if verified.outcomes[0].tokens:
            self.bandit.learn(self.arm, self._worth(verified))
            self.report["mean_reward"] = self.bandit.means()
        for drafter in self._distinct():
            drafter.observe(context, verified)

    def _worth(self, verified: Verified) -> float:
        """Return the tokens a row got, for what they cost."""
        tokens = sum(len(outcome.tokens) for outcome in verified.outcomes) / len(verified.outcomes)
        if self.reward == "seconds":
            return tokens / (time.perf_counter() - self.started)
        if self.reward == "cost":
            return tokens / (1 + self.prices[self.arm] * (self.calls - self.before))
        return tokens

    @staticmethod
    def _state(drafter: Drafter) -> int:
        """Tell drafters apart by what follows the rows."""
        shared = isinstance(drafter, ModelDrafter) and type(drafter).observe is ModelDrafter.observe
        return id(getattr(drafter, "draft", drafter)) if shared else id(drafter)


def _label(arm: Speculative) -> str:
    simple = {name: value for name, value in arm.options().items() if isinstance(value, (int, float, str))}
    return f"{type(arm).__name__}({', '.join(f'{name}={value!r}' for name, value in simple.items())})"


@dataclass
class BanditSpec(Speculative):
    """Speculative decoding that learns, as it writes, which way of drafting pays best.

    Each step one of several arms (drafters, draft lengths) drafts for all rows; what it brings is its
    reward, and a bandit algorithm chooses the next. The text has the target's law whatever is chosen.

    Args:
        draft_model: a draft model; the arms are then chains of 1, 2, 4 and 8 tokens and prompt lookup.
        arms: strategies to choose from instead. Without either they are the drafters that need no
            model: prompt lookup, token recycling and ADED.
        algorithm: `"ucb"` (UCBSpec) or `"exp3"` (EXP3Spec, which assumes nothing about the rewards).
        reward: `"tokens"` of a row; or those tokens for their `"cost"`, in which a draft call costs the
            draft model's share of the target's parameters; or for the `"seconds"` of the step.
        exploration: weight of the bonus for arms that were tried little, of `"ucb"`.
        seed: of the draws of `"exp3"`.
        keep: go on with what was learned in the last call, if that had the same arms.

    Raises:
        ValueError: there are no arms, or arms that follow another law than the target's or take part
            in its forward passes; or an arm cannot draft for the target.

    Source:
        BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms (arXiv:2505.15141), algorithms
        UCBSpec and EXP3Spec, with the confidence bounds that the docstrings of `UCB` and `EXP3` give.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = BanditSpec(draft_model=model)
        >>> ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)).all())
        True
        >>> strategy.report.details["arms"][-2:]
        ['SpeculativeDecoding(draft_tokens=8, confidence=0.0)', 'PromptLookup(draft_tokens=10, max_ngram=3)']
    """

    draft_model: Any = None
    arms: tuple[Speculative, ...] | None = None
    algorithm: str = "ucb"
    reward: str = "cost"
    exploration: float = 0.5
    seed: int = 0
    keep: bool = False
    _kept: Bandit | None = field(default=None, init=False, repr=False, compare=False)
    _names: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        if self.arms is not None:
            self._check_arms(self.arms)
        if self.algorithm not in ("ucb", "exp3"):
            raise ValueError(f"algorithm must be 'ucb' or 'exp3', got {self.algorithm!r}")
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}")
        if isinstance(self.exploration, bool) or not isinstance(self.exploration, (int, float)) or self.exploration < 0:
            raise ValueError(f"exploration must be a number from 0 on, got {self.exploration!r}")

    def _check_arms(self, arms: Any) -> None:
        if self.draft_model is not None:
            raise ValueError("draft_model makes arms of its own; give either it or arms")
        if not isinstance(arms, (tuple, list)) or not arms or not all(isinstance(arm, Speculative) for arm in arms):
            raise ValueError(f"arms must be speculative strategies, one at least, got {arms!r}")
        for arm in arms:
            if type(arm).law is not Speculative.law or arm.drafts_with_target:
                raise ValueError(
                    f"{type(arm).__name__} cannot be an arm: all arms must follow the target's law and leave the "
                    "target itself to the engine"
                )

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the drafters of all arms behind one."""
        arms = tuple(self.arms or self._default_arms())
        names = [_label(arm) for arm in arms]
        if not self.keep or self._kept is None or names != self._names:  # of other arms nothing has been learned
            self._names = names
            self._kept = UCB(len(arms), self.exploration) if self.algorithm == "ucb" else EXP3(len(arms), self.seed)
        return BanditDrafter(arms, run, self._kept, self.reward)

    def _default_arms(self) -> tuple[Speculative, ...]:
        if self.draft_model is None:
            return (PromptLookup(), TokenRecycling(nodes=32), ADED())
        return (*(SpeculativeDecoding(self.draft_model, length) for length in (1, 2, 4, 8)), PromptLookup())
