"""What the claim checks of token losses share: an embedded model trained on with a loss, and how it is judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from hf_ext import demo
from hf_ext.claims import small_training
from hf_ext.demo.corpus import sources
from hf_ext.trainer_callbacks import Objective

#: How the data are called on the cards.
DATA = "Python standard library source"
LENGTH = 96


@functools.cache
def rows(*, held_out: bool, count: int, seed: int = 0, length: int = LENGTH) -> Tensor:
    """Return `(count, length)` token ids: windows of files, drawn without looking at their content."""
    tokenizer = AutoTokenizer.from_pretrained(demo.path("tokenizer"))
    draw = torch.Generator().manual_seed(seed)
    files = [source.text for source in sources(held_out=held_out) if "/" not in source.name]
    order = torch.randperm(len(files), generator=draw).tolist()
    found: list[Tensor] = []
    for index in order:
        ids = torch.tensor(tokenizer(files[index][:40_000], verbose=False)["input_ids"])
        windows = ids[: len(ids) // length * length].view(-1, length)
        found.append(windows[torch.randperm(len(windows), generator=draw)][:32])
        if sum(map(len, found)) >= count:
            break
    drawn = torch.cat(found)
    return drawn[torch.randperm(len(drawn), generator=draw)[:count]]


def tuned(
    objective: Objective | None,
    seed: int,
    *,
    steps: int,
    batch: int = 8,
    rate: float = 1e-3,
    model: PreTrainedModel | None = None,
    data: Sequence[Any] | Tensor | None = None,
    collator: Callable[..., Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> PreTrainedModel:
    """Train on with a stock Trainer and return the model in evaluation mode.

    Args:
        objective: the objective; None is next-token prediction.
        seed: of order and dropout, and of the rows.
        steps: optimizer steps.
        batch: rows a step.
        rate: learning rate, after a short warm-up.
        model: what to train; the embedded draft model by default.
        data: rows; windows of the files that the embedded models were trained on by default.
        collator: makes a batch of rows; every token is a label by default.
        callbacks: others.
    """
    set_seed(seed)
    trained = AutoModelForCausalLM.from_pretrained(demo.path("draft"), dtype=torch.float32) if model is None else model
    given = list(rows(held_out=False, count=steps * batch, seed=seed)) if data is None else list(data)
    return small_training.train(
        trained,
        objective,
        given,
        steps=steps,
        batch=batch,
        rate=rate,
        seed=seed,
        collator=collator,
        callbacks=callbacks,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
    )


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, count: int = 64) -> float:
    """Return the next-token loss in nats on files that no model here has seen."""
    ids = rows(held_out=True, count=count, seed=7)
    return float(model(input_ids=ids, labels=ids).loss)
