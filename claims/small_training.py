"""Small models trained from nothing with a stock Trainer, for claim checks on made-up tasks."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_ext.trainer_callbacks import Objective, attach


def small_model(seed: int, vocabulary: int, *, heads: int = 4, context: int = 64, **special: int | None) -> Any:
    """Build a Llama-shaped model of two layers and hidden size 64 with random weights.

    Args:
        seed: of the weights.
        vocabulary: size of it.
        heads: of attention.
        context: longest text.
        **special: `bos_token_id` and the like.
    """
    set_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        **shape,
        **special,
    )
    return LlamaForCausalLM(config)


def train(
    model: PreTrainedModel,
    objective: Objective | None,
    data: Sequence[Any] | Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    collator: Callable[..., Any] | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> PreTrainedModel:
    """Train in place and return the model in evaluation mode.

    Args:
        model: to train.
        objective: the objective; None is next-token prediction.
        data: rows, or a tensor of them.
        steps: optimizer steps.
        batch: rows a step.
        rate: learning rate at its peak, after 20 steps if `options` say nothing else.
        seed: of order and dropout.
        collator: makes a batch of rows; `all_labels` by default.
        callbacks: others.
        **options: further training arguments.
    """
    settings: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            seed=seed,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{"warmup_steps": 20, **settings, **options},
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=list(data),
            data_collator=collator or all_labels,
            callbacks=[*callbacks, *([] if objective is None else [objective])],
        )
        if objective is not None and objective.needs_attach:
            attach(trainer, objective)
        trainer.train()
    return model.eval()


def all_labels(rows: Sequence[Any]) -> dict[str, Tensor]:
    """Stack rows of one length; every token is a label.

    Example:
        >>> all_labels([[1, 2], [3, 4]])["labels"].tolist()
        [[1, 2], [3, 4]]
    """
    ids = torch.stack([torch.as_tensor(row) for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}
