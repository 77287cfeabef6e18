"""Claim checks of Bitune (arXiv:2405.14862) on the embedded target, with a small task made from the corpus.

A prompt shows a function without its docstring and asks what it does; the answer is the docstring's first
line. Bitune with two adapters of rank 4 is compared with one causal adapter of rank 8, which has as many
parameters, on the same rows, steps and learning rate, through the stock Trainer.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import random
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ext import demo
from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.generation.bitune_model import BituneModel
from hf_ext.generation.structured.twice import BIDIRECTIONAL, CAUSAL, reading_with
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Functions and docstrings of held-out Python standard library modules"
STEPS, ROWS, RATE, RANK, ASKED, LONGEST, ANSWER = 40, 8, 2e-3, 4, 64, 72, 20
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def described(source: str) -> Iterator[tuple[str, str]]:
    """Yield functions without their docstrings, and the first lines of these.

    Example:
        >>> list(described('def f(x):\\n    \\"\\"\\"Add one.\\"\\"\\"\\n    return x + 1\\n'))
        [('def f(x):\\n    return x + 1\\n', 'Add one.')]
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and len(node.body) > 1:
            first = node.body[0]
            kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
            yield "".join(kept), text.splitlines()[0]


@functools.cache
def rows(unseen: bool, count: int) -> list[dict[str, list[int]]]:
    """Return questions with labels on their answers, of files the target never saw or of others."""
    tokenizer, draw, made = held_out.load()[1], random.Random(0), []
    files = [source for source in sources(held_out=unseen) if "/" not in source.name]
    for source in files if unseen else draw.sample(files, min(len(files), 60)):
        for code, answer in described(source.text):
            asked = tokenizer(code, verbose=False)["input_ids"][:LONGEST] + tokenizer("\n# It does:")["input_ids"]
            said = tokenizer(f" {answer}\n", verbose=False)["input_ids"][:ANSWER]
            made.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
    draw.shuffle(made)
    if len(made) < count:
        raise ValueError(f"{len(made)} functions with docstrings were found, {count} were asked for")
    return made[:count]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    ids = [row["input_ids"] for row in batch]
    return {
        "input_ids": padded(ids, 1),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([row["labels"] for row in batch], -100),
    }


@functools.cache
def trained(kind: str, seed: int) -> Any:
    """Return the target after training: with `bitune`, or with a `causal` adapter of the same size."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    rank = RANK if kind == "bitune" else 2 * RANK
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    adapted = BituneModel(model, config) if kind == "bitune" else get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=RATE, warmup_steps=STEPS // 10,
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=seed,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(adapted, args, train_dataset=rows(False, STEPS * ROWS), data_collator=collate).train()
    return adapted.eval()


@torch.no_grad()
def losses(model: Any) -> list[float]:
    """Return the loss of every held-out answer, in nats per token."""
    found: list[float] = []
    for start in range(0, ASKED, 16):
        batch = collate(rows(True, ASKED)[start : start + 16])
        logits, targets = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        found += (each.sum(-1) / (targets != -100).sum(-1)).tolist()
    return found


def against_causal() -> Measurement:
    """Compare the losses of held-out answers, question by question, over two seeds."""
    by_kind = {kind: [losses(trained(kind, seed)) for seed in (0, 1)] for kind in ("bitune", "causal")}
    ours, plain = ([mean(pair) for pair in zip(*by_kind[kind], strict=True)] for kind in ("bitune", "causal"))
    gain = [b - a for a, b in zip(ours, plain, strict=True)]
    model = trained("bitune", 0)
    keys, values = model.mix.shares()
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {ASKED} questions",
        details={
            "loss of Bitune": mean(ours),
            "loss of the causal adapter": mean(plain),
            "loss before training": mean(losses(held_out.load()[0])),
            "trained parameters of Bitune": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "of the causal adapter": sum(p.numel() for p in trained("causal", 0).parameters() if p.requires_grad),
            "shares of the bidirectional pass in the keys": [round(share, 3) for share in keys.tolist()],
            "in the values": [round(share, 3) for share in values.tolist()],
            "form of the mix": "(s * causal + |c| * bidirectional) / (s + |c|), s = 0.01, one c for the keys and one "
            "for the values of a layer, as variant 607 of the authors' repository, which their experiments used",
            "steps": STEPS,
            "rows a step": ROWS,
            "seeds": 2,
        },
    )


@functools.cache
def with_random_adapters() -> tuple[BituneModel, dict[str, torch.Tensor]]:
    """Return the target with two adapters that change what it says, and prompts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)
    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    return BituneModel(model, config).eval(), held_out.batch(held_out.prompts(6, longest=48))


