"""Claim checks of AutoCompressors (arXiv:2305.14788), on synthetic texts and on code.

A synthetic text is made of a few letters of a larger alphabet, others in each text: the more of it one has read, the
better one knows which. A model of 2 layers is trained on such texts as an AutoCompressor, from scratch. On code it is
the embedded draft that is trained further, whole, through the stock Trainer.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.cache.soft import AutoCompressor, SegmentCollator, Slots
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.testing import tiny_models
from hf_ext.verify import Claim, Measurement, Threshold

ALPHABET, OF_A_TEXT, SEGMENT, SEGMENTS = 32, 8, 8, 4
CODE = "Held-out Python standard library modules"
CODE_SEGMENT, CODE_STEPS, CODE_ROWS, CODE_SUMMARY = 32, 300, 8, 4


def trained(model: Any, texts: Sequence[Sequence[int]], segment: int, steps: int, rows: int, rate: float) -> Any:
    """Return the model after it was trained on texts in segments of about the given length."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=rows, learning_rate=rate, warmup_steps=steps // 10,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        collator = SegmentCollator(segment * 3 // 4, segment * 5 // 4, pad_token_id=1)
        Trainer(model, args, train_dataset=[{"input_ids": list(t)} for t in texts], data_collator=collator).train()
    return model.eval()


def letters(count: int, seed: int) -> list[list[int]]:
    """Return texts of four segments, each of its own eight letters."""
    draw = random.Random(seed)
    chosen = [draw.sample(range(ALPHABET), OF_A_TEXT) for _ in range(count)]
    return [draw.choices(some, k=SEGMENT * SEGMENTS) for some in chosen]


@functools.cache
def on_letters() -> Any:
    """Return an AutoCompressor that was trained on synthetic texts, from scratch."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ALPHABET, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    steps, rows = 400, 32
    model = AutoCompressor(summary_tokens=2).convert(model)
    return trained(model, letters(steps * rows, seed=1), SEGMENT, steps, rows, 3e-3)


@functools.cache
def code(unseen: bool, count: int) -> list[list[int]]:
    """Return pieces of code of four segments, of files the embedded models never saw or of others."""
    tokenizer, draw, width = held_out.load("draft")[1], random.Random(0), CODE_SEGMENT * SEGMENTS
    files = [source for source in sources(held_out=unseen) if "/" not in source.name]
    if not unseen:
        files = draw.sample(files, 40)
    rows = [tokenizer(source.text, verbose=False)["input_ids"] for source in files]
    rows = [row for row in rows if len(row) > width]
    chosen = draw.choices(rows, weights=[len(row) for row in rows], k=count)
    starts = [draw.randrange(len(row) - width) for row in chosen]
    return [row[start : start + width] for row, start in zip(chosen, starts, strict=True)]


@functools.cache
def on_code() -> Any:
    """Return the embedded draft as an AutoCompressor that was trained on code."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo.path("draft"), dtype=torch.float32)
    model = AutoCompressor(summary_tokens=CODE_SUMMARY).convert(model)
    return trained(model, code(False, CODE_STEPS * CODE_ROWS), CODE_SEGMENT, CODE_STEPS, CODE_ROWS, 1e-3)


@torch.no_grad()
def losses(model: Any, texts: list[list[int]], segment: int, history: int) -> list[float]:
    """Return the loss of the last segment of each text, in nats per token, after so many segments in summaries."""
    ids = torch.tensor(texts)
    last, before = ids[:, -segment:], ids[:, -segment * (history + 1) : -segment]
    slots = model.compress(before, segments=segment) if history else None
    logits = model(last, slots=slots).logits[:, :-1].transpose(1, 2)
    return functional.cross_entropy(logits, last[:, 1:], reduction="none").mean(-1).tolist()


