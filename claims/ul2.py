"""Claim checks of UL2 (arXiv:2205.05131): its spans, and what a decoder learns from them on synthetic echoes.

An echo is ten symbols drawn from 24, and the same ten again. What is missing in the first half cannot be told from the
left, where every symbol is as likely as any other (3.178 nats), but is there to the right; the second half can be told
from the left. Two models of two layers are trained from random weights for equally many steps on equally many fresh
echoes: on UL2's mixture, and on next tokens. Filling in is measured on three missing symbols of the first half, as many
as mode R takes out: UL2's model reads both sides, as in mode R; the other one reads what comes before. Left
to right is measured on the last quarter, which UL2's model is asked for in mode S.

The settings were chosen with a seed that is not judged.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import statistics
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA as CODE
from hf_ext.trainer_callbacks.ul2 import UL2
from hf_ext.trainer_callbacks.ul2_denoisers import DENOISERS, corrupt_spans, draw_spans, restore_spans
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Synthetic echoes"
SEEDS = (1, 2, 3)
STEPS, ROWS, RATE, LENGTH, TEST_ROWS, GAP, END = 1000, 16, 3e-3, 20, 256, 3, 5
BOS, EOS, FIRST, SYMBOLS, SENTINELS = 1, 2, 3, 24, 12
MODES = {"R": FIRST + SYMBOLS, "X": FIRST + SYMBOLS + 1, "S": FIRST + SYMBOLS + 2}
SENTINEL_IDS = [FIRST + SYMBOLS + 3 + number for number in range(SENTINELS)]
VOCABULARY = FIRST + SYMBOLS + 3 + SENTINELS


def echo(draw: random.Random) -> list[int]:
    """Return bos, `LENGTH` symbols of which the second half repeats the first, and eos."""
    half = [FIRST + draw.randrange(SYMBOLS) for _ in range(LENGTH // 2)]
    return [BOS, *half, *half, EOS]


class Echoes(IterableDataset):
    """Fresh echoes without end.

    Args:
        seed: of the echoes.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        draw = random.Random(self.seed)
        while True:
            yield echo(draw)


def method() -> UL2:
    """Return the objective, with the paper's denoisers."""
    return UL2(sentinels=SENTINEL_IDS, mode_tokens=MODES, eos_token=EOS, clean_loss_every=0)


