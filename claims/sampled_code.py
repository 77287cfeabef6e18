"""How far text that a model writes is from text that people wrote: held-out code, sampled without truncation.

A model gets the first tokens of windows of files that it never saw and goes on by plain sampling (temperature 1, all
tokens). Its continuations are compared with the true ones as sets: how differently they use pairs of tokens. They are
also shown to the larger embedded model, which says how likely it finds them, and counted for repetition. Sampling at a
lower temperature is beside it: it does part of the same for any model.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ext.claims.held_out import load, mean
from hf_ext.claims.tuned_on_code import DATA, held_out_loss, rows, tuned
from hf_ext.metrics.repetition import ngrams, rep_n
from hf_ext.trainer_callbacks import Objective
from hf_ext.trainer_callbacks.trajectories import sample
from hf_ext.verify import Claim, Measurement, Threshold

#: Windows of held-out files, and how many of their tokens a model is given.
TEXTS, GIVEN, LENGTH = 256, 24, 64
HELD_OUT_ROWS = 64
#: Losses that favour the likely make distributions more peaked; so does this, at no cost.
COOLER = 0.9
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 60, 8, 1e-3
#: What counts as equal likelihood.
NATS = 0.05
PAIRS, LOSS = "divergence of pairs", "held-out loss"


@functools.cache
def windows() -> Tensor:
    """Return the windows, the same for every model."""
    return rows(held_out=True, count=TEXTS, seed=3, length=LENGTH)


@torch.no_grad()
def continuations(model: PreTrainedModel, seed: int, temperature: float = 1.0) -> Tensor:
    """Return a sampled continuation of each window's beginning, of the length of the true one."""
    given = windows()[:, :GIVEN]
    draws = torch.rand(TEXTS, LENGTH - GIVEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    heat = torch.full((TEXTS,), temperature, dtype=torch.float64)
    return sample(model, given, torch.ones_like(given), draws, heat, end=-1)[0]  # no token ends a text


def divergence(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]], order: int) -> float:
    """Return the Jensen-Shannon divergence, in nats, of the n-grams of two sets of texts.

    Example:
        >>> divergence([[1, 2]], [[1, 2]], 2), round(divergence([[1, 2]], [[3, 4]], 2), 4)
        (0.0, 0.6931)
    """
    counts = [Counter(gram for text in texts for gram in ngrams(text, order)) for texts in (left, right)]
    totals = [sum(count.values()) for count in counts]
    found = 0.0
    for gram in counts[0].keys() | counts[1].keys():
        shares = [count[gram] / total for count, total in zip(counts, totals, strict=True)]
        middle = sum(shares) / 2
        found += sum(share * math.log(share / middle) for share in shares if share) / 2
    return found


@torch.no_grad()
def figures(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Return all figures of one model."""
    written, true = continuations(model, seed), windows()[:, GIVEN:]
    ids = torch.cat((windows()[:, :GIVEN], written), 1)
    judge = load("target")[0]
    likely = []
    for part in ids.split(64):
        logp = judge(part).logits[:, GIVEN - 1 : -1].float().log_softmax(-1)
        likely.append(-logp.gather(-1, part[:, GIVEN:, None])[..., 0].mean(1))
    texts = written.tolist()
    cooler = continuations(model, seed, COOLER).tolist()
    return {
        PAIRS: divergence(texts, true.tolist(), 2),
        f"divergence of pairs at temperature {COOLER}": divergence(cooler, true.tolist(), 2),
        "divergence of tokens": divergence(texts, true.tolist(), 1),
        "nats of the larger model": float(torch.cat(likely).mean()),
        "repeated 4-grams": sum(rep_n(text, 4) for text in texts) / len(texts),
        LOSS: held_out_loss(model, HELD_OUT_ROWS),
    }


def both(make: Callable[[], Objective]) -> dict[str, dict[str, list[float]]]:
    """Train the embedded draft model on with an objective and without, once a seed, and return all figures."""
    found: dict[str, dict[str, list[float]]] = {"objective": {}, "next-token": {}}
    for seed in SEEDS:
        for name, objective in (("objective", make()), ("next-token", None)):
            model = tuned(objective, seed, steps=STEPS, batch=BATCH, rate=RATE)
            for figure, value in figures(model, seed).items():
                found[name].setdefault(figure, []).append(value)
    return found


def less(found: dict[str, dict[str, list[float]]], figure: str, by: float = 1.0) -> Measurement:
    """Return by how much a figure is lower with the objective than without (`by=-1`: higher), with all figures."""
    gains = [by * (b - a) for a, b in zip(found["objective"][figure], found["next-token"][figure], strict=True)]
    details: dict[str, Any] = {
        f"{name}, {what}": [round(value, 4) for value in values]
        for name, all_figures in found.items()
        for what, values in all_figures.items()
    }
    details |= {"steps": STEPS, "rows a step": BATCH, "texts": TEXTS, "tokens sampled of each": LENGTH - GIVEN}
    return Measurement(
        mean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details=details,
    )


def zero_strength(objective: Objective) -> Measurement:
    """Return the largest difference between weights trained with an objective of no strength and without one."""
    pairs = zip(*(tuned(one, 0, steps=10).state_dict().values() for one in (objective, None)), strict=True)
    return Measurement(max(float((left - right).abs().max()) for left, right in pairs), seeds=(0,))


def claims(
    name: str,
    make: Callable[[], Objective],
    make_null: Callable[[], Objective],
    *,
    null: tuple[str, str, str],
    likelihood: str,
) -> tuple[Claim, ...]:
    """Return the claims of a loss that is to make what a model samples better.

    Args:
        name: of the method.
        make: the objective.
        make_null: the objective of no strength.
        null: name and texts of the claim that the latter is plain training.
        likelihood: what the paper says of the likelihood.
    """
    trained = functools.cache(lambda: both(make))  # once for all claims
    return (
        Claim(*null, threshold=Threshold("==", 0), check=lambda: zero_strength(make_null()), seconds=3, data=DATA),
        Claim(
            name="divergence",
            paper=f"Text sampled from models trained with {name} is closer to people's than with maximum likelihood.",
            measures="Jensen-Shannon divergence between pairs of tokens in sampled and true continuations of held-out "
            f"code, without {name} less with, at equal steps",
            threshold=Threshold(">", 0),
            check=lambda: less(trained(), PAIRS),
            unit="nats",
            seconds=40,
            data=DATA,
        ),
        Claim(
            name="likelihood",
            paper=likelihood,
            measures=f"held-out next-token loss with {name} less without, at equal steps",
            threshold=Threshold("<=", NATS),
            check=lambda: less(trained(), LOSS, by=-1),
            unit="nats per token",
            seconds=40,
            data=DATA,
        ),
    )
