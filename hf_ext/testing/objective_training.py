"""Tiny models, data and trainers for the conformance suite of objectives."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

VOCABULARY = 64
PAD, BOS, EOS, MASK = 0, 1, 2, 3


def tiny_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """Build a Llama-shaped model of 2 layers and hidden size 32 with seeded weights."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**values))


def examples(count: int = 16, seed: int = 0, longest: int = 20) -> list[dict[str, list[int]]]:
    """Make rows of different lengths; part of each row's labels is -100, as for a prompt."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest + 1, (), generator=draw))
        tokens = torch.randint(MASK + 1, VOCABULARY, (length,), generator=draw).tolist()
        prompt = int(torch.randint(0, 4, (), generator=draw))
        row = [BOS, *tokens, EOS]
        rows.append({"input_ids": row, "labels": [-100] * prompt + row[prompt:]})
    return rows


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row of the batch."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", PAD),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def collate_left(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the left. As on the right, nothing predicts the first token of a row."""
    batch = collate([{**row, "labels": [-100, *row["labels"][1:]]} for row in rows])
    shifts = (batch["attention_mask"] == 0).sum(-1).tolist()
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in batch.items()
    }


def arguments(
    folder: Path | str, kind: type[TrainingArguments] = TrainingArguments, **changes: Any
) -> TrainingArguments:
    """Build arguments for a few full-precision CPU steps over one batch of 8 rows each; `kind` is their class."""
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        "dataloader_pin_memory": False,
        **changes,
    }
    return kind(**values)


def train(
    model: nn.Module,
    objective: Any | None,
    *,
    attached: bool = False,
    resume: str | None = None,
    folder: Path | str | None = None,
    trainer_class: type[Trainer] = Trainer,
    collator: Any = collate,
    company: Sequence[Any] = (),
    **changes: Any,
) -> Trainer:
    """Train `model` with `objective` (None for plain training) and return the trainer.

    Args:
        model: trained in place.
        objective: the objective, or None.
        attached: use `attach` instead of `callbacks=`.
        resume: checkpoint folder to resume from.
        folder: output folder; a temporary one if None.
        trainer_class: the Trainer to use.
        collator: collates the rows of `examples()`.
        company: further objectives, as callbacks after it.
        **changes: training arguments that differ from `arguments`.
    """
    from hf_ext.trainer_callbacks import attach

    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_class(
            model=model,
            args=arguments(folder or scratch, **changes),
            train_dataset=examples(16),
            eval_dataset=examples(8, seed=1),
            data_collator=collator,
            callbacks=[*([] if objective is None or attached else [objective]), *company],
        )
        if attached and objective is not None:
            attach(trainer, objective)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    """Return what the trainer logged as `name`, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy a model's parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Return the largest absolute difference between two sets of weights of the same names."""
    assert left.keys() == right.keys(), f"different weights: {sorted(left.keys() ^ right.keys())}"
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)
