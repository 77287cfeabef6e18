"""Claim checks of prefix language modelling (arXiv:2204.05832): the embedded target, converted and converted back."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.generation.prefix_lm import PrefixLM
from hf_ext.trainer_callbacks.prefix_lm import PrefixLMTraining
from hf_ext.verify import Claim, Measurement, Threshold

STEPS, BACK, ROWS, RATE, PROMPTS, TARGET, LONGEST = 90, 30, 8, 3e-4, 64, 32, 64


def row(prompt: str, reference: str) -> dict[str, list[int]]:
    """Return a prompt and how it goes on, with labels on the latter only."""
    tokenizer = held_out.load()[1]
    before = tokenizer(prompt, verbose=False)["input_ids"][-LONGEST:]
    after = tokenizer(reference, verbose=False)["input_ids"][:TARGET]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 1),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


@functools.cache
def training_rows() -> list[dict[str, list[int]]]:
    """Return halves of functions of files that the target was trained on, in random order."""
    draw = random.Random(0)
    files = draw.sample([source for source in sources(held_out=False) if "/" not in source.name], 70)
    rows = [row(h.text, h.reference) for source in files for h in held_out.halves(source.name, source.text)]
    draw.shuffle(rows)
    if len(rows) < (STEPS + BACK) * ROWS:
        raise ValueError(f"{len(rows)} rows were found, {(STEPS + BACK) * ROWS} are needed")
    return rows


def trained(model: PreTrainedModel, objective: PrefixLMTraining | None, steps: int, after: int = 0) -> PreTrainedModel:
    """Train a model with the stock Trainer; None is plain, causal training.

    Args:
        model: trained in place.
        objective: the callback, or None.
        steps: how long.
        after: steps whose rows are left out; every row is seen once.
    """
    rows = training_rows()[after * ROWS : (after + steps) * ROWS]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=RATE, warmup_steps=5,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        callbacks = [] if objective is None else [objective]
        Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=callbacks).train()
    return model.eval()


@functools.cache
def model_of(kind: str) -> PreTrainedModel:
    """Return the embedded target as it is (`base`), tuned plainly, converted, or converted and then back."""
    if kind == "base":
        return held_out.load()[0]
    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    if kind == "tuned":
        return trained(model, None, STEPS)
    if kind == "back":
        model.load_state_dict(model_of("converted").state_dict())
        return trained(model, None, BACK, after=STEPS)
    return trained(model, PrefixLMTraining(), STEPS)


@functools.cache
def losses(kind: str, prefix: bool) -> list[float]:
    """Return each held-out prompt's loss of how it goes on, in nats per token.

    Args:
        kind: which model.
        prefix: read with the prefix mask rather than causally.
    """
    model, found = model_of(kind), []
    rows = [row(p.text, p.reference) for p in held_out.prompts(PROMPTS)]
    for start in range(0, PROMPTS, 16):
        batch = collate(rows[start : start + 16])
        structure = AttentionStructure.causal(batch["attention_mask"])
        if prefix:
            structure = structure.spans((batch["labels"] == -100).long().cumprod(-1) * batch["attention_mask"])
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=masks_for(model, structure)).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        found += (each.sum(-1) / (targets != -100).sum(-1)).tolist()
    return found


def difference(better: list[float], than: list[float], **details: object) -> Measurement:
    """Compare losses prompt by prompt."""
    gain = [b - a for a, b in zip(better, than, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        details={**details, "steps": STEPS, "rows a step": ROWS, "parameters": model_of("base").num_parameters()},
    )  # fmt: skip


@torch.no_grad()
def first_layer(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what the first layer of the embedded target makes of a text under a mask."""
    return held_out.load()[0](ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]


def visibility() -> Measurement:
    """Change one token after another, and count states that should (not) have changed but have (not)."""
    model, wrong, looked = held_out.load()[0], 0, 0
    for prompt in held_out.prompts(4):
        ids = held_out.batch([prompt])["input_ids"][:, -24:]
        out = PrefixLM().generate(
            model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, min_new_tokens=9, do_sample=False
        )[:, :-1]
        spans = (torch.arange(out.shape[1]) < ids.shape[1]).long()[None]
        structure = AttentionStructure.causal(torch.ones_like(out)).spans(spans)
        mask = masks_for(model, structure)
        before = first_layer(out, mask)
        for column in range(out.shape[1]):
            changed = out.clone()
            changed[0, column] = (changed[0, column] + 1) % model.config.vocab_size
            after = first_layer(changed, mask)
            moved = (after != before).any(-1)[0]
            places = torch.arange(out.shape[1])
            expected = (places >= column) | ((places < ids.shape[1]) & (column < ids.shape[1]))
            wrong, looked = wrong + int((moved != expected).sum()), looked + len(places)
    return Measurement(wrong, details={"pairs of tokens": looked, "prompts": 4})


def conversion() -> Measurement:
    """Compare the converted model with the model before, both read with the prefix mask."""
    return difference(
        losses("converted", True), losses("base", True),
        **{
            "loss with the prefix mask, before": mean(losses("base", True)),
            "loss with the prefix mask, converted": mean(losses("converted", True)),
            "loss with the causal mask, before": mean(losses("base", False)),
        },
    )  # fmt: skip


def against_causal() -> Measurement:
    """Compare the converted model with one that was tuned as long on the same rows, causally."""
    return difference(
        losses("converted", True), losses("tuned", False),
        **{
            "loss of the converted model with the prefix mask": mean(losses("converted", True)),
            "loss of the causally tuned model": mean(losses("tuned", False)),
        },
    )  # fmt: skip


def back() -> Measurement:
    """Compare, read causally, the model that was converted back with the converted one."""
    return difference(
        losses("back", False), losses("converted", False),
        **{
            "loss with the causal mask, converted": mean(losses("converted", False)),
            "loss with the causal mask, converted back": mean(losses("back", False)),
            "loss with the causal mask, before": mean(losses("base", False)),
            "steps back": BACK,
        },
    )  # fmt: skip


CLAIMS = (
    Claim(
        name="visibility",
        paper="Tokens of the prefix see each other in both directions, what follows them stays causal.",
        measures="pairs of tokens of which one sees the other and should not, or does not and should",
        threshold=Threshold("==", 0),
        check=visibility,
        unit="pairs",
        seconds=10,
        data=DATA,
    ),
    Claim(
        name="conversion",
        paper="A causal decoder is adapted to a non-causal one by a short training with the prefix mask.",
        measures="loss of how prompts go on, read with the prefix mask: before conversion less after it",
        threshold=Threshold(">", 0),
        check=conversion,
        unit="nats per token",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="against-causal",
        paper="Adapted non-causal decoders are better than causal ones once both are tuned on prompts with answers.",
        measures="loss of how prompts go on: of a causal model tuned on the same rows less that of the converted model",
        threshold=Threshold(">=", 0),
        check=against_causal,
        unit="nats per token",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="back",
        paper="A non-causal decoder is adapted to a causal one by a short causal training.",
        measures="loss of how prompts go on, read causally: of the converted model less after it was converted back",
        threshold=Threshold(">", 0),
        check=back,
        unit="nats per token",
        seconds=90,
        data=DATA,
    ),
)