def gain(model: Any, texts: list[list[int]], segment: int, what: str) -> Measurement:
    """Compare the losses of the last segments with three segments in summaries and with none."""
    by_history = [losses(model, texts, segment, history) for history in range(SEGMENTS)]
    better = [none - most for none, most in zip(by_history[0], by_history[-1], strict=True)]
    with torch.no_grad():
        ids = torch.tensor(texts)
        whole = model(ids).logits[:, -segment:-1].transpose(1, 2)
        full = float(functional.cross_entropy(whole, ids[:, -segment + 1 :]))
    return Measurement(
        mean(better),
        spread=bootstrap(better, draws=500),
        spread_of=f"95 % bootstrap interval over {len(texts)} {what}",
        seeds=(0,),
        details={
            **{f"nats per token after {n} segments in summaries": mean(each) for n, each in enumerate(by_history)},
            "after three segments as tokens": full,
            "tokens of a segment": segment,
            "vectors of its summary": model.summary_tokens.num_embeddings,
        },
    )


def on_synthetic_texts() -> Measurement:
    """Gain by summaries on texts of a few letters each."""
    return gain(on_letters(), letters(512, seed=2), SEGMENT, "texts")


def on_held_out_code() -> Measurement:
    """Gain by summaries on code that the embedded models never saw."""
    return gain(on_code(), code(True, 192), CODE_SEGMENT, "pieces of code")


def kept_summaries() -> Measurement:
    """Compare logits after summaries that were saved, in a cache, with those of the whole text read in segments."""
    model, ids = on_letters(), torch.tensor(letters(64, seed=2))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model.compress(ids[:, :-SEGMENT], segments=SEGMENT).save(f"{folder}/summaries.safetensors")
        slots = Slots.load(f"{folder}/summaries.safetensors")
        ours = model(**model.continuing(slots, ids[:, -SEGMENT:])).logits
        whole = model(ids, segments=SEGMENT).logits[:, -SEGMENT:]
        plain = model(ids[:, -SEGMENT:]).logits
    return Measurement(
        float((ours - whole).abs().max()),
        details={
            "logits compared": ours.numel(),
            "largest difference to the logits without summaries": float((whole - plain).abs().max()),
        },
    )


@torch.no_grad()
def cost() -> Measurement:
    """Count positions read for a segment after histories of ten times as many tokens in as many summaries."""
    model = AutoCompressor(summary_tokens=4).convert(tiny_models.build("llama"))
    last, read = torch.ones(1, 16, dtype=torch.long), {}
    for segment in (10, 100):
        slots = model.compress(torch.ones(1, 3 * segment, dtype=torch.long), segments=segment)
        calls = tiny_models.calls_of(model, functools.partial(model, last, slots=slots))[1]
        read[3 * segment] = calls[-1][1]
    return Measurement(
        read[300] - read[30],
        details={
            **{f"positions after {tokens} tokens in three summaries": count for tokens, count in read.items()},
            "tokens of the segment": 16,
            "vectors of a summary": 4,
        },
    )


CLAIMS = (
    Claim(
        name="longer-context-letters",
        paper="Longer compressed contexts lower the perplexity.",
        measures="loss of the last segment of unseen synthetic texts without history less that with three segments in "
        "summaries, by a small model trained from scratch",
        threshold=Threshold(">", 0),
        check=on_synthetic_texts,
        unit="nats per token",
        seconds=60,
    ),
    Claim(
        name="longer-context-code",
        paper="Longer compressed contexts lower the perplexity.",
        measures="loss of the last segment of held-out code without history less that with three segments in "
        "summaries, by the embedded draft after 300 steps",
        threshold=Threshold(">", 0),
        check=on_held_out_code,
        unit="nats per token",
        seconds=90,
        data=CODE,
    ),
    Claim(
        name="kept-summaries",
        paper="Summaries can be computed once, kept, and used for any text that follows.",
        measures="largest difference of a logit after saved summaries, in a cache, from that of the whole text read in "
        "segments",
        threshold=Threshold("<=", 1e-3),
        check=kept_summaries,
        seconds=60,
    ),
    Claim(
        name="cost-of-a-segment",
        paper="(derived) What a segment costs depends on the summaries before it, not on the tokens they stand for.",
        measures="positions read for a segment after 300 tokens less those after 30, both in three summaries",
        threshold=Threshold("==", 0),
        check=cost,
        unit="positions",
    ),
)