@functools.cache
def trained(ul2: bool, seed: int) -> PreTrainedModel:
    """Train a model on UL2's mixture, or on next tokens."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=RATE, warmup_steps=20, seed=seed,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        callbacks = [method()] if ul2 else []
        Trainer(model, args, train_dataset=Echoes(1000 + seed), data_collator=collate, callbacks=callbacks).train()
    return model.eval()


def collate(rows: list[list[int]]) -> dict[str, Tensor]:
    """Stack echoes; every token is a label."""
    batch = torch.tensor(rows)
    return {"input_ids": batch, "labels": batch.clone()}


@functools.cache
def losses(ul2: bool, seed: int) -> tuple[float, float]:
    """Return the nats per token of filling in, and of going on from left to right."""
    model, draw = trained(ul2, seed), random.Random(7)
    objective = method()
    objective.resolve(None, model.config)
    filling, going_on = [], []
    for _ in range(TEST_ROWS):
        text = echo(draw)
        start = draw.randint(1, LENGTH // 2 - GAP + 1)
        missing = text[start : start + GAP]
        if ul2:
            filling.append((objective.prompt([text[:start], text[start + GAP : -1]], "R"), missing))
            going_on.append((objective.prompt([text[: -1 - END]], "S"), text[-1 - END : -1]))
        else:
            filling.append((text[:start], missing))
            going_on.append((text[: -1 - END], text[-1 - END : -1]))
    return loss(model, filling), loss(model, going_on)


@torch.no_grad()
def loss(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Return the nats per token of what follows each prompt."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows, labels = [], []
    for prompt, answer in pairs:
        fill = longest - len(prompt) - len(answer)
        rows.append([*prompt, *answer, *[0] * fill])
        labels.append([*[-100] * len(prompt), *answer, *[-100] * fill])
    return float(model(torch.tensor(rows), labels=torch.tensor(labels)).loss)


def compared(which: int, sign: int) -> Measurement:
    """Compare the losses of both models.

    Args:
        which: 0 filling in, 1 left to right.
        sign: 1 for next-token prediction's loss less UL2's, -1 for the other way round.
    """
    found = {kind: [losses(kind == "UL2", seed) for seed in SEEDS] for kind in ("UL2", "next-token")}
    pairs = zip(found["UL2"], found["next-token"], strict=True)
    gains = [sign * (plain[which] - ours[which]) for ours, plain in pairs]
    details: dict[str, object] = {}
    for kind, values in found.items():
        for name, index in (("filling in", 0), ("left to right", 1)):
            details[f"{kind}, loss of {name}"] = [round(value[index], 4) for value in values]
    return Measurement(
        statistics.fmean(gains),
        spread=(min(gains), max(gains)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={**details, "steps": STEPS, "rows a step": ROWS, "symbols": LENGTH, "missing": GAP},
    )


def rates() -> Measurement:
    """Compare, for each denoiser, the share of tokens that it takes from 512 with its rate."""
    draw, shares, lengths = random.Random(0), {}, {}
    for denoiser in DENOISERS:
        drawn = [draw_spans(512, denoiser, draw) for _ in range(1000)]
        taken = sum(stop - start for spans in drawn for start, stop in spans)
        name = f"{denoiser.mode} {denoiser.mean:g} {denoiser.rate:g}"
        shares[name] = taken / 512_000
        lengths[name] = round(taken / sum(map(len, drawn)), 3)
    away = max(abs(share - d.rate) for share, d in zip(shares.values(), DENOISERS, strict=True))
    details = {"share taken": {name: round(share, 4) for name, share in shares.items()}, "mean length": lengths}
    return Measurement(away, details={**details, "texts each": 1000, "tokens a text": 512})


def lost() -> Measurement:
    """Count functions of held-out code that do not come back from what is left and what was taken out."""
    draw, wrong = random.Random(0), 0
    tokenizer = held_out.load()[1]
    marks = [len(tokenizer) + number for number in range(100)]
    functions = held_out.prompts(64)
    for prompt in functions:
        tokens = tokenizer(prompt.text + prompt.reference, verbose=False)["input_ids"]
        for denoiser in DENOISERS:
            kept, moved = corrupt_spans(tokens, draw_spans(len(tokens), denoiser, draw), marks)
            wrong += restore_spans(kept, moved, marks) != tokens
    return Measurement(wrong, details={"functions": len(functions), "denoisers": len(DENOISERS)})


CLAIMS = (
    Claim(
        name="rates",
        paper="Denoisers take out spans of a mean length that cover a share of the text.",
        measures="largest difference between a denoiser's rate and the share of tokens that it takes out",
        threshold=Threshold("<=", 0.01),
        check=rates,
        unit="share of tokens",
        seconds=1,
        data="Numbers",
    ),
    Claim(
        name="lossless",
        paper="What is left and what was taken out make up the text.",
        measures="functions that are not restored from both",
        threshold=Threshold("==", 0),
        check=lost,
        unit="functions",
        seconds=5,
        data=CODE,
    ),
    Claim(
        name="infilling",
        paper="One model both fills in spans from what surrounds them and goes on from left to right.",
        measures="loss of three missing symbols: next-token prediction's, from the left, less UL2's, from both sides",
        threshold=Threshold(">", 0.1),
        check=lambda: compared(0, 1),
        unit="nats per token",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="left-to-right",
        paper="The mixture is as good a language model as one trained on next tokens alone.",
        measures="loss of the last quarter: UL2's in mode S less that of next-token prediction, after equal steps",
        threshold=Threshold("<=", 0.1),
        check=lambda: compared(1, -1),
        unit="nats per token",
        seconds=90,
        data=DATA,
    ),
)
