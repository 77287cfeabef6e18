"""Claim checks of MEAP (arXiv:2502.07490) on a small task of several needles in a haystack.

Each row is hay (a Markov chain over 16 words, three followers each) in which a needle of each of four
kinds is hidden, and ends in questions: each names a kind, and its answer is the needle of that kind.
Every kind is asked for several times, each round in another order; only the first round counts, since
later answers can be read off it. Needles are drawn independently; rows for testing come from other seeds.

Both objectives find every needle if trained for long, and none at first. So what counts is the whole
learning curve: the share of needles found, averaged over equally spaced steps. The sizes were chosen on
next-token prediction alone, with a seed that is not judged, so that its curve goes from chance to all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ext.claims import small_training
from hf_ext.trainer_callbacks import MEAP, MEAPSFT, Objective
from hf_ext.verify import Claim, Measurement, Threshold

PAPER = "MEAP (arXiv:2502.07490)"
DATA = "Synthetic needles in a haystack"
SEEDS = (0, 1, 2)
STEPS, EVERY, ROWS = 400, 25, 16
TEST_ROWS = 256
MASK_RATIO = 0.15
#: The fine-tuning form: the released code's share, on answers of any length.
SFT_STEPS, SFT_RATIO = 300, 0.1
#: A row: words of hay, a needle of each kind hidden in it, and rounds of questions for every kind.
WORDS, KINDS, ROUNDS = 20, 4, 3
QUESTIONS = 2 * KINDS * ROUNDS  # columns of questions and answers
LENGTH = WORDS + KINDS + QUESTIONS
#: Vocabulary: the mask, the words of the hay, a question for each kind, the needles of each kind.
MASK, HAY, NEEDLES = 0, 16, 16
FIRST_QUESTION = 1 + HAY
FIRST_NEEDLE = FIRST_QUESTION + KINDS
VOCABULARY = FIRST_NEEDLE + KINDS * NEEDLES


def haystacks(count: int, seed: int) -> Tensor:
    """Return `(count, LENGTH)` rows: hay with a needle of each kind in it, then `ROUNDS` of questions and answers."""
    draw = torch.Generator().manual_seed(seed)
    followers = torch.randint(0, HAY, (HAY, 3), generator=torch.Generator().manual_seed(12345))
    words = [torch.randint(0, HAY, (count,), generator=draw)]
    while len(words) < WORDS:
        words.append(followers[words[-1], torch.randint(0, 3, (count,), generator=draw)])
    drawn = torch.randint(0, NEEDLES, (count, KINDS), generator=draw)
    needles = FIRST_NEEDLE + NEEDLES * torch.arange(KINDS) + drawn
    # Each needle stands after a word of its own, before the next.
    after = torch.rand(count, WORDS, generator=draw).argsort(1)[:, :KINDS] + 0.5
    order = torch.cat((torch.arange(WORDS).expand(count, -1), after), 1).argsort(1)
    parts = [torch.cat((torch.stack(words, 1) + 1, needles), 1).gather(1, order)]
    for _ in range(ROUNDS):
        kinds = torch.rand(count, KINDS, generator=draw).argsort(1)
        parts.append(torch.stack((FIRST_QUESTION + kinds, needles.gather(1, kinds)), 2).flatten(1))
    return torch.cat(parts, 1)


def train(
    objective: Objective | None, seed: int, steps: int, *watchers: TrainerCallback, answers_only: bool = False
) -> PreTrainedModel:
    """Train a small model on fresh rows; None is next-token prediction.

    Args:
        objective: what to train.
        seed: of weights and rows.
        steps: optimizer steps.
        *watchers: callbacks.
        answers_only: learn questions and answers alone, as in fine-tuning; the haystack is the prompt.
    """
    return small_training.train(
        small_model(seed),
        objective,
        haystacks(steps * ROWS, seed + 1000),
        steps=steps,
        batch=ROWS,
        rate=3e-3,
        seed=seed,
        collator=after_the_prompt if answers_only else None,
        callbacks=watchers,
        lr_scheduler_type="constant_with_warmup",
    )


def small_model(seed: int) -> PreTrainedModel:
    """Build the model with random weights."""
    special = {"bos_token_id": None, "eos_token_id": None}
    return small_training.small_model(seed, VOCABULARY, heads=2, context=2 * LENGTH, **special)


def after_the_prompt(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack rows; what is learned begins with the questions."""
    batch = small_training.all_labels(rows)
    batch["labels"][:, : LENGTH - QUESTIONS] = -100
    return batch


@torch.no_grad()
def figures(model: PreTrainedModel) -> tuple[float, float]:
    """Return the share of needles that the model finds, and its next-token loss in nats, on unseen rows."""
    rows = haystacks(TEST_ROWS, seed=7)
    outputs = model(rows, labels=rows)
    answers = (LENGTH - QUESTIONS + 1) + 2 * torch.arange(KINDS)  # of the first round
    found = (outputs.logits[:, answers - 1].argmax(-1) == rows[:, answers]).float().mean()
    return float(found), float(outputs.loss)


