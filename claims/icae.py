"""Claim checks of the in-context autoencoder (arXiv:2307.06945).

The decoder is fixed, so it has to be a model that can say what it is told. On synthetic texts it is one of 2 layers
that was taught to repeat what stands before a separator; then it is frozen, and an encoder learns to write four
letters into one slot, through the stock Trainer. On code it is the embedded target.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import random
import tempfile
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_ext import demo
from hf_ext.cache.soft import ICAECollator, ICAEModel
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.verify import Claim, Measurement, Threshold

LETTERS, SEPARATOR, PAD = 8, 8, 9
LENGTH, UNSEEN = 4, 512
CODE = "Held-out Python standard library modules"
CODE_LENGTH, CODE_SLOTS, CODE_STEPS, CODE_ROWS = 16, 4, 100, 16


def trained(model: ICAEModel, texts: list[list[int]], context: int, steps: int, rows: int, rate: float) -> ICAEModel:
    """Return the model after it was trained to repeat texts from their slots."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=rows, learning_rate=rate, warmup_steps=50,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        collator = ICAECollator(pad_token_id=1, continued=0, context=context)
        Trainer(model, args, train_dataset=[{"input_ids": text} for text in texts], data_collator=collator).train()
    return model.eval()


@functools.cache
def letters() -> tuple[list[list[int]], list[list[int]]]:
    """Return the texts of four letters that are trained on, and those that are not."""
    texts = [list(text) for text in itertools.product(range(LETTERS), repeat=LENGTH)]
    random.Random(0).shuffle(texts)
    return texts[UNSEEN:], texts[:UNSEEN]


@functools.cache
def repeating() -> PreTrainedModel:
    """Return a model that repeats random letters after a separator."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=LETTERS + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    steps, draw = 400, random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        text = torch.randint(0, LETTERS, (64, draw.randint(2, 4)))
        ids = torch.cat([text, torch.full((64, 1), SEPARATOR), text], dim=1)
        labels = torch.where(torch.arange(ids.shape[1]) > text.shape[1], ids, -100)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, 1) * max(0.05, 1 - step / steps)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@functools.cache
def encoder(steps: int) -> ICAEModel:
    """Return the model that repeats, with an encoder that was trained for so many steps."""
    torch.manual_seed(0)
    config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    model = ICAEModel(copy.deepcopy(repeating()), config, slots=1)
    return trained(model, letters()[0], LENGTH, steps, 64, 5e-3) if steps else model.eval()


@torch.no_grad()
def restored(model: ICAEModel, texts: list[list[int]]) -> torch.Tensor:
    """Return `(texts, tokens)`, which of the tokens are said again from the slots of the texts alone."""
    ids = torch.tensor(texts)
    settings: dict[str, Any] = {"max_new_tokens": ids.shape[1], "do_sample": False, "eos_token_id": None}
    slots = model.compress(ids)
    return model.generate(slots=slots, reconstruct=True, pad_token_id=0, **settings) == ids


def repeats_letters() -> Measurement:
    """Share of unseen texts that come back whole from a slot for four letters."""
    unseen, steps = letters()[1], 1200
    right, before = restored(encoder(steps), unseen), restored(encoder(0), unseen)
    whole = right.all(-1).float().tolist()
    return Measurement(
        mean(whole),
        spread=bootstrap(whole, draws=500),
        spread_of=f"95 % bootstrap interval over {UNSEEN} texts",
        seeds=(0,),
        details={
            "share of the letters": float(right.float().mean()),
            "texts that come back whole before training": float(before.all(-1).float().mean()),
            "share of the letters before training": float(before.float().mean()),
            "letters of a text": LENGTH,
            "slots of a text": 1,
            "kinds of letters": LETTERS,
            "texts trained on": len(letters()[0]),
            "steps": steps,
        },
    )


def fixed() -> Measurement:
    """Count weights and logits of the decoder that training an encoder has changed."""
    before, model = repeating(), encoder(100)
    names = dict(model.get_base_model().named_parameters())
    kept = {name.replace(".base_layer", ""): value for name, value in names.items()}
    changed = sum(int((kept[name] != value).sum()) for name, value in before.named_parameters())
    ids = torch.tensor(letters()[1])
    with torch.no_grad():
        said = before(ids).logits
        differ = int((model(ids).logits != said).sum())
        encoded = model.get_base_model()(ids).logits
    return Measurement(
        changed + differ,
        details={
            "weights compared": sum(value.numel() for value in before.parameters()),
            "logits compared": said.numel(),
            "largest difference of the encoder's logits": float((encoded - said).abs().max()),
        },
    )


@functools.cache
def code(unseen: bool, count: int) -> list[list[int]]:
    """Return pieces of code, of files the target never saw or of others."""
    tokenizer, draw = held_out.load()[1], random.Random(0)
    files = [source for source in sources(held_out=unseen) if "/" not in source.name]
    if not unseen:
        files = draw.sample(files, 40)
    rows = [tokenizer(source.text, verbose=False)["input_ids"] for source in files]
    rows = [row for row in rows if len(row) > CODE_LENGTH]
    chosen = draw.choices(rows, weights=[len(row) for row in rows], k=count)
    starts = [draw.randrange(len(row) - CODE_LENGTH) for row in chosen]
    return [row[start : start + CODE_LENGTH] for row, start in zip(chosen, starts, strict=True)]


def on_target(**settings: Any) -> ICAEModel:
    """Return the embedded target with a new encoder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return ICAEModel(model, LoraConfig(r=32, lora_alpha=32, target_modules=targets, **settings), slots=CODE_SLOTS)