@torch.no_grad()
def single_reading(name: str, both_ways: bool) -> torch.Tensor:
    """Return the logits after prompts whose cache one adapter has filled, in the pieces in which Bitune reads."""
    model, inputs = with_random_adapters()
    base, ids, mask = model.get_base_model(), inputs["input_ids"], inputs["attention_mask"]
    split = ids.shape[1] - 1
    prefix = AttentionStructure.causal(mask[:, :split])
    prefix = prefix.spans(mask[:, :split]) if both_ways else prefix
    rest = AttentionStructure.causal(mask).part(split, split + 1)
    outputs: Any = None
    for adapter, structure, columns in ((name, prefix, ids[:, :split]), (CAUSAL, rest, ids[:, split:])):
        with reading_with(base, adapter):
            outputs = base(
                columns, attention_mask=masks_for(base, structure), use_cache=True,
                past_key_values=None if outputs is None else outputs.past_key_values,
                position_ids=structure.queries.position.long(),
            )  # fmt: skip
    return outputs.logits[:, -1]


def next_logits(share: float, **settings: Any) -> torch.Tensor:
    """Return the logits of the first new token with a share of the bidirectional pass."""
    model, inputs = with_random_adapters()
    model.mix.fill(share, share)
    settings |= {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **settings).logits[0]


def nothing_mixed() -> Measurement:
    """Count bits that differ from the causal adapter's where the share is 0."""
    ours, plain = next_logits(0), next_logits(0, custom_generate=None)
    return Measurement(
        int((ours != single_reading(CAUSAL, False)).sum()),
        details={
            "logits compared": ours.numel(),
            "largest difference to the prompt read in one piece by generate": float((ours - plain).abs().max()),
            "largest difference at a share of one half": float((next_logits(0.5) - plain).abs().max()),
        },
    )


def all_mixed() -> Measurement:
    """Count bits that differ from a purely bidirectional reading where the share is 1."""
    ours = next_logits(1)
    return Measurement(
        int((ours != single_reading(BIDIRECTIONAL, True)).sum()), details={"logits compared": ours.numel()}
    )


CLAIMS = (
    Claim(
        name="causal-at-0",
        paper="(derived) With coefficients of 0 the model is the causal PEFT model.",
        measures="logits after the prompt that differ in any bit from those of the causal adapter, which reads it in "
        "the same two pieces",
        threshold=Threshold("==", 0),
        check=nothing_mixed,
        unit="logits",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="bidirectional-at-1",
        paper="(derived) With a share of 1 the cache is that of the bidirectional pass.",
        measures="logits after the prompt that differ in any bit from those of a cache that the bidirectional adapter "
        "alone has filled",
        threshold=Threshold("==", 0),
        check=all_mixed,
        unit="logits",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="against-causal",
        paper="Bitune gives consistent gains over LoRA with causal attention, zero-shot, after instruction tuning.",
        measures="loss of held-out answers: of a causal adapter with as many parameters less that of Bitune, each "
        "trained for 40 steps on the embedded target",
        threshold=Threshold(">", 0),
        check=against_causal,
        unit="nats per token",
        seconds=90,
        data=DATA,
    ),
)
