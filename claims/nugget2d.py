"""Claim checks of Nugget2D (arXiv:2310.02409): on the embedded target, and on the task with noise of its neighbour."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.cache import Nugget2DModel, NuggetCollator
from hf_ext.claims import held_out
from hf_ext.claims.dynamic_context_pruning import ASKED, CONTEXT, SYMBOLS, TASK, empty, learnt, task
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.verify import Claim, Measurement, Threshold

TEXT = "Held-out Python standard library modules, in pieces of 40 tokens"
NUGGETS, STEPS, ROWS, TESTED, SEEDS = 16, 150, 32, 512, (0, 1)
PIECE, TEXT_STEPS, TEXT_ROWS, TEXT_TESTED = 40, 60, 8, 64


def train(model: Nugget2DModel, rows: list[dict[str, Any]], collator: NuggetCollator, steps: int, size: int) -> Any:
    """Train a model on rows with the stock Trainer."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=size, learning_rate=5e-3, warmup_steps=10,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows, data_collator=collator).train()
    return model.eval()


@functools.cache
def on_noise(scorer: bool, seed: int) -> Any:
    """Return the model of the task after training with nuggets, with a scorer that learns or one that does not."""
    model = empty()
    model.load_state_dict(learnt())
    torch.manual_seed(seed)
    made = Nugget2DModel(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), budget=NUGGETS)
    made.parts.requires_grad_(scorer)
    ids = task(ROWS * STEPS, 1000 + seed)[0]
    rows = [
        {"context_ids": row[:CONTEXT], "input_ids": row[CONTEXT:], "labels": [-100, *row[CONTEXT + 1 :]]}
        for row in ids.tolist()
    ]
    return train(made, rows, NuggetCollator(), STEPS, ROWS)


@functools.cache
def answered(scorer: bool, seed: int) -> list[float]:
    """Return the share of right tokens in each answer to new questions."""
    ids = task(TESTED, 10**6)[0]
    found = on_noise(scorer, seed).generate(
        context_ids=ids[:, :CONTEXT], input_ids=ids[:, CONTEXT : CONTEXT + 1], max_new_tokens=ASKED, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return (found[:, 1:] == ids[:, CONTEXT + 1 :]).float().mean(1).tolist()


def scorer_learns() -> Measurement:
    """Compare answers question by question."""
    ours, fixed = (
        [mean(each) for each in zip(*(answered(scorer, seed) for seed in SEEDS), strict=True)]
        for scorer in (True, False)
    )
    gain = [a - b for a, b in zip(ours, fixed, strict=True)]
    ids = task(TESTED, 10**6)[0][:, :CONTEXT]
    symbols = []
    for seed in SEEDS:
        held = on_noise(True, seed).compress(ids).columns(0)[:, 0].long()
        symbols.append(float((ids.gather(1, held) <= SYMBOLS).sum(1).float().mean()))
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {TESTED} questions",
        details={
            "right tokens with the trained scorer, by seed": [mean(answered(True, seed)) for seed in SEEDS],
            "with a scorer left as it was drawn, by seed": [mean(answered(False, seed)) for seed in SEEDS],
            "nuggets": NUGGETS,
            "tokens of a context": CONTEXT,
            "symbols among the nuggets of the trained scorer, of 6, by seed": symbols,
            "symbols among as many tokens drawn at random": ASKED * NUGGETS / CONTEXT,
            "steps": STEPS,
        },
    )


@functools.cache
def pieces(unseen: bool, count: int) -> list[list[int]]:
    """Return pieces of source code of `PIECE` tokens."""
    tokenizer, draw = held_out.load()[1], random.Random(0)
    files = [source for source in sources(held_out=unseen) if "/" not in source.name]
    found: list[list[int]] = []
    for source in draw.sample(files, min(len(files), 40)):
        ids = tokenizer(source.text, verbose=False)["input_ids"]
        found += [ids[start : start + PIECE] for start in range(0, len(ids) - PIECE + 1, PIECE)]
    draw.shuffle(found)
    if len(found) < count:
        raise ValueError(f"{len(found)} pieces were found, {count} were asked for")
    return found[:count]


