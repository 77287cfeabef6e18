"""Claim checks of dynamic context pruning (arXiv:2305.15805): on the embedded target, and on a task with noise.

The task: a few symbols stand among many tokens that mean nothing, and are to be repeated in ascending order. A model
of two layers learns it first. Then it is trained on with an adapter, once plainly and once with the parts that drop
tokens, on the same rows and for as many steps, through the stock Trainer.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.cache import (
    CompressedCache,
    DynamicContextPruning,
    DynamicContextPruningModel,
    DynamicContextPruningTraining,
)
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.verify import Claim, Measurement, Threshold

TASK = "Made up: 6 of 24 symbols among 42 of 24 tokens of noise, to be repeated in order"
SYMBOLS, NOISE, CONTEXT, ASKED = 24, 24, 48, 6
STEPS, MORE, ROWS, RANK, GAMMA, TESTED, SEEDS = 400, 300, 32, 16, 0.3, 1024, (0, 1)


def task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `(count, 55)` tokens and their labels: noise and symbols, token 0, and the symbols in order.

    Example:
        >>> ids, labels = task(1, 0)
        >>> symbols = [token for token in ids[0, :48].tolist() if token <= 24]
        >>> sorted(symbols) == ids[0, 49:].tolist() == labels[0, 49:].tolist()
        True
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, SYMBOLS, generator=draw).argsort(1)[:, :ASKED] + 1
    ids = torch.randint(1 + SYMBOLS, 1 + SYMBOLS + NOISE, (count, CONTEXT), generator=draw)
    ids.scatter_(1, torch.rand(count, CONTEXT, generator=draw).argsort(1)[:, :ASKED], chosen)
    ids = torch.cat([ids, torch.zeros(count, 1, dtype=torch.long), chosen.sort(1).values], dim=1)
    labels = ids.clone()
    labels[:, : CONTEXT + 1] = -100
    return ids, labels


@functools.cache
def learnt() -> dict[str, Tensor]:
    """Return the weights of a model that has learnt the task."""
    model = empty()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        ids, labels = task(ROWS, step)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict()


def empty() -> LlamaForCausalLM:
    """Return a model that has learnt nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        attn_implementation="hf_ext",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@functools.cache
def trained(pruning: bool, seed: int) -> Any:
    """Return the model after more training with an adapter, with or without dropping."""
    model = empty()
    model.load_state_dict(learnt())
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapted = DynamicContextPruningModel(model, lora, rank=RANK) if pruning else get_peft_model(model, lora)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*task(ROWS * MORE, STEPS + seed), strict=True)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=MORE, per_device_train_batch_size=ROWS, learning_rate=5e-3, warmup_steps=10,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=seed,
            dataloader_pin_memory=False,
        )  # fmt: skip
        callbacks = [DynamicContextPruningTraining(gamma=GAMMA)] if pruning else []
        Trainer(adapted, args, train_dataset=rows, callbacks=callbacks).train()
    return adapted.eval()


@functools.cache
def answered(pruning: bool, seed: int) -> tuple[list[float], Any]:
    """Return the share of right tokens in each answer to new questions, and the cache after them."""
    model, ids = trained(pruning, seed), task(TESTED, 10**6)[0]
    asked = ids[:, : CONTEXT + 1]
    config = model.get_base_model().config
    cache = CompressedCache(config, DynamicContextPruning()) if pruning else DynamicCache(config=config)
    found = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), past_key_values=cache, max_new_tokens=ASKED,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    right = found[:, CONTEXT + 1 :] == ids[:, CONTEXT + 1 :]
    return right.float().mean(1).tolist(), cache


def held(seed: int) -> Tensor:
    """Return how many entries each layer holds after the answers, `(layers, questions)`."""
    cache = answered(True, seed)[1]
    return torch.stack([(cache.columns(layer)[:, 0] >= 0).sum(-1) for layer in range(2)]).float()


def by_question(pruning: bool) -> list[float]:
    """Return the share of right tokens in each answer, mean over the seeds."""
    return [mean(each) for each in zip(*(answered(pruning, seed)[0] for seed in SEEDS), strict=True)]


def pruned() -> Measurement:
    """Count what the layers still hold when the answers are complete."""
    seen = answered(True, SEEDS[0])[1].get_seq_length()
    counts = torch.stack([held(seed) for seed in SEEDS])
    share = 1 - counts.mean((0, 1)) / seen
    return Measurement(
        float(share.mean()),
        spread=bootstrap(share.tolist()),
        spread_of=f"95 % bootstrap interval over {TESTED} questions",
        details={
            "entries held by the layers, for each seed": [
                [round(n, 1) for n in each.mean(-1).tolist()] for each in counts
            ],
            "tokens seen": seen,
            "noise among them": CONTEXT - ASKED,
            "right tokens in the answers": mean(by_question(True)),
            "gamma": GAMMA,
            "steps with the parts": MORE,
            "trained parts (parameters)": sum(p.numel() for p in trained(True, SEEDS[0]).parts.parameters()),
            "seeds": len(SEEDS),
        },
    )


