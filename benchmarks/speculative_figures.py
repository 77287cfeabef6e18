"""From timed runs to figures: ratios with their spread, counts, the predicted speed-up, and why a method is slow."""

from __future__ import annotations

import random
import statistics
from collections.abc import Collection, Sequence
from typing import Any

from hf_ext.benchmarks.speculative_measure import at_width
from hf_ext.benchmarks.speculative_runs import Row, Sample

#: Milliseconds of a forward pass by width, for each draft, and under None for the target.
Curves = dict[str | None, dict[int, float]]


def spread(values: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median of `values`.

    Example:
        >>> spread([2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def figures(
    row: Row,
    plain: Row,
    tokens: int,
    curves: Curves,
    prompts: Collection[int],
    weights: float,
    assisted: Row | None = None,
) -> dict[str, Any]:
    """Return a row of the record.

    Args:
        row: a method's runs.
        plain: those of plain `generate`.
        tokens: new tokens of each run.
        curves: milliseconds of a forward pass by width, of each draft, and under None of the target.
        prompts: which prompts count.
        weights: MiB of the target's weights.
        assisted: runs of transformers' assisted generation with the same draft, if there are any.

    Returns:
        The figures; those of speed are absent unless the row's status is `"ok"`.
    """
    found: dict[str, Any] = {
        "method": row.method.name, "draft": row.draft, "status": row.status, "exact": row.method.exact,
    }  # fmt: skip
    samples = [sample for sample in row.samples if sample.prompt in prompts]
    if row.status != "ok" or not samples:
        return found
    found |= counts(samples, tokens)
    found["speed"], found["speed_spread"] = beside(samples, plain)
    if assisted is not None and assisted is not row and assisted.status == "ok":
        found["over_assisted"], found["over_assisted_spread"] = beside(samples, assisted)
    # The first token is the prompt's.
    found["ms_per_token"] = 1e3 * statistics.median(s.seconds for s in samples) / (tokens - 1)
    if row.memory is not None and plain.memory is not None:
        found["memory_mib"] = row.memory
        found["memory_of_plain_and_draft"] = (weights + row.draft_memory + row.memory) / (
            weights + row.draft_memory + plain.memory
        )
    if row is not plain:
        found |= prediction(found, curves, row.draft)
        if found["speed"] < 1:
            found["why"] = why(found)
    found |= steps(samples)
    return found


def beside(samples: Sequence[Sample], other: Row) -> tuple[float, list[float]]:
    """Return how many times as fast the samples are as another method's in the same rounds, and the interval."""
    theirs = {(s.prompt, s.round): s.seconds for s in other.samples}
    ratios = []
    for prompt in sorted({sample.prompt for sample in samples}):
        mine = [theirs[prompt, s.round] / s.seconds for s in samples if s.prompt == prompt]
        ratios.append(statistics.median(mine))
    return statistics.median(ratios), list(spread(ratios))


def counts(samples: Sequence[Sample], tokens: int) -> dict[str, float]:
    """Return what was counted by hooks, by token and by call of the target; the prompt's positions left out."""
    calls, produced = sum(s.calls for s in samples), tokens * len(samples)
    return {
        "tokens_per_call": produced / calls,
        "calls_per_token": calls / produced,
        "positions_per_token": sum(s.positions for s in samples) / produced,
        "positions_per_call": sum(s.positions for s in samples) / calls,
        "draft_calls_per_token": sum(s.draft_calls for s in samples) / produced,
        "draft_calls_per_call": sum(s.draft_calls for s in samples) / calls,
        "target_drafting_per_call": sum(s.partial_work for s in samples) / calls,
    }


def prediction(found: dict[str, Any], curves: Curves, draft: str | None) -> dict[str, Any]:
    """Return what a step should cost by the models' calls alone, in plain calls of the target, and what it cost.

    A step is one call of the target with the drafting before it. `verify` is t(k) / t(1) at the mean
    number of positions, `draft` the calls of the draft model and the layers of the target that drafted;
    `rest` is what the models' calls do not explain: Python, sorting, copying, and the reading of the prompt
    by the draft.
    """
    plain_call = curves[None][1]
    verify = at_width(curves[None], found["positions_per_call"]) / plain_call
    drafting = found["target_drafting_per_call"]
    if draft is not None:
        drafting += found["draft_calls_per_call"] * curves[draft][1] / plain_call
    cost = found["tokens_per_call"] / found["speed"]
    return {
        "predicted_speed": found["tokens_per_call"] / (verify + drafting),
        "step": {"cost": cost, "verify": verify, "draft": drafting, "rest": cost - verify - drafting},
    }


def why(found: dict[str, Any]) -> str:
    """Say what makes a method slower than plain `generate`.

    Example:
        >>> why({"tokens_per_call": 2.0, "step": {"cost": 4.0, "verify": 1.5, "draft": 2.4, "rest": 0.1}})
        'a step gives 2.00 tokens and costs 4.00 plain calls: drafting 60 %, verifying 38 %, the rest 2 %'
    """
    step = found["step"]
    names = {"draft": "drafting", "verify": "verifying", "rest": "the rest"}
    parts = sorted(names, key=lambda name: -step[name])
    shares = ", ".join(f"{names[name]} {100 * step[name] / step['cost']:.0f} %" for name in parts)
    return f"a step gives {found['tokens_per_call']:.2f} tokens and costs {step['cost']:.2f} plain calls: {shares}"


def steps(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the milliseconds a step that our methods report for drafting, verifying and bookkeeping."""
    reports = [sample.report for sample in samples if sample.report is not None]
    names = ("draft", "verify", "bookkeeping")
    number = sum(report["details"].get("steps", 0) for report in reports)
    if not number:
        return {}
    return {
        "ms_per_step": {
            name: 1e3 * sum(report["details"].get(f"{name}_seconds", 0.0) for report in reports) / number
            for name in names
        }
    }