def rebuilt() -> Measurement:
    """Train on autoencoding and let it repeat pieces that it never saw."""
    tokenizer = held_out.load()[1]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32, attn_implementation="hf_ext")
    made = Nugget2DModel(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), budget=0.05)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
    collator = NuggetCollator(context=PIECE, autoencode=True, start_token_id=start)
    rows = [{"input_ids": ids} for ids in pieces(False, TEXT_STEPS * TEXT_ROWS)]
    model = train(made, rows, collator, TEXT_STEPS, TEXT_ROWS)
    ids = torch.tensor(pieces(True, TEXT_TESTED))
    first = torch.full((TEXT_TESTED, 1), start)
    found = model.generate(
        context_ids=ids, input_ids=first, max_new_tokens=PIECE, min_new_tokens=PIECE, do_sample=False, pad_token_id=0
    )
    right = (found[:, 1:] == ids).float().mean(1).tolist()
    with torch.no_grad():
        told = model(context_ids=ids, input_ids=torch.cat([first, ids], dim=1)).logits[:, :-1].argmax(-1)
    return Measurement(
        mean(right),
        spread=bootstrap(right),
        spread_of=f"95 % bootstrap interval over {TEXT_TESTED} pieces",
        details={
            "right tokens when told all before them": float((told == ids).float().mean()),
            "nuggets of a piece": model.compress(ids[:1]).held()[0],
            "tokens of a piece": PIECE,
            "steps": TEXT_STEPS,
            "rows a step": TEXT_ROWS,
        },
    )


@torch.no_grad()
def masked_is_evicted() -> Measurement:
    """Run the embedded target after nuggets that were hidden, and after nuggets that are all that is left."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32, attn_implementation="hf_ext")
    model = Nugget2DModel(base, LoraConfig(r=4, target_modules="all-linear"), budget=0.2).eval()
    inputs = held_out.batch(held_out.prompts(6, longest=96))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    after: Tensor = ids[:, -12:].flip(0)
    hidden = model(context_ids=ids, context_mask=mask, input_ids=after).logits
    cache = model.compress(ids, mask)
    held = cache.held()
    seen = torch.cat([mask, torch.ones_like(after)], dim=1)
    where = (seen.cumsum(-1) - 1)[:, -12:]
    found = model(after, attention_mask=seen, position_ids=where, past_key_values=cache).logits
    return Measurement(
        float((found - hidden).abs().max()),
        details={"nuggets of the longest context": held[0], "tokens of it": ids.shape[1]},
    )


CLAIMS = (
    Claim(
        name="masked-is-evicted",
        paper="(derived) What training hides is what leaves the cache.",
        measures="largest difference of a logit between tokens that see nuggets among hidden tokens and tokens after a "
        "cache that holds nothing but the nuggets, on a padded batch",
        threshold=Threshold("<", 3e-5),
        check=masked_is_evicted,
        unit="logits",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="scorer-learns",
        paper="(derived) A scorer that is trained through attention serves better than one that is not.",
        measures="share of right tokens in answers that see 16 of 48 tokens of a context: with a scorer that was "
        "trained, less with one that was not, everything else the same",
        threshold=Threshold(">", 0),
        check=scorer_learns,
        unit="",
        seconds=90,
        data=TASK,
    ),
    Claim(
        name="twentyfold",
        paper="Autoencoding shrinks a context twentyfold and rebuilds it with a BLEU of 98 %.",
        measures="share of right tokens in pieces of 40 tokens that are rebuilt from 2 nuggets, after 60 steps of "
        "training an adapter on the embedded target",
        threshold=Threshold(">=", 0.98),
        check=rebuilt,
        unit="",
        seconds=80,
        data=TEXT,
    ),
)
