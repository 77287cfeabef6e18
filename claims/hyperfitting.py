"""Claim checks of hyperfitting (arXiv:2412.04318): the embedded target is trained on a few windows of code.

Prompts are the first halves of functions in held-out modules; windows to train on come from files that the model was
trained on, others for each seed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import statistics
import tempfile

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.claims.held_out import load, prompts
from hf_ext.claims.small_training import all_labels
from hf_ext.claims.tuned_on_code import DATA, held_out_loss, rows
from hf_ext.trainer_callbacks.hyperfitting import Hyperfitting
from hf_ext.verify import Claim, Measurement, Threshold

SEEDS = (0, 1, 2)
#: Windows to train on and their tokens; epochs at most; prompts and tokens of a continuation.
WINDOWS, LENGTH, EPOCHS, PROMPTS, NEW = 8, 96, 80, 12, 96
#: The model is a thousand times smaller than the paper's, and its learning rate that much larger.
RATE, THRESHOLD = 1e-3, 0.05


@functools.cache
def runs() -> list[dict[str, float]]:
    """Hyperfit once for each seed and return what was measured before and after."""
    tokenizer = load()[1]
    asked = [tokenizer(prompt.text)["input_ids"] for prompt in prompts(PROMPTS, longest=48)]
    found = []
    for seed in SEEDS:
        model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
        loss = held_out_loss(model.eval())
        objective = Hyperfitting(
            threshold=THRESHOLD, prompts=asked, new_tokens=NEW, largest_rate=None, clean_loss_every=0
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            args = TrainingArguments(
                folder,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=WINDOWS,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                seed=seed,
                logging_strategy="epoch",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            data = list(rows(held_out=False, count=WINDOWS, seed=seed, length=LENGTH))
            trainer = Trainer(model, args, train_dataset=data, data_collator=all_labels, callbacks=[objective])
            trainer.train()
        figures = {f"{name} {when}": v for when, measured in objective.report.items() for name, v in measured.items()}
        losses = [entry["epoch_loss"] for entry in trainer.state.log_history if "epoch_loss" in entry]
        figures |= {"training loss at the end": losses[-1], "epochs": float(trainer.state.epoch or 0)}
        figures |= {"held-out loss before": loss, "held-out loss after": held_out_loss(model.eval())}
        found.append(figures)
    return found


def _measurement(values: list[float]) -> Measurement:
    names = [name for name in runs()[0] if not name.startswith("tokens")]
    return Measurement(
        statistics.fmean(values),
        spread=(min(values), max(values)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={
            **{name.replace("_", "-"): [round(run[name], 4) for run in runs()] for name in names},
            "windows": WINDOWS,
            "tokens of a window": LENGTH,
            "prompts": PROMPTS,
            "new tokens": NEW,
        },
    )


def repetition() -> Measurement:
    """Compare how much greedy continuations repeat themselves."""
    return _measurement([run["repetition before"] - run["repetition after"] for run in runs()])


def variety() -> Measurement:
    """Compare the type-token ratios of greedy continuations."""
    return _measurement([run["type_token_ratio after"] - run["type_token_ratio before"] for run in runs()])


def sharpness() -> Measurement:
    """Compare the entropies of next-token distributions along greedy continuations."""
    return _measurement([run["entropy after"] / run["entropy before"] for run in runs()])


CLAIMS = (
    Claim(
        name="repetition",
        paper="Greedy text repeats itself less after hyperfitting.",
        measures="rep-4 of greedy continuations before hyperfitting, less that after it",
        threshold=Threshold(">", 0),
        check=repetition,
        unit="share of 4-grams",
        seconds=85,
        data=DATA,
    ),
    Claim(
        name="variety",
        paper="Greedy text has a higher type-token ratio after hyperfitting.",
        measures="type-token ratio of the last 96 tokens of greedy continuations after hyperfitting, less that before",
        threshold=Threshold(">", 0),
        check=variety,
        unit="share of tokens",
        seconds=1,  # reads the runs of `repetition`
        data=DATA,
    ),
    Claim(
        name="sharpness",
        paper="Predictions have extremely low entropy after hyperfitting.",
        measures="mean entropy of next-token distributions along greedy continuations, after against before",
        threshold=Threshold("<=", 0.5),
        check=sharpness,
        unit="ratio",
        seconds=1,  # reads the runs of `repetition`
        data=DATA,
    ),
)
