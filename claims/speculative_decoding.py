"""Claim checks of speculative decoding (arXiv:2211.17192) with the embedded models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from hf_ext.claims import held_out, speculation
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.claims.speculation import PROMPTS, TOKENS, laws, sampled_tokens_per_call, tokens_per_call
from hf_ext.generation import SpeculativeDecoding
from hf_ext.generation.speculative.acceptance import expected_tokens, single_draft
from hf_ext.generation.speculative.stopping import POSITION_COST
from hf_ext.verify import Claim, Measurement, Threshold

GAMMA, SEEDS = 4, (0, 1, 2)
#: Fixed lengths that "auto" is compared with.
LENGTHS = (1, 2, 3, 4, 5, 6, 8)


def ours(draft_tokens: int | Literal["auto"] = GAMMA) -> SpeculativeDecoding:
    """Return the method with the embedded draft model."""
    return SpeculativeDecoding(draft_model=held_out.load("draft")[0], draft_tokens=draft_tokens)


def law_error() -> Measurement:
    """Compute the law of the emitted token in closed form, from both models' real laws."""
    targets, drafts = laws()
    worst, rates = 0.0, []
    for p, q in zip(targets, drafts, strict=True):
        emitted, rejected, residual = torch.zeros_like(p), 0.0, None
        for token in q.nonzero().flatten().tolist():
            decisions = single_draft(p, q, [token])
            accept = next(decisions)
            emitted[token] += q[token] * accept
            rejected += float(q[token]) * (1 - accept)
            if residual is None and accept < 1:
                try:
                    next(decisions)
                except StopIteration as end:
                    residual = end.value
        if residual is not None:
            emitted += rejected * residual
        worst = max(worst, float((emitted - p).abs().max()))
        rates.append(1 - rejected)
    return Measurement(worst, details={"places": len(targets), "mean acceptance rate": mean(rates)})


def formula_ratio() -> Measurement:
    """Compare tokens per call with the formula, the acceptance rate being that of the models' laws."""
    targets, drafts = laws()
    alpha = torch.minimum(targets, drafts).sum(-1)
    predicted = expected_tokens(float(alpha.mean()), GAMMA)
    found = sampled_tokens_per_call(ours(), SEEDS)
    return Measurement(
        mean(found) / predicted,
        spread=tuple(end / predicted for end in bootstrap(found)),  # type: ignore[arg-type]
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=SEEDS,
        details={"alpha": float(alpha.mean()), "predicted tokens per call": predicted, "measured": mean(found)},
    )


def greedy_gain() -> Measurement:
    """Count tokens per target call without chance, and by length of the drafts."""
    found = tokens_per_call(ours())
    by_length = {f"with {gamma} drafted": mean(tokens_per_call(ours(gamma))) for gamma in (1, 2, 8)}
    return Measurement(
        mean(found), spread=bootstrap(found), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={f"with {GAMMA} drafted": mean(found), **by_length},
    )  # fmt: skip


def self_draft() -> Measurement:
    """Let the target draft for itself, under sampling."""
    strategy = SpeculativeDecoding(draft_model=held_out.load()[0], draft_tokens=GAMMA)
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = 8 * (GAMMA + 1)
        strategy.generate(model, **inputs, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new)
    assert strategy.report is not None  # set by the call above
    return Measurement(strategy.report.details["mean_accepted"], seeds=(0,), details={"drafted a step": GAMMA})


def _costs(draft_tokens: int | Literal["auto"], chosen: Sequence[held_out.Prompt]) -> list[float]:
    """Return for every prompt, decoded alone and greedily, the calls of the target a token that its work amounts to."""
    (model, _), strategy, found = held_out.load(), ours(draft_tokens), []
    share = strategy.draft_model.num_parameters() / model.num_parameters()
    for prompt in chosen:
        inputs = held_out.batch([prompt])
        strategy.generate(model, **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        report = strategy.report
        assert report is not None  # set by the call above
        positions = report.target_positions - inputs["input_ids"].shape[1] + 1
        work = report.target_calls + POSITION_COST * (positions - report.target_calls) + share * report.draft_calls
        found.append(work / TOKENS)
    return found


def chosen_lengths() -> Measurement:
    """Compare the work a token with that of the fixed length which is best for all prompts together."""
    chosen = held_out.prompts(PROMPTS)
    fixed = {length: _costs(length, chosen) for length in LENGTHS}
    best = min(fixed, key=lambda length: mean(fixed[length]))
    ratios = [mine / other for mine, other in zip(_costs("auto", chosen), fixed[best], strict=True)]
    return Measurement(
        mean(ratios), spread=bootstrap(ratios), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={"best fixed length": best, **{f"work with {n} drafted": mean(costs) for n, costs in fixed.items()}},
    )  # fmt: skip


CLAIMS = (
    speculation.identity_claim(ours, "With argmax decoding the outputs are identical to the target's."),
    Claim(
        name="law",
        paper="Tokens that are accepted or replaced by the rule have exactly the target's distribution (A.1).",
        measures="largest error of an emitted token's probability, in closed form, by the models' laws at 256 places",
        threshold=Threshold("<=", 1e-12),
        check=law_error,
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="tokens-per-call",
        paper="A call of the target yields (1 - alpha^(gamma+1)) / (1 - alpha) tokens on average (equation 1).",
        measures="tokens per call when sampling at temperature 1, over the formula at the mean acceptance rate",
        threshold=Threshold(">=", 0.9),
        check=formula_ratio,
        seconds=45,
        data=DATA,
    ),
    Claim(
        name="greedy-tokens-per-call",
        paper="Several tokens come out of one call of the target.",
        measures=f"tokens per call of the target, greedy, {GAMMA} tokens drafted",
        threshold=Threshold(">", 1.5),
        check=greedy_gain,
        unit="tokens per call",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="perfect-draft",
        paper="The better the draft model approximates the target, the more is accepted; all of it if they are equal.",
        measures=f"mean accepted tokens when the target drafts {GAMMA} tokens for itself, sampling",
        threshold=Threshold("==", GAMMA),
        check=self_draft,
        unit="tokens per step",
        seconds=20,
        data=DATA,
    ),
    Claim(
        name="chosen-length",
        paper="The best number of drafted tokens follows from the acceptance rate and the cost of drafting (3.5).",
        measures='work a token with draft_tokens="auto" over that with the best fixed length of 1 to 8, greedy: calls '
        f"of the target, {POSITION_COST} of one for every further position, and calls of the draft model by its share "
        "of parameters",
        threshold=Threshold("<=", 1.0),
        check=chosen_lengths,
        seconds=90,
        data=DATA,
    ),
)