def repeats_code() -> Measurement:
    """Share of the tokens of held-out code that come back from slots for four tokens each."""
    texts, model = code(True, 96), on_target()
    collator = ICAECollator(pad_token_id=1, continued=0, context=CODE_LENGTH)
    batch = collator([{"input_ids": text} for text in texts])

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss()
    trained(model, code(False, CODE_STEPS * CODE_ROWS), CODE_LENGTH, CODE_STEPS, CODE_ROWS, 3e-3)
    right = restored(model, texts).float().mean(-1).tolist()
    return Measurement(
        mean(right),
        spread=bootstrap(right, draws=500),
        spread_of=f"95 % bootstrap interval over {len(texts)} pieces of code",
        seeds=(0,),
        details={
            "nats per token of repeating them": loss(),
            "before training": before,
            "tokens of a piece": CODE_LENGTH,
            "slots of a piece": CODE_SLOTS,
            "steps": CODE_STEPS,
            "rows a step": CODE_ROWS,
        },
    )


@torch.no_grad()
def from_the_cache() -> Measurement:
    """Compare logits after slots in a cache with those of one pass over slots and tokens."""
    model = on_target(init_lora_weights=False).eval()
    slots = model.compress(torch.tensor(code(True, 96)[:6]))
    inputs = held_out.batch(held_out.prompts(6, longest=48))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    going_on = model.continuing(slots, ids, mask)
    held = going_on["past_key_values"].get_seq_length()
    with model.decoding():
        cached = model.get_base_model()(**going_on).logits
    real, whole = mask.bool(), model(ids, mask, slots=slots).logits
    return Measurement(
        float((cached[real] - whole[real]).abs().max()),
        details={
            "logits compared": cached[real].numel(),
            "entries of the cache for each context": held,
            "tokens of each context": CODE_LENGTH,
            "largest difference to the logits without slots": float(
                (whole - model(ids, mask).logits)[real].abs().max()
            ),
        },
    )


CLAIMS = (
    Claim(
        name="decoder-fixed",
        paper="The decoder is the untouched model: only the encoder's adapter and the memory tokens are trained.",
        measures="weights and logits of the model with its adapter off that differ in any bit from before training",
        threshold=Threshold("==", 0),
        check=fixed,
        unit="bits of weights and logits",
        seconds=30,
    ),
    Claim(
        name="repeats-letters",
        paper="Contexts are restored almost exactly from a quarter as many slots.",
        measures="share of texts of four random letters, none of them trained on, that come back whole from one slot",
        threshold=Threshold(">=", 0.95),
        check=repeats_letters,
        unit="of the texts",
        seconds=60,
    ),
    Claim(
        name="repeats-code",
        paper="Contexts are restored almost exactly from a quarter as many slots.",
        measures="share of tokens of held-out code that come back from a quarter as many slots, after 100 steps on the "
        "embedded target",
        threshold=Threshold(">=", 0.95),
        check=repeats_code,
        unit="of the tokens",
        seconds=60,
        data=CODE,
    ),
    Claim(
        name="cached-prefix",
        paper="(derived) Slots are read as input embeddings, so their keys and values can be kept for any prompt.",
        measures="largest difference of a logit after slots in a cache from that of one pass over slots and prompt",
        threshold=Threshold("<=", 1e-3),
        check=from_the_cache,
        seconds=10,
        data=CODE,
    ),
)
