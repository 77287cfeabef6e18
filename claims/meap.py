"""Claim checks of MEAP (arXiv:2502.07490) on a small needle-in-a-haystack task.

Each row is hay (a Markov chain over 16 words, three followers each) with one needle at a random
place, and ends in a question, whose answer is the needle, asked several times. Rows for testing come
from other seeds, and only the first answer counts, since the others can be read off it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_ext.trainer_callbacks import MEAP
from hf_ext.verify import Claim, Measurement, Threshold

PAPER = "MEAP (arXiv:2502.07490)"
DATA = "Synthetic needle in a haystack"
SEEDS = (0, 1, 2)
STEPS, ROWS, LENGTH, QUESTIONS = 400, 16, 32, 6
TEST_ROWS = 512
MASK_RATIO = 0.15
#: Vocabulary: the mask, the words of the hay, the question, the needles.
MASK, HAY, NEEDLES = 0, 16, 16
ASK = 1 + HAY
FIRST_NEEDLE = ASK + 1
VOCABULARY = FIRST_NEEDLE + NEEDLES


def haystacks(count: int, seed: int) -> Tensor:
    """Return `(count, LENGTH)` rows: hay with a needle in it, then question and needle, `QUESTIONS` times."""
    draw = torch.Generator().manual_seed(seed)
    followers = torch.randint(0, HAY, (HAY, 3), generator=torch.Generator().manual_seed(12345))
    words = [torch.randint(0, HAY, (count,), generator=draw)]
    width = LENGTH - 2 * QUESTIONS
    while len(words) < width - 1:
        words.append(followers[words[-1], torch.randint(0, 3, (count,), generator=draw)])
    needle = torch.randint(FIRST_NEEDLE, VOCABULARY, (count, 1), generator=draw)
    place = torch.randint(1, width, (count, 1), generator=draw)
    columns = torch.arange(width).expand(count, -1)
    hay = torch.stack(words, 1) + 1
    before_or_after = (columns - (columns > place).long()).clamp(max=width - 2)
    hidden = hay.gather(1, before_or_after).scatter(1, place, needle)
    return torch.cat((hidden, torch.cat((torch.full((count, 1), ASK), needle), 1).repeat(1, QUESTIONS)), 1)


def small_model(seed: int) -> PreTrainedModel:
    """Build a Llama-shaped model of two layers and hidden size 64."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(objective: MEAP | None, seed: int, steps: int, *watchers: TrainerCallback) -> PreTrainedModel:
    """Train `small_model(seed)` on fresh rows with a stock Trainer; None is next-token prediction."""
    rows = haystacks(steps * ROWS, seed + 1000)
    model = small_model(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        callbacks = [*watchers, *([] if objective is None else [objective])]
        Trainer(model, args, train_dataset=list(rows), data_collator=collate, callbacks=callbacks).train()
    return model.eval()


def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack rows; every token is a label."""
    batch = torch.stack(list(rows))
    return {"input_ids": batch, "labels": batch.clone()}


@torch.no_grad()
def figures(model: PreTrainedModel) -> tuple[float, float]:
    """Return the share of needles that the model finds, and its next-token loss in nats, on unseen rows."""
    rows = haystacks(TEST_ROWS, seed=7)
    outputs = model(rows, labels=rows)
    question = -2 * QUESTIONS  # the first one
    found = (outputs.logits[:, question].argmax(-1) == rows[:, question + 1]).float().mean()
    return float(found), float(outputs.loss)


@functools.cache
def trained() -> dict[str, list[tuple[float, float]]]:
    """Train both objectives from equal weights on equal rows, for each seed."""
    return {
        "MEAP": [figures(train(MEAP(MASK_RATIO, mask_token_id=MASK), seed, STEPS)) for seed in SEEDS],
        "next-token": [figures(train(None, seed, STEPS)) for seed in SEEDS],
    }


def retrieval_gain() -> Measurement:
    """Compare the share of needles found after equally many steps."""
    runs = trained()
    gains = [meap[0] - plain[0] for meap, plain in zip(runs["MEAP"], runs["next-token"], strict=True)]
    details = {f"{name}, needles found": [round(found, 4) for found, _ in values] for name, values in runs.items()}
    details |= {f"{name}, held-out loss": [round(loss, 4) for _, loss in values] for name, values in runs.items()}
    return Measurement(
        statistics.fmean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={
            **details,
            "steps": STEPS,
            "rows a step": ROWS,
            "row length": LENGTH,
            "questions a row": QUESTIONS,
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
        measures=f"needles found after {STEPS} steps with {MASK_RATIO:.0%} masked, less those of next-token prediction",
        threshold=Threshold(">=", 0.05),  # one run's share has a standard error of up to 0.022
        check=retrieval_gain,
        unit="share of needles",
        seconds=60,
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
