"""Claim checks of SPT (arXiv:2403.00758) on made-up facts whose reversal is never told.

A fact is "A parent B": two names of two tokens each, and how A stands to B. Of some pairs both
"A parent B" and "B child A" are told, so that a model can learn what the two words have to do with
each other; of the others only one of the two. Asked is, of those, the other one: "B child" for
facts told as "A parent B", and "A parent" for facts told as "B child A". No row of the training data
holds such a question, nor does SPT make one of it: reordered, "A parent B" is "B parent A".
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_ext.claims import small_training
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.segmenters import FixedLength
from hf_ext.trainer_callbacks.spt import SPT
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Made-up facts, half of them told in one direction only"
SEEDS = (0, 1, 2)
PAIRS, BOTH = 80, 40
STEPS, ROWS = 400, 48
BOS, EOS, PARENT, CHILD = 0, 1, 2, 3
FIRST_NAME, FIRST_NAMES, LAST_NAMES = 4, 14, 14
VOCABULARY = FIRST_NAME + FIRST_NAMES + LAST_NAMES

Name = tuple[int, int]


def facts(seed: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return the told rows, and as rows the told and the reversed form of those told in one direction only.

    A row is bos, a name, "parent" or "child", a name, eos.
    """
    draw = random.Random(seed)
    names = [(FIRST_NAME + i, FIRST_NAME + FIRST_NAMES + j) for i in range(FIRST_NAMES) for j in range(LAST_NAMES)]
    drawn = draw.sample(names, 2 * PAIRS)
    told, forward, backward = [], [], []
    for number, (a, b) in enumerate(zip(drawn[::2], drawn[1::2], strict=True)):
        ways = [[BOS, *a, PARENT, *b, EOS], [BOS, *b, CHILD, *a, EOS]]
        draw.shuffle(ways)
        if number < BOTH:
            told += ways
        else:
            told.append(ways[0])
            forward.append(ways[0])
            backward.append(ways[1])
    return told, forward, backward


def units_of_a_fact(tokens: Sequence[int]) -> list[int]:
    """Return where the names and the word between them begin: what an assistant model would call phrases."""
    return [0, *(place + more for place, token in enumerate(tokens) if token in (PARENT, CHILD) for more in (0, 1))]


def train(objective: Objective | None, seed: int, steps: int = STEPS) -> PreTrainedModel:
    """Train a small model on the told facts with a stock Trainer; None is next-token prediction."""
    told, _, _ = facts(seed)
    model = small_training.small_model(seed, VOCABULARY, context=16, bos_token_id=BOS, eos_token_id=EOS)
    return small_training.train(
        model, objective, told, steps=steps, batch=ROWS, rate=3e-3, seed=seed, weight_decay=0.01
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> float:
    """Return the share of rows whose second name the model writes, greedily, after the first name and the word."""
    asked = torch.tensor(list(rows))
    written = asked[:, :4]
    for _ in range(2):
        written = torch.cat((written, model(written).logits[:, -1:].argmax(-1)), 1)
    return float((written[:, 4:] == asked[:, 4:6]).all(-1).float().mean())


def by_units() -> SPT:
    """Return SPT with names as units."""
    return SPT(segmenter=units_of_a_fact)


def by_tokens() -> SPT:
    """Return SPT that tears names apart."""
    return SPT(segmenter=FixedLength(1))


def reversed_facts() -> Measurement:
    """Train with SPT, without, and with single tokens as units, and ask for reversed facts."""
    kinds = {"SPT": by_units, "next-token": lambda: None, "tokens as units": by_tokens}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for name, objective in kinds.items():
        for seed in SEEDS:
            model, (_, forward, backward) = train(objective(), seed), facts(seed)
            found[name].append((accuracy(model, forward), accuracy(model, backward)))
    gains = [spt[1] - plain[1] for spt, plain in zip(found["SPT"], found["next-token"], strict=True)]
    details: dict[str, object] = {}
    for name, pairs in found.items():
        details[f"{name}, as told"] = [round(told, 4) for told, _ in pairs]
        details[f"{name}, reversed"] = [round(reverse, 4) for _, reverse in pairs]
    return Measurement(
        statistics.fmean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={**details, "steps": STEPS, "rows a step": ROWS, "pairs": PAIRS, "told in both directions": BOTH},
    )


CLAIMS = (
    Claim(
        name="reversed-facts",
        paper="Accuracy on reversed questions, about zero with next-token prediction, comes near that on forward ones.",
        measures=f"share of reversed facts answered after {STEPS} steps, less that of next-token prediction",
        threshold=Threshold(">=", 0.5),
        check=reversed_facts,
        unit="share of facts",
        seconds=60,
        data=DATA,
    ),
)