class LearningCurve(TrainerCallback):
    """Keep the figures of the model after every `EVERY` steps."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.losses: list[float] = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        """Test the model as at inference: nothing is masked in evaluation mode."""
        if state.global_step % EVERY == 0:
            model.eval()
            found, loss = figures(model)
            model.train()
            self.found.append(found)
            self.losses.append(loss)


def learning_curve(objective: Objective | None, seed: int, steps: int, answers_only: bool) -> LearningCurve:
    """Train one model and return its curve."""
    curve = LearningCurve()
    train(objective, seed, steps, curve, answers_only=answers_only)
    return curve


def retrieval_gain(
    make: Callable[[], Objective], name: str, steps: int = STEPS, answers_only: bool = False
) -> Measurement:
    """Compare the shares of needles found after equally many steps, on average over the learning curve.

    Both objectives start from equal weights and see equal rows, for each seed.

    Args:
        make: the objective.
        name: how it is called in the record.
        steps: optimizer steps.
        answers_only: fine-tune, see `train`.
    """
    runs = {
        name: [learning_curve(make(), seed, steps, answers_only) for seed in SEEDS],
        "next-token": [learning_curve(None, seed, steps, answers_only) for seed in SEEDS],
    }
    means = {who: [statistics.fmean(curve.found) for curve in curves] for who, curves in runs.items()}
    gains = [ours - plain for ours, plain in zip(means[name], means["next-token"], strict=True)]
    details: dict[str, object] = {}
    for who, curves in runs.items():
        details[f"{who}, needles found, mean of curve"] = [round(mean, 4) for mean in means[who]]
        details[f"{who}, needles found after the last step"] = [round(curve.found[-1], 4) for curve in curves]
        if not answers_only:  # words of the hay are not learned then
            details[f"{who}, held-out loss after the last step"] = [round(curve.losses[-1], 4) for curve in curves]
    return Measurement(
        statistics.fmean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={
            **details,
            "steps": steps,
            "steps between tests": EVERY,
            "rows a step": ROWS,
            "row length": LENGTH,
            "needles a row": KINDS,
            "rounds of questions": ROUNDS,
            "chance": 1 / NEEDLES,
        },
    )


def zero_ratio() -> Measurement:
    """Return the largest difference between weights trained with ratio 0 and without MEAP."""
    with_meap, plain = train(MEAP(0.0, mask_token_id=MASK), 0, 20), train(None, 0, 20)
    pairs = zip(with_meap.state_dict().values(), plain.state_dict().values(), strict=True)
    return Measurement(max(float((left - right).abs().max()) for left, right in pairs), seeds=(0,))


def flop_ratio() -> Measurement:
    """Count the floating-point operations of forward and backward with MEAP and without."""
    counts = {}
    for name, objective in (("MEAP", MEAP(MASK_RATIO, mask_token_id=MASK)), ("next-token", None)):
        with FlopCounterMode(display=False) as counter:
            train(objective, 0, 2)
        counts[name] = counter.get_total_flops()
    return Measurement(counts["MEAP"] / counts["next-token"], details=counts)


class Stopwatch(TrainerCallback):
    """Keep the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = math.nan

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        """Start."""
        self._begun = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self._begun)


def step_time_ratio() -> Measurement:
    """Compare the median seconds of a step, in alternating runs after one to warm up."""
    medians: dict[str, list[float]] = {"MEAP": [], "next-token": []}
    for round_ in range(6):
        for name in medians:
            watch = Stopwatch()
            train(MEAP(MASK_RATIO, mask_token_id=MASK) if name == "MEAP" else None, 0, 40, watch)
            if round_:
                medians[name].append(statistics.median(watch.seconds))
    ratios = [meap / plain for meap, plain in zip(medians["MEAP"], medians["next-token"], strict=True)]
    return Measurement(
        statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        spread_of="lowest and highest of 5 pairs of runs of 40 steps",
        details={name: round(1000 * statistics.median(values), 3) for name, values in medians.items()}
        | {"unit of both": "median milliseconds of a step", "parameters": small_model(0).num_parameters()},
    )


CLAIMS = (
    Claim(
        name="zero-ratio",
        paper="Masking nothing is next-token prediction.",
        measures="largest difference of a weight after 20 steps with mask_ratio=0 and without MEAP",
        threshold=Threshold("==", 0),
        check=zero_ratio,
        seconds=3,
        data=DATA,
    ),
    Claim(
        name="retrieval",
        paper="Key-information retrieval is substantially better than with next-token prediction.",
        measures=f"needles found, mean over tests every {EVERY} of {STEPS} steps, with {MASK_RATIO:.0%} masked, "
        "less that of next-token prediction",
        threshold=Threshold(">=", 0.05),  # one test's share has a standard error of up to 0.016
        check=lambda: retrieval_gain(lambda: MEAP(MASK_RATIO, mask_token_id=MASK), "MEAP"),
        unit="share of needles",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="retrieval-after-a-prompt",
        paper="Fine-tuned with MEAP, models use what is in the prompt better than after plain fine-tuning.",
        measures=f"needles found, mean over tests every {EVERY} of {SFT_STEPS} steps that train answers alone, with "
        "MEAPSFT, whose steps read each row twice, less that of plain fine-tuning",
        threshold=Threshold(">=", 0.05),
        check=lambda: retrieval_gain(
            lambda: MEAPSFT(SFT_RATIO, min_target=0, mask_token=MASK), "MEAPSFT", SFT_STEPS, answers_only=True
        ),
        unit="share of needles",
        seconds=80,
        data=DATA,
    ),
    Claim(
        name="flops",
        paper="No additional computation in pre-training or inference.",
        measures="floating-point operations of two training steps, with MEAP against without",
        threshold=Threshold("==", 1),
        check=flop_ratio,
        unit="ratio",
        seconds=2,
        data=DATA,
    ),
    Claim(
        name="step-time",
        paper="No additional computation in pre-training or inference.",
        measures="median time of a training step with MEAP against without, clean loss not measured",
        threshold=None,
        check=step_time_ratio,
        unit="ratio",
        seconds=15,
        data=DATA,
    ),
)
