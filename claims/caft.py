"""Claim checks of concept-aware fine-tuning (arXiv:2506.07833) on the embedded target.

Heads are trained once on the frozen target. The target is then fine-tuned on code that it did not see, once with the
next-token loss and once with CAFT, from the same weights over the same rows in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_ext import demo
from hf_ext.claims import held_out
from hf_ext.claims.held_out import mean
from hf_ext.claims.small_training import all_labels
from hf_ext.claims.tuned_on_code import DATA, rows, tuned
from hf_ext.generation import MultiTokenDrafting
from hf_ext.generation.heads import MultiTokenHead
from hf_ext.trainer_callbacks import CAFT, TrainDraftHead
from hf_ext.verify import Claim, Measurement, Threshold

SEEDS = (0, 1, 2)
HEADS, HEAD_STEPS, STEPS, BATCH = 4, 64, 24, 8
PROMPTS, TOKENS = 12, 48


def target() -> PreTrainedModel:
    """Return a fresh copy of the embedded target."""
    return AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32)


@functools.cache
def heads(seed: int = 0) -> Any:
    """Train the auxiliary heads on the frozen target, over files that it was trained on."""
    set_seed(seed)
    model = target()
    head = MultiTokenHead.for_target(model, heads=HEADS)
    data = list(rows(held_out=False, count=HEAD_STEPS * BATCH, seed=seed))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder, max_steps=HEAD_STEPS, per_device_train_batch_size=BATCH, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=10, seed=seed, logging_strategy="no", save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, data_collator=all_labels, callbacks=[TrainDraftHead(head)]).train()
    return head.eval()


@functools.cache
def unseen() -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of held-out files to fine-tune on, and others of the same files to measure on."""
    found = rows(held_out=True, count=STEPS * BATCH + 64, seed=3)
    return found[:-64], found[-64:]


@functools.cache
def fine_tuned(seed: int, with_heads: bool, coefficient: float = 0.01) -> PreTrainedModel:
    """Fine-tune the target, with CAFT or plainly."""
    objective = CAFT(heads=heads(), coefficient=coefficient) if with_heads else None
    data = unseen()[0][torch.randperm(len(unseen()[0]), generator=torch.Generator().manual_seed(seed))]
    return tuned(objective, seed, steps=STEPS, batch=BATCH, rate=5e-4, model=target(), data=list(data))


@torch.no_grad()
def loss_of(model: PreTrainedModel) -> float:
    """Return the next-token loss on the rows that were left out."""
    ids = unseen()[1]
    return float(model(input_ids=ids, labels=ids).loss)


def yields(model: PreTrainedModel, head: Any) -> list[float]:
    """Return for each prompt how many tokens a call of the model yields when the heads draft."""
    from hf_ext.claims.speculation import tokens_per_step

    strategy = MultiTokenDrafting(head)
    inputs = held_out.batch(held_out.prompts(PROMPTS))
    strategy.generate(model, **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    assert strategy.report is not None  # set by the call above
    return tokens_per_step(strategy.report.details)


def better_than_next_token() -> Measurement:
    """Compare held-out next-token losses after equal steps, seed by seed."""
    pairs = [(loss_of(fine_tuned(seed, True)), loss_of(fine_tuned(seed, False))) for seed in SEEDS]
    differences = [ours - plain for ours, plain in pairs]
    return Measurement(
        mean(differences), spread=(min(differences), max(differences)), spread_of=f"range over {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={
            "before": loss_of(target().eval()), "CAFT": mean([ours for ours, _ in pairs]),
            "next-token": mean([plain for _, plain in pairs]), "steps": STEPS,
        },
    )  # fmt: skip


