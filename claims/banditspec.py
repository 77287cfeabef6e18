"""Claim checks of BanditSpec (arXiv:2505.15141): simulated arms, and draft lengths of the embedded models."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from hf_ext.claims import held_out, speculation
from hf_ext.claims.drafts_from_text import GREEDY, PROMPTS, TOKENS
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.generation import BanditSpec, PromptLookup, Speculative, SpeculativeDecoding
from hf_ext.generation.banditspec import EXP3, UCB, Bandit
from hf_ext.verify import Claim, Measurement, Threshold

#: Simulated arms pay 1 with these probabilities.
MEANS, EARLY, LATE, RUNS = (0.3, 0.7, 0.5, 0.2), 1_000, 10_000, 20


def simulate(make: Callable[[int, int], Bandit], seed: int) -> tuple[float, float, float]:
    """Return the regret after `EARLY` and after `LATE` rounds, and the best arm's share of the rounds."""
    bandit, rng, regret, early = make(len(MEANS), seed), random.Random(10_000 + seed), 0.0, 0.0
    for turn in range(LATE):
        arm = bandit.choose()
        bandit.learn(arm, float(rng.random() < MEANS[arm]))
        regret += max(MEANS) - MEANS[arm]
        early = regret if turn + 1 == EARLY else early
    return early, regret, bandit.pulls[MEANS.index(max(MEANS))] / LATE


def growth(make: Callable[[int, int], Bandit]) -> Measurement:
    """Fit the power of the rounds with which regret grows, over simulated runs."""
    runs = [simulate(make, seed) for seed in range(RUNS)]
    powers = [math.log(late / early) / math.log(LATE / EARLY) for early, late, _ in runs]
    details = {
        f"regret after {EARLY:,} rounds": mean([run[0] for run in runs]),
        f"after {LATE:,}": mean([run[1] for run in runs]),
        "rounds that took the best arm": mean([run[2] for run in runs]),
    }
    return Measurement(
        mean(powers),
        spread=bootstrap(powers),
        spread_of=f"95 % bootstrap interval over {RUNS} runs",
        seeds=tuple(range(RUNS)),
        details=details,
    )


def best_share() -> Measurement:
    """Measure how often UCBSpec takes the best simulated arm."""
    shares = [simulate(lambda arms, seed: UCB(arms), seed)[2] for seed in range(RUNS)]
    return Measurement(
        mean(shares),
        spread=bootstrap(shares),
        spread_of=f"95 % bootstrap interval over {RUNS} runs",
        seeds=tuple(range(RUNS)),
    )


def arms() -> tuple[Speculative, ...]:
    """Return the arms that a draft model brings by default."""
    draft, _ = held_out.load("draft")
    return (*(SpeculativeDecoding(draft, length) for length in (1, 2, 4, 8)), PromptLookup())


def costs(strategy: Speculative) -> list[float]:
    """Return what each prompt's text cost, in target calls; a draft call costs by the draft's share of parameters."""
    price = held_out.load("draft")[0].num_parameters() / held_out.load()[0].num_parameters()
    model, _ = held_out.load()
    found = []
    for prompt in held_out.prompts(PROMPTS):
        lengths: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        strategy.generate(model, **held_out.batch([prompt]), **lengths, **GREEDY)
        report = strategy.report
        assert report is not None  # set by the call above
        found.append(report.details["steps"] + price * report.draft_calls)
    return found


def close_to_the_best() -> Measurement:
    """Compare the cost of all texts with that under each arm alone; what is learned is kept from prompt to prompt."""
    alone = [costs(arm) for arm in arms()]
    bandit = BanditSpec(arms=arms(), keep=True)
    ours = costs(bandit)
    assert bandit.report is not None  # set by the runs above
    labels, pulls = bandit.report.details["arms"], bandit.report.details["pulls"]
    best = min(alone, key=sum)
    rng = random.Random(0)
    drawn = [rng.choices(range(PROMPTS), k=PROMPTS) for _ in range(2000)]
    ratios = sorted(sum(best[i] for i in places) / sum(ours[i] for i in places) for places in drawn)
    each = f"tokens for the cost of a target call, {PROMPTS * (TOKENS - 1):,} in all"
    details: dict[str, float | str] = {each: PROMPTS * (TOKENS - 1) / sum(ours)}
    details |= {f"{name} alone": PROMPTS * (TOKENS - 1) / sum(cost) for name, cost in zip(labels, alone, strict=True)}
    details |= {f"rounds of {name}": count for name, count in zip(labels, pulls, strict=True)}
    return Measurement(
        sum(best) / sum(ours),
        spread=(ratios[50], ratios[-51]),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details=details,
    )


CLAIMS = (
    speculation.identity_claim(lambda: BanditSpec(draft_model=held_out.load("draft")[0])),
    Claim(
        name="regret-ucb",
        paper="The regret of UCBSpec is logarithmic (theorem for stochastic rewards).",
        measures=f"power of the rounds with which regret grows from {EARLY:,} to {LATE:,} rounds, four simulated arms",
        threshold=Threshold("<", 0.5),
        check=lambda: growth(lambda arms, seed: UCB(arms)),
        seconds=10,
    ),
    Claim(
        name="regret-exp3",
        paper="The regret of EXP3Spec grows as the root of the rounds (theorem for adversarial rewards).",
        measures=f"power of the rounds with which regret grows from {EARLY:,} to {LATE:,} rounds, four simulated arms",
        threshold=Threshold("<", 0.8),
        check=lambda: growth(EXP3),
        seconds=20,
    ),
    Claim(
        name="best-arm",
        paper="The best arm is found.",
        measures=f"share of {LATE:,} rounds in which UCBSpec takes the best of four simulated arms",
        threshold=Threshold(">", 0.9),
        check=best_share,
        seconds=10,
    ),
    Claim(
        name="close-to-the-best",
        paper="Throughput is close to that of the best arm, which is not known beforehand.",
        measures="cost of all texts under the arm that is best alone, over that under UCBSpec, greedy",
        threshold=Threshold(">=", 0.85),
        check=close_to_the_best,
        seconds=80,
        data=DATA,
    ),
)
