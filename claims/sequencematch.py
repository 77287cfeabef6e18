"""Claim checks of SequenceMatch (arXiv:2306.05426) on progressions modulo 17.

A text names a step of 1 to 3, then a first number, and goes on by that step; given are the step and the first
number. To see what becomes of an error, a wrong number is forced upon the model once, in the middle of
what it writes. A model without a backspace has to leave it there and goes on from it. Recovered is a
text that ends up right in every number.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from hf_ext.claims import small_training
from hf_ext.generation.backspace_decoding import BackspaceDecoding
from hf_ext.trainer_callbacks.sequencematch import SequenceMatch
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Progressions modulo 17"
SEEDS = (0, 1, 2)
STEPS, ROWS, PROMPTS = 300, 32, 60
BOS, EOS, BACKSPACE, PAD, FIRST_STEP = 0, 1, 2, 3, 4
MODULUS, LENGTH, WIDEST = 17, 8, 3
FIRST_NUMBER = FIRST_STEP + WIDEST + 1
VOCABULARY = FIRST_NUMBER + MODULUS
GIVEN = 3  # bos, the step, the first number


def progressions(count: int, seed: int) -> list[list[int]]:
    """Return rows: bos, a step, a number and those that follow, eos."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, WIDEST + 1, (count, 1), generator=draw)
    firsts = torch.randint(0, MODULUS, (count, 1), generator=draw)
    numbers = (firsts + steps * torch.arange(LENGTH)) % MODULUS
    ends = torch.full((count, 1), EOS)
    rows = torch.cat((torch.full_like(ends, BOS), FIRST_STEP + steps, FIRST_NUMBER + numbers, ends), 1)
    return [list(map(int, row)) for row in rows]


def collate(rows: Sequence[Sequence[int]]) -> Mapping[str, Tensor]:
    """Stack rows of one length; what is given is no target."""
    batch = torch.tensor(list(rows))
    labels = batch.clone()
    labels[:, :GIVEN] = -100
    return {"input_ids": batch, "labels": labels}


def train(objective: SequenceMatch | None, seed: int, steps: int = STEPS) -> PreTrainedModel:
    """Train a small model on fresh rows; None is next-token prediction."""
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    model = small_training.small_model(seed, VOCABULARY, context=32, **special)
    rows = progressions(steps * ROWS, seed + 1000)
    return small_training.train(model, objective, rows, steps=steps, batch=ROWS, rate=3e-3, seed=seed, collator=collate)


class Slip(LogitsProcessor):
    """Force a token upon the model when the text has a certain length, unless it was deleted there before."""

    def __init__(self, length: int, token: int) -> None:
        self.length, self.token = length, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token, as long as it is offered."""
        if input_ids.shape[1] != self.length or not bool(scores[:, self.token].isfinite().all()):
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = scores[:, self.token]
        return forced


@torch.no_grad()
def written(model: PreTrainedModel, *, slips: bool, backspaces: int) -> tuple[float, float]:
    """Return the share of texts that end up right, and backspaces a text.

    Args:
        model: writes greedily.
        slips: force one wrong number upon it, somewhere in the middle.
        backspaces: most that it may use for a text; 0 for a model without.
    """
    draw = torch.Generator().manual_seed(11)
    right = used = 0
    for row in progressions(PROMPTS, seed=7):
        place = int(torch.randint(GIVEN, GIVEN + LENGTH - 2, (), generator=draw))
        other = int(torch.randint(1, MODULUS, (), generator=draw))
        wrong = FIRST_NUMBER + (row[place] - FIRST_NUMBER + other) % MODULUS
        strategy = BackspaceDecoding(backspace=BACKSPACE, max_backspaces=backspaces)
        out = strategy.generate(
            model,
            torch.tensor([row[:GIVEN]]),
            do_sample=False,
            max_new_tokens=len(row) - GIVEN,
            logits_processor=[Slip(place, wrong)] if slips else [],
        )
        right += out[0].tolist() == row
        assert strategy.report is not None
        used += sum(strategy.report.details["backspaces"])
    return right / PROMPTS, used / PROMPTS


def objective() -> SequenceMatch:
    """Return SequenceMatch as it is checked."""
    return SequenceMatch(backspace=BACKSPACE, sample_tokens=LENGTH, slips=0.2, warmup_steps=100)


def recovery() -> Measurement:
    """Compare, after an injected error, SequenceMatch with a backspace and next-token prediction."""
    found, details = [], {}
    for name, build in (("SequenceMatch", objective), ("next-token", lambda: None)):
        shares = []
        for seed in SEEDS:
            model = train(build(), seed)
            most = LENGTH if name == "SequenceMatch" else 0
            shares.append((written(model, slips=True, backspaces=most), written(model, slips=False, backspaces=most)))
        found.append([with_slip[0] for with_slip, _ in shares])
        details[f"{name}, right after an error"] = [round(slip[0], 4) for slip, _ in shares]
        details[f"{name}, right without one"] = [round(clean[0], 4) for _, clean in shares]
        details[f"{name}, backspaces a text with an error"] = [round(slip[1], 4) for slip, _ in shares]
        details[f"{name}, backspaces a text without"] = [round(clean[1], 4) for _, clean in shares]
    gains = [ours - plain for ours, plain in zip(*found, strict=True)]
    return Measurement(
        statistics.fmean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={**details, "steps": STEPS, "rows a step": ROWS, "texts": PROMPTS},
    )


CLAIMS = (
    Claim(
        name="recovery",
        paper="The backspace lets the model take back a token that led it out of the distribution of the data.",
        measures="share of texts right in every number although a wrong one was forced upon the model once, less that "
        "of next-token prediction",
        threshold=Threshold(">=", 0.5),
        check=recovery,
        unit="share of texts",
        seconds=80,
        data=DATA,
    ),
)
