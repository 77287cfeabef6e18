"""Claim checks of BICO (arXiv:2311.07468) on synthetic facts that are learnt in one order and asked for in the other.

A fact joins a name and a description, both tokens of their own: `name is description` or `description is
name`. A third of the facts is told in the first order, a third in the second, and a third in both, so that all
names and descriptions occur in either role and a model can learn that the two orders mean the same. Tested are
the first two thirds: in the order told (forward), and in the other one, never seen (reversed).

A model of two layers is trained from random weights on these facts alone. The settings were chosen with
seeds that are not judged.
"""

from __future__ import annotations

import functools
import statistics

import torch
from transformers import PreTrainedModel

from hf_ext.claims.small_training import small_model, train
from hf_ext.trainer_callbacks.bico import BICO
from hf_ext.verify import Claim, Measurement, Threshold

PAPER = "BICO (arXiv:2311.07468)"
DATA = "Synthetic facts"
SEEDS = (4, 5, 6)
#: An update sees as many sentences as there are: few of them at a time give reversal with some seeds only.
STEPS, ROWS, RATE, DECAY = 400, 160, 3e-3, 0.3
FACTS = 40  # of each kind
BOS, EOS, MASK, IS, FIRST = 1, 2, 3, 4, 5
VOCABULARY = FIRST + 2 * 3 * FACTS


def facts() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return the sentences trained on, and those tested: as they were told, and the other way round.

    Example:
        >>> told, forward, reversed_ = facts()
        >>> len(told), len(forward), told[0], reversed_[0], reversed_[0] in told
        (160, 80, [1, 5, 4, 125, 2], [1, 125, 4, 5, 2], False)
    """
    forward = []
    for fact in range(3 * FACTS):
        name, description = FIRST + fact, FIRST + 3 * FACTS + fact
        sides = (description, name) if FACTS <= fact < 2 * FACTS else (name, description)
        forward.append([BOS, sides[0], IS, sides[1], EOS])
    backward = [[BOS, last, IS, first, EOS] for _, first, _, last, _ in forward]
    return forward + backward[2 * FACTS :], forward[: 2 * FACTS], backward[: 2 * FACTS]


@functools.cache
def accuracies(kind: str, seed: int) -> tuple[float, float]:
    """Train a model and return its accuracy forward and reversed.

    Args:
        kind: `BICO`, `BICO without mirror` or `next-token`.
        seed: of weights, order of the data and masks.
    """
    special = {"pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": EOS}
    model, (told, forward, backward) = small_model(seed, VOCABULARY, **special), facts()
    objective = None if kind == "next-token" else BICO(mask_token=MASK, mirror=kind == "BICO")
    train(
        model, objective, told, steps=STEPS, batch=ROWS, rate=RATE, seed=seed, weight_decay=DECAY,
        lr_scheduler_type="constant_with_warmup",
    )  # fmt: skip
    return right(model, forward), right(model, backward)


@torch.no_grad()
def right(model: PreTrainedModel, sentences: list[list[int]]) -> float:
    """Return the share of sentences whose last word a causal model gives after the words before it."""
    rows = torch.tensor(sentences)
    return float((model.eval()(rows[:, :3]).logits[:, -1].argmax(-1) == rows[:, 3]).float().mean())


def compared(which: int, than: str) -> Measurement:
    """Compare BICO's accuracies with those of another training after equally many steps.

    Args:
        which: 0 forward, 1 reversed.
        than: the other training.
    """
    found = {kind: [accuracies(kind, seed) for seed in SEEDS] for kind in ("BICO", than)}
    gains = [ours[which] - theirs[which] for ours, theirs in zip(found["BICO"], found[than], strict=True)]
    details: dict[str, object] = {}
    for kind, pairs in found.items():
        for name, index in (("forward", 0), ("reversed", 1)):
            details[f"{kind}, {name}"] = [round(pair[index], 4) for pair in pairs]
    return Measurement(
        statistics.fmean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={**details, "steps": STEPS, "rows a step": ROWS, "facts tested": 2 * FACTS, "chance": 1 / (3 * FACTS)},
    )


CLAIMS = (
    Claim(
        name="reversal",
        paper="Fine-tuning with BICO raises Llama's accuracy on reversed facts from 0 % to about 70 %.",
        measures="accuracy on reversed facts that were told in one order only, less that of next-token prediction",
        threshold=Threshold(">=", 0.2),
        check=lambda: compared(1, "next-token"),
        unit="share of facts",
        data=DATA,
        seconds=90,
    ),
    Claim(
        name="forward",
        paper="The accuracy in the order of the training data stays.",
        measures="accuracy on facts in the order in which they were told, less that of next-token prediction",
        threshold=Threshold(">=", -0.02),
        check=lambda: compared(0, "next-token"),
        unit="share of facts",
        data=DATA,
        seconds=90,
    ),
    Claim(
        name="mirror",
        paper="Positions of future tokens have to be adapted to what the model was trained on.",
        measures="accuracy on reversed facts, less that of the same training without mirrored positions",
        threshold=None,
        check=lambda: compared(1, "BICO without mirror"),
        unit="share of facts",
        data=DATA,
        seconds=90,
    ),
)
