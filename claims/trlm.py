"""Claim checks of TRLM (arXiv:2412.02626) on made-up questions with wordy answers.

A question is four symbols. Its answer says the image of each under a fixed code, between filler words
of which some are common and some rare. `hf_ext.claims.reverse_reranking` chooses among such answers.
"""

from __future__ import annotations

import statistics

import torch
from transformers import PreTrainedModel

from hf_ext.claims import small_training
from hf_ext.generation.time_reversal import Backwards, queries_for, query_log_probs
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.trlm import TRLM
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Made-up questions in symbols, answered in code between filler words"
SEEDS = (3, 4, 5)
STEPS, ROWS = 500, 32
QUESTIONS = 300
BOS, EOS, PAD, ANSWER = 0, 1, 2, 3
SYMBOLS, LENGTH, FILLERS = 16, 4, 12
FIRST_SYMBOL, FIRST_IMAGE, FIRST_FILLER = 4, 4 + SYMBOLS, 4 + 2 * SYMBOLS
VOCABULARY = FIRST_FILLER + FILLERS


def dialogues(count: int, seed: int, evasive: float = 0.0) -> list[list[int]]:
    """Return rows of one length: bos, a question, a mark, the answer (an image and two fillers, four times), eos.

    Args:
        count: rows.
        seed: of all that is drawn.
        evasive: share of the answers that are the commonest filler over and over, whatever the question.
    """
    draw = torch.Generator().manual_seed(seed)
    code = torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(12345))
    asked = torch.randint(0, SYMBOLS, (count, LENGTH), generator=draw)
    common = 0.5 ** torch.arange(FILLERS).float()  # each filler is half as common as the one before
    fillers = torch.multinomial(common, count * LENGTH * 2, replacement=True, generator=draw).view(count, LENGTH, 2)
    answers = torch.cat((FIRST_IMAGE + code[asked][:, :, None], FIRST_FILLER + fillers), 2).flatten(1)
    if evasive:
        answers[torch.rand(count, generator=draw) < evasive] = FIRST_FILLER
    ends = torch.full((count, 1), EOS)
    return torch.cat(
        (torch.full_like(ends, BOS), FIRST_SYMBOL + asked, torch.full_like(ends, ANSWER), answers, ends), 1
    ).tolist()


def train(objective: Objective | None, seed: int, steps: int, evasive: float = 0.0) -> PreTrainedModel:
    """Train a small model on fresh rows; None is next-token prediction."""
    model = small_training.small_model(seed, VOCABULARY, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    rows = dialogues(steps * ROWS, seed + 1000, evasive)
    return small_training.train(model, objective, rows, steps=steps, batch=ROWS, rate=3e-3, seed=seed)


def written_queries() -> Measurement:
    """Let the reversed model write the questions of answers that it never saw, greedily."""
    found = []
    for seed in SEEDS:
        rows = dialogues(QUESTIONS, seed=7)
        model = train(TRLM(), seed, STEPS)
        # the mark between question and answer is the first token that the reversed model writes
        queries = queries_for(model, [[BOS, *row[LENGTH + 2 :]] for row in rows], max_new_tokens=LENGTH + 1)
        pairs = zip(queries, rows, strict=True)
        found.append(sum(query == row[1 : LENGTH + 2] for query, row in pairs) / QUESTIONS)
    return Measurement(
        statistics.fmean(found),
        spread=(min(found), max(found)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={"questions": QUESTIONS, "steps": STEPS, "rows a step": ROWS, "chance": f"1 in {SYMBOLS**LENGTH}"},
    )


def flipped() -> Measurement:
    """Return the largest difference between a reverse score and the plain loss on flipped tokens."""
    model = train(TRLM(), 0, 20)
    worst = 0.0
    for row in dialogues(16, seed=3):
        question, answer = row[: LENGTH + 2], row[LENGTH + 2 :]
        score = float(query_log_probs(Backwards(model), question, [answer])[0])
        text = [BOS, *reversed(row[1:-1])]
        with torch.no_grad():
            laws = model(torch.tensor([text])).logits[0].log_softmax(-1)
        start = len(answer) - 1  # without eos
        expected = sum(float(laws[place, text[place + 1]]) for place in range(start, len(text) - 1))
        worst = max(worst, abs(score - expected))
    return Measurement(worst, seeds=(0,))


CLAIMS = (
    Claim(
        name="flipped",
        paper="A time-reversed model scores a text as a model of reversed token order scores the flipped text.",
        measures="largest difference in nats of a query's score from the log-probabilities on the flipped tokens",
        threshold=Threshold("<=", 1e-4),
        check=flipped,
        unit="nats",
        seconds=4,
        data=DATA,
    ),
    Claim(
        name="queries",
        paper="A time-reversed model generates queries from responses.",
        measures=f"share of unseen answers whose question it writes without a mistake after {STEPS} steps",
        threshold=Threshold(">=", 0.9),
        check=written_queries,
        unit="share of questions",
        seconds=30,
        data=DATA,
    ),
)