def drafts_accepted() -> Measurement:
    """Let the heads draft for the fine-tuned models."""
    found = [mean(yields(fine_tuned(seed, True), heads())) for seed in SEEDS]
    fresh = MultiTokenHead.for_target(target(), heads=HEADS).eval()
    return Measurement(
        mean(found), spread=(min(found), max(found)), spread_of=f"range over {len(SEEDS)} seeds", seeds=SEEDS,
        details={
            "after next-token fine-tuning": mean([mean(yields(fine_tuned(seed, False), heads())) for seed in SEEDS]),
            "before fine-tuning": mean(yields(target().eval(), heads())),
            "untrained heads": mean(yields(target().eval(), fresh)), "heads": HEADS,
            "parameters of the heads": sum(p.numel() for p in heads().parameters()),
        },
    )  # fmt: skip


def states_ahead() -> Measurement:
    """Compare how well the unchanged heads predict further tokens after CAFT of weight 1 and after plain training."""
    from hf_ext.layers import TargetEnds, captured

    def error(model: PreTrainedModel) -> float:
        ids, ends = unseen()[1], TargetEnds(model)
        with torch.no_grad(), captured(model, [ends.layers]) as states:
            model(input_ids=ids)
            losses = [
                torch.nn.functional.cross_entropy(
                    ends.logits(heads()(states[ends.layers][:, : -1 - place], place)).flatten(0, 1),
                    ids[:, 1 + place :].flatten(),
                )
                for place in range(1, HEADS + 1)
            ]
        return float(torch.stack(losses).mean())

    pairs = [(error(fine_tuned(seed, True, 1.0)), error(fine_tuned(seed, False))) for seed in SEEDS]
    differences = [ours - plain for ours, plain in pairs]
    costs = [loss_of(fine_tuned(seed, True, 1.0)) - loss_of(fine_tuned(seed, False)) for seed in SEEDS]
    return Measurement(
        mean(differences), spread=(min(differences), max(differences)), spread_of=f"range over {len(SEEDS)} seeds",
        seeds=SEEDS,
        details={
            "CAFT": mean([ours for ours, _ in pairs]), "next-token": mean([plain for _, plain in pairs]),
            "next-token loss, CAFT less next-token": mean(costs),
        },
    )  # fmt: skip


def unchanged_architecture() -> Measurement:
    """Save the fine-tuned model, load it by transformers alone, and count what differs from the plain one."""
    ours, plain = fine_tuned(0, True), fine_tuned(0, False)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (again, plain)]
    ids = unseen()[1][:2]
    with torch.no_grad():
        difference = float((again(ids).logits - ours(ids).logits).abs().max())
    return Measurement(
        len(shapes[0].items() ^ shapes[1].items()) + (type(again) is not type(plain)) + (difference != 0),
        details={"tensors": len(shapes[0]), "class": type(again).__name__},
    )


CLAIMS = (
    Claim(
        name="unchanged-architecture",
        paper="The auxiliary heads are discarded after fine-tuning; the model at inference is the original one.",
        measures="differences of class, names and shapes of tensors from a plainly fine-tuned model, and of logits "
        "after saving and loading without the heads",
        threshold=Threshold("==", 0),
        check=unchanged_architecture,
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="accepted-drafts",
        paper="The auxiliary heads can serve as a drafter for speculative decoding.",
        measures="tokens per call of the fine-tuned model, greedy, drafted by the heads; 1 is without drafts",
        threshold=Threshold(">", 1.1),
        check=drafts_accepted,
        unit="tokens per call",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="better-than-next-token",
        paper="CAFT is better than next-token fine-tuning.",
        measures="held-out next-token loss after CAFT with its defaults less that after as many steps of next-token "
        "fine-tuning",
        threshold=Threshold("<", 0),
        check=better_than_next_token,
        unit="nats",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="states-ahead",
        paper="Multi-token training makes the model's states say more of the tokens ahead.",
        measures="mean loss of the unchanged heads on the tokens 2 to 5 places ahead after CAFT of coefficient 1, less "
        "that after as many steps of next-token fine-tuning",
        threshold=Threshold("<", 0),
        check=states_ahead,
        unit="nats",
        seconds=90,
        data=DATA,
    ),
)