def loss() -> Measurement:
    """Compare right answers, question by question."""
    ours, plain = by_question(True), by_question(False)
    lost = [b - a for a, b in zip(ours, plain, strict=True)]
    return Measurement(
        mean(lost),
        spread=bootstrap(lost),
        spread_of=f"95 % bootstrap interval over {TESTED} questions",
        details={
            "right tokens with dropping, by seed": [mean(answered(True, seed)[0]) for seed in SEEDS],
            "right tokens of the plain adapter, by seed": [mean(answered(False, seed)[0]) for seed in SEEDS],
            "training": "the same model, rows, adapter, learning rate and number of steps",
        },
    )


def memory() -> Measurement:
    """Compare the bytes of both caches after one question, over several."""
    model, shares = trained(True, SEEDS[0]), []
    config = model.get_base_model().config
    for row in task(32, 10**6)[0]:
        asked = row[None, : CONTEXT + 1]
        cache, full = CompressedCache(config, DynamicContextPruning()), DynamicCache(config=config)
        settings = {"attention_mask": torch.ones_like(asked), "max_new_tokens": ASKED, "do_sample": False}
        model.generate(input_ids=asked, past_key_values=cache, pad_token_id=0, **settings)
        with model.disable_adapter():
            model.generate(input_ids=asked, past_key_values=full, pad_token_id=0, **settings)
        whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
        shares.append(cache.resident_bytes() / whole)
    return Measurement(
        mean(shares),
        spread=bootstrap(shares),
        spread_of="95 % bootstrap interval over 32 questions",
        details={"counted": "keys, values, columns, small keys of the interaction, who dropped what, and room"},
    )


@torch.no_grad()
def masked_is_evicted() -> Measurement:
    """Run the embedded target with random parts over chunks, with and without hiding."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32, attn_implementation="hf_ext")
    model = DynamicContextPruningModel(base, LoraConfig(r=4, target_modules="all-linear"), beta=1.0).eval()
    inputs = held_out.batch(held_out.prompts(6, longest=96))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model(ids, attention_mask=mask, position_ids=where, use_cache=False).logits
    kept = model.kept
    assert kept is not None
    cache, worst, start = CompressedCache(base.config, DynamicContextPruning()), 0.0, 0
    total = ids.shape[1]
    for size in (total // 2, total // 4, *[1] * (total - total // 2 - total // 4)):
        part = slice(start, start + size)
        found = model(
            ids[:, part], attention_mask=mask[:, : part.stop], position_ids=where[:, part], past_key_values=cache
        ).logits
        worst = max(worst, float((found - hidden[:, part]).abs().amax(-1)[mask[:, part].bool()].max()))
        start += size
    return Measurement(
        worst,
        details={
            "share of the past kept, mean over layers, rows and tokens": float(kept.mean()),
            "entries held by the layers at the end, longest row": cache.held(),
            "tokens seen": cache.get_seq_length(),
        },
    )


CLAIMS = (
    Claim(
        name="masked-is-evicted",
        paper="(derived) What training masks is what inference removes.",
        measures="largest difference of a logit between one masked pass and a run in chunks and single tokens whose "
        "cache has dropped the same tokens, with random parts on a padded batch",
        threshold=Threshold("<", 3e-5),
        check=masked_is_evicted,
        unit="logits",
        seconds=15,
        data=held_out.DATA,
    ),
    Claim(
        name="pruned",
        paper="Up to 80 % of the context can be pruned without significant loss.",
        measures="share of the context that the cache no longer holds after the answer, mean over layers and questions",
        threshold=Threshold(">=", 0.8),
        check=pruned,
        unit="",
        seconds=90,
        data=TASK,
    ),
    Claim(
        name="without-loss",
        paper="Up to 80 % of the context can be pruned without significant loss.",
        measures="share of right tokens in answers: of a plain adapter trained as long, less that of the model that "
        "drops tokens",
        threshold=Threshold("<=", 0.01),
        check=loss,
        unit="",
        seconds=90,
        data=TASK,
    ),
    Claim(
        name="memory",
        paper="Greater savings in memory than in time.",
        measures="bytes of the cache after a question over those of a full cache, with all that it holds",
        threshold=Threshold("<=", 0.25),
        check=memory,
        unit="",
        seconds=20,
        data=TASK,
    ),
)
